"""Killed inside a save: F1-F9, F11."""

from __future__ import annotations

import signal
from typing import Any

import pytest

from faults.lab import Lab
from faults.oracle import resume

STEP = 15
"""The save that is hit; those of 5 and 10 are whole."""
OLD: list[tuple[str, str]] = [
    ("before", "trained.safetensors"),
    *(("half", file) for file in ("trained.safetensors", "optimizer.pt", "progress.json")),
    ("half", "MANIFEST.json"),
]
"""Here the checkpoint before it is used."""
POINTS = [*OLD, ("renaming", ""), ("renamed", ""), ("deleting", ""), ("half_deleted", "")]
QUICK = {("half", "optimizer.pt"), ("renamed", "")}


def at_point(when: str, file: str, rank: int | None = None) -> list[Any]:
    if file:
        return ["saving", {"step": STEP, "file": file, "when": when, "rank": rank}]
    return ["committing", {"step": STEP, "when": when.removesuffix("_deleted"), "rank": rank}]


@pytest.mark.parametrize(
    ("when", "file"), [point if point in QUICK else pytest.param(*point, marks=pytest.mark.faults) for point in POINTS]
)
def test_f1_to_f9_killed_inside_a_save(lab: Lab, when: str, file: str) -> None:
    job = lab.job()
    ended = job.go(at_point(when, file))
    assert ended.code == -signal.SIGKILL, ended.output
    committed = when in ("renamed", "deleting", "half_deleted")
    assert (STEP in job.checkpoints) == committed
    assert len(job.lines("train")) == STEP
    resume(lab, job, at=STEP if committed else STEP - 5)


@pytest.mark.parametrize(
    ("when", "file"),
    [("half", "trained.safetensors"), ("half", "MANIFEST.json"), ("renamed", ""), ("half_deleted", "")],
)
@pytest.mark.faults
def test_f1_to_f9_two_processes_killed_inside_a_save(lab: Lab, when: str, file: str) -> None:
    job = lab.job(ranks=2)
    children = job.fork(at_point(when, file))
    assert children[0].wait() == -signal.SIGKILL, children[0].output
    children[1].send(signal.SIGKILL)
    job.end(children)
    committed = when in ("renamed", "deleting", "half_deleted")
    resume(lab, job, at=STEP if committed else STEP - 5)


@pytest.mark.faults
def test_f11_the_second_rank_killed_while_it_writes(lab: Lab) -> None:
    job = lab.job(ranks=2)
    children = job.fork(at_point("half", "rng_state_1.pt", rank=1))
    assert children[1].wait() == -signal.SIGKILL
    assert children[0].wait() not in (0, -signal.SIGKILL), children[0].output
    assert STEP not in job.checkpoints
    assert job.status["exit_code"] == 10
    resume(lab, job, at=STEP - 5)
