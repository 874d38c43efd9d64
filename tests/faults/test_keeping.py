"""Checkpoints that nobody asked for, and finished runs that are made longer: killed anywhere, no work is lost."""

from __future__ import annotations

import json
import random
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from faults.lab import STEPS, Job, Lab
from faults.oracle import adapter_hash, clean, exact, finished, resumed_at

EPOCH = STEPS // 2
DEFAULT = "checkpoints={}"
PACE = ["pace", {}]


def whole(lab: Lab, job: Job) -> None:
    """A finished run equals one that nobody touched, whichever checkpoints either has kept."""
    reference = lab.reference([word for word in job.overrides if not word.startswith("checkpoints")], job.ranks)
    assert [exact(line) for line in job.lines()] == [exact(line) for line in reference.lines()]
    assert adapter_hash(job) == adapter_hash(reference)
    clean(job)


# ---- checkpoints by the clock ----


def test_the_defaults_lose_at_most_an_epoch(lab: Lab) -> None:
    job = lab.job(DEFAULT)
    ended = job.go(PACE, ["at", {"place": "step_end", "step": 20, "action": "die"}])
    assert ended.code == -signal.SIGKILL, ended.output
    assert job.checkpoints == [EPOCH]
    ended = job.go(PACE)
    assert resumed_at(ended.output) == EPOCH, ended.output
    whole(lab, job)
    assert job.checkpoints == [EPOCH, STEPS], "the last state stays"


@pytest.mark.faults
def test_off_keeps_nothing_but_the_state_of_a_run_that_is_stopped(lab: Lab) -> None:
    job = lab.job("checkpoints=off")
    stop = ["at", {"place": "step_end", "step": 20, "action": "die", "number": signal.SIGTERM, "wait": 0}]
    assert job.go(PACE, stop).code == 143
    assert job.checkpoints == [20]
    assert job.go(PACE).code == 0
    whole(lab, job)
    assert job.checkpoints == [20]


@pytest.mark.faults
@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_random_moments_between_checkpoints_by_the_clock(lab: Lab, ranks: int) -> None:
    # Two ranks agree on the step of each checkpoint, though only one of them looks at the clock.
    job, draw, begun = lab.job("checkpoints={every: null, every_minutes: 0.005}", ranks=ranks), random.Random(ranks), []
    for _ in range(5):
        children = job.fork(PACE, ["slow", {"seconds": 0.15}])
        before = job.checkpoints[-1:] if job.run.exists() else []
        job.until(partial(has_newer, job, before))
        time.sleep(draw.uniform(0.0, 0.4))
        for child in children:
            child.send(signal.SIGKILL)
        ended = job.end(children)
        begun.append(resumed_at(ended.output))
        assert begun[-1] == (before[0] if before else 0), ended.output
    assert sorted(set(begun)) == begun, "each start got further"
    ended = job.go(PACE)
    assert ended.codes == [0] * ranks, ended.output
    assert resumed_at(ended.output) > 0
    whole(lab, job)


def has_newer(job: Job, before: list[int]) -> bool:
    return job.checkpoints[-1:] != before


# ---- finished runs, made longer ----

PLAIN = ("training.schedule=constant", "training.eval_every=epoch", "checkpoints.every=epoch")
DEATHS: dict[str, list[Any]] = {
    "while the successor is made": ["linking", {"number": 5}],
    "before the first rename": ["renaming", {"ends": ".old-1", "when": "before"}],
    "between the renames": ["renaming", {"ends": ".old-1", "when": "after"}],
    "after the second rename": ["renaming", {"ends": "/run", "when": "after"}],
    "in the middle": ["at", {"place": "logged", "step": 20, "action": "die"}],
    "while it saves the adapter": ["renaming", {"ends": "/adapter", "when": "before"}],
    "after its report": ["renaming", {"ends": "/report.md", "when": "after"}],
}
FEW = ("between the renames",)


def of_one_run(lab: Lab, folder: Path) -> int:
    """Hold a run folder to its own word; returns the epochs of its recipe."""
    status = json.loads((folder / "status.json").read_text())
    epochs = int(yaml.safe_load((folder / "recipe.yaml").read_text())["training"]["epochs"])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    reference = lab.reference([*PLAIN, f"training.epochs={epochs}"])
    assert lines[-1]["step"] <= epochs * EPOCH
    if (folder / "adapter").exists():
        job = Job(lab.server, folder.parent, folder)
        weights = next((folder / "adapter").glob("*.safetensors")).read_bytes()
        assert weights == next((reference.run / "adapter").glob("*.safetensors")).read_bytes(), job.folder
        assert lines[-1]["step"] == epochs * EPOCH
    else:
        assert not (folder / "report.md").exists()
        assert status["state"] == "running"
        assert (folder / status["checkpoint"] / "MANIFEST.json").is_file()
    if status["state"] == "done":
        assert status["step"] == lines[-1]["step"] == epochs * EPOCH
        assert lines[-1]["phase"] == "summary"
        assert (folder / "adapter").exists()
    return epochs


@pytest.mark.parametrize(
    "moment", [name if name in FEW else pytest.param(name, marks=pytest.mark.faults) for name in DEATHS]
)
def test_an_extension_that_is_killed_leaves_whole_runs_and_goes_on(lab: Lab, moment: str) -> None:
    job = lab.job(*PLAIN, "training.epochs=1")
    assert job.go().code == 0
    job.overrides = [*PLAIN, "training.epochs=2"]
    more = ("--allow-change", "training.epochs")
    ended = job.go(DEATHS[moment], more=more)
    assert ended.code == -signal.SIGKILL, ended.output
    aside = job.folder / "run.old-1"
    if job.run.exists():
        assert of_one_run(lab, job.run) == (2 if aside.exists() else 1)
    if aside.exists():
        assert of_one_run(lab, aside) == 1
        assert json.loads((aside / "status.json").read_text())["state"] == "done"
    again = job.go(more=more)
    assert again.code == 0, again.output
    assert resumed_at(again.output) >= EPOCH
    finished(lab, job)
    assert of_one_run(lab, job.run) == 2
    assert of_one_run(lab, aside) == 1
    assert sorted(path.name for path in job.folder.iterdir()) == ["recipe.yaml", "run", "run.old-1"]


@pytest.mark.faults
def test_two_ranks_extend_a_run_bit_for_bit(lab: Lab) -> None:
    job = lab.job(*PLAIN, "training.epochs=1", ranks=2)
    assert job.go().codes == [0, 0]
    job.overrides = [*PLAIN, "training.epochs=2"]
    ended = job.go(more=("--allow-change", "training.epochs"))
    assert ended.codes == [0, 0], ended.output
    assert resumed_at(ended.output) == EPOCH
    finished(lab, job)


def test_what_cannot_be_extended_is_refused_and_left_as_it_is(lab: Lab) -> None:
    job = lab.job("training.epochs=1", "checkpoints=off")
    assert job.go().code == 0
    before = {path: path.read_bytes() for path in job.run.rglob("*") if path.is_file() and path.name != ".lock"}
    job.overrides = ["training.epochs=2"]
    ended = job.go(more=("--allow-change", "training.epochs"))
    assert ended.code == 9, ended.output
    for word in ("checkpoint-13 is not there", "--restart", "name another folder"):
        assert word in ended.output
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.faults
@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ("training.learning_rate=1e-4", 9, "nothing is left to train"),
        ("training.epochs=0.5", 9, "nothing is left to train"),
        ("data.train=nowhere.csv", 3, "nowhere.csv"),
    ],
)
def test_an_extension_that_fails_before_its_first_step_leaves_the_run_finished(
    lab: Lab, change: str, code: int, says: str
) -> None:
    job = lab.job(*PLAIN, "training.epochs=1")
    assert job.go().code == 0
    before = {path: path.read_bytes() for path in job.run.rglob("*") if path.is_file() and path.name != ".lock"}
    job.overrides = [*PLAIN, "training.epochs=1", change]
    key = change.partition("=")[0]
    more = ("--allow-change", key) if code == 9 else ()
    ended = job.go(more=more)
    assert ended.code == code, ended.output
    assert says in ended.output
    assert {path: path.read_bytes() for path in before} == before
    assert not (job.folder / "run.old-1").exists()
