"""Numbers that are not finite, and memory that runs out: F28-F31."""

from __future__ import annotations

import json
import math
import time

import pytest
import torch
from safetensors.torch import load_file

from faults.lab import Job, Lab, rows
from faults.oracle import exact, resume


def poison(what: str, value: str, *steps: int, rank: int | None = None) -> list[object]:
    return ["poison", {"what": what, "value": value, "steps": steps, "rank": rank}]


def all_finite(job: Job) -> None:
    """Nothing poisoned is on the disk."""
    for file in job.run.rglob("*.safetensors"):
        assert all(torch.isfinite(tensor).all() for tensor in load_file(file).values()), file


@pytest.mark.parametrize(
    ("what", "value", "step"),
    [
        ("gradient", "inf", 8),
        pytest.param("gradient", "nan", 10, marks=pytest.mark.faults),
        pytest.param("loss", "nan", 8, marks=pytest.mark.faults),
    ],
)
def test_f28_nothing_that_is_not_finite_is_learned_or_saved(lab: Lab, what: str, value: str, step: int) -> None:
    job = lab.job()
    ended = job.go(poison(what, value, step))
    assert ended.code == 6, ended.output
    assert f"step {step}" in ended.output
    assert job.checkpoints == [5]
    assert not (job.run / "adapter").exists()
    all_finite(job)
    shown = job.lines("train")[-1]
    assert shown["step"] == step
    assert not is_finite(shown["loss"] if what == "loss" else shown["grad_norm"])
    assert (job.status["state"], job.status["exit_code"]) == ("failed", 6)
    resume(lab, job, at=5)


@pytest.mark.faults
def test_f28_on_the_second_rank_only(lab: Lab) -> None:
    job = lab.job(ranks=2)
    ended = job.go(poison("loss", "nan", 8, rank=1))
    assert ended.codes == [6, 6], ended.output
    assert job.checkpoints == [5]
    resume(lab, job, at=5)


@pytest.mark.faults
def test_f28_between_two_logs(lab: Lab) -> None:
    job = lab.job("training.log_every=7")
    ended = job.go(poison("loss", "nan", 9))
    assert ended.code == 6, ended.output
    assert "step 9" in ended.output
    resume(lab, job, at=5)


@pytest.mark.faults
def test_f28_skipped_steps_are_counted_and_capped(lab: Lab) -> None:
    skip = ("training.on_nonfinite=skip", "training.max_skipped=2")
    job = lab.job(*skip)
    ended = job.go(poison("gradient", "nan", 8, 12))
    assert ended.code == 0, ended.output
    assert [line["step"] for line in job.lines("train")] == list(range(1, 27))
    all_finite(job)
    job = lab.job(*skip)
    assert job.go(poison("gradient", "nan", 8, 12, 13)).code == 6


@pytest.mark.faults
def test_f28_skipped_steps_are_remembered_across_a_kill(lab: Lab) -> None:
    skip = ("training.on_nonfinite=skip", "training.max_skipped=2")
    plugin = poison("gradient", "nan", 3, 12)
    whole, job = lab.job(*skip), lab.job(*skip)
    assert whole.go(plugin).code == 0
    job.go(plugin, ["at", {"place": "logged", "step": 17, "action": "die"}])
    ended = job.go(plugin)
    assert ended.code == 0, ended.output
    assert [exact(line) for line in job.lines("train")] == [exact(line) for line in whole.lines("train")]
    job = lab.job(*skip)
    job.go(poison("gradient", "nan", 3, 8), ["at", {"place": "logged", "step": 12, "action": "die"}])
    assert job.go(poison("gradient", "nan", 14)).code == 6


@pytest.mark.faults
def test_f29_a_loss_that_leaps_stops_training(lab: Lab) -> None:
    job = lab.job("training.loss_spike={factor: 3, patience: 2}")
    ended = job.go(poison("loss", "100", *range(16, 27)))
    assert ended.code == 6, ended.output
    assert "training.loss_spike" in ended.output
    assert "step 17" in ended.output
    resume(lab, job, at=None)


@pytest.mark.parametrize(
    ("error", "place"),
    [("torch.OutOfMemoryError", "forward"), pytest.param("torch.OutOfMemoryError", "eval", marks=pytest.mark.faults),
     pytest.param("MemoryError", "forward", marks=pytest.mark.faults)],
)  # fmt: skip
def test_f30_f31_out_of_memory(lab: Lab, error: str, place: str) -> None:
    job = lab.job()
    ended = job.go(["at", {"place": place, "step": 8, "action": "fail", "error": error, "message": "out of memory"}])
    assert ended.code == 7, ended.output
    assert "Traceback" not in ended.output
    if error.startswith("torch"):
        for word in ("training.micro_batch", "32 tokens") if place == "forward" else ("training.eval_batch",):
            assert word in ended.output
    assert job.status["exit_code"] == 7
    resume(lab, job, at=5)


@pytest.mark.faults
def test_f31_a_killed_worker_is_told(lab: Lab) -> None:
    job = lab.job("data.workers=2", "training.epochs=null", "training.steps=2")
    many = job.folder / "many.csv"
    many.write_text(rows(6_000, 3, ("the", "film", "is", "was", "plot", "cast", "very", "so")))
    job.overrides.append(f"data.train={many}")
    begun = time.monotonic()
    ended = job.go(["kill_workers", {}])
    assert ended.code in (3, 7), ended.output
    assert time.monotonic() - begun < 30
    assert "Traceback" not in ended.output
    again = job.go()
    assert again.code == 0, again.output


def is_finite(value: object) -> bool:
    number = float(value) if isinstance(value, str | float | int) else math.nan
    return math.isfinite(number)


@pytest.mark.faults
def test_every_line_of_metrics_is_plain_json(lab: Lab) -> None:
    job = lab.job()
    job.go(poison("loss", "nan", 3))

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    for line in (job.run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
