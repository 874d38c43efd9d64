"""A rank that dies, hangs or fails: F12, F13, F36."""

from __future__ import annotations

import signal
import sys
import time

import pytest

from faults.lab import ROOT, Job, Lab
from faults.oracle import resume

LAUNCH = (
    sys.executable, "-m", "accelerate.commands.launch", "--config_file",
    str(ROOT / "accelerate_configs" / "cpu_2_processes.yaml"), "--main_process_port", "0",
    str(ROOT / "tests" / "faults" / "entry.py"),
)  # fmt: skip
TIMEOUT = {"HF_FINETUNE_PEER_TIMEOUT": "5"}


def named(job: Job, rank: int) -> None:
    """The status says who is to blame."""
    status = job.status
    assert (status["state"], status["exit_code"]) == ("failed", 10)
    assert f"rank {rank}" in status["reason"]


@pytest.mark.parametrize(
    "place",
    ["forward", pytest.param("logged", marks=pytest.mark.faults), pytest.param("eval", marks=pytest.mark.faults)],
)
def test_f12_a_dead_rank_ends_the_run(lab: Lab, place: str) -> None:
    job = lab.job(ranks=2, **TIMEOUT)
    begun = time.monotonic()
    children = job.fork(["at", {"place": place, "step": 12 if place == "eval" else 13, "action": "die", "rank": 1}])
    assert children[1].wait() == -signal.SIGKILL
    assert children[0].wait(60) == 10, children[0].output
    assert time.monotonic() - begun < 60
    named(job, 1)
    job.env.clear()
    resume(lab, job, at=10)


@pytest.mark.faults
def test_f12_rank_0_dies(lab: Lab) -> None:
    job = lab.job(ranks=2, **TIMEOUT)
    children = job.fork(["at", {"place": "forward", "step": 13, "action": "die", "rank": 0}])
    assert children[0].wait() == -signal.SIGKILL
    assert children[1].wait(60) == 10, children[1].output
    assert "rank 0" in children[1].output
    job.env.clear()
    resume(lab, job, at=10)


@pytest.mark.parametrize("rank", [1, 0])
@pytest.mark.faults
def test_f13_a_rank_that_hangs_ends_the_run(lab: Lab, rank: int) -> None:
    job = lab.job(ranks=2, **TIMEOUT)
    begun = time.monotonic()
    children = job.fork(["at", {"place": "forward", "step": 13, "action": "freeze", "rank": rank}])
    other = children[1 - rank]
    assert other.wait(65) == 10, other.output
    assert time.monotonic() - begun < 65
    assert f"rank {rank}" in other.output
    children[rank].send(signal.SIGKILL)
    job.end(children)
    if rank == 1:
        named(job, 1)
    job.env.clear()
    resume(lab, job, at=10)


@pytest.mark.faults
def test_f13_under_the_launcher(lab: Lab) -> None:
    job = lab.job(ranks=2, **TIMEOUT)
    process = job.launch(*LAUNCH, plugins=[["at", {"place": "forward", "step": 13, "action": "freeze", "rank": 1}]])
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    named(job, 1)
    job.env.clear()
    resume(lab, job, at=10)


WORK = {
    "inference.saving.verify": 0,
    "reports.run.write": 0,
    "run.store.seal": 0,
    "pipeline.examine.choose": 0,
    "data.prepare.prepare": 1,
    "models.load.load": 1,
}
"""Function that one rank calls while the others wait -> a rank that calls it."""


@pytest.mark.parametrize(
    "function",
    [name if name == "inference.saving.verify" else pytest.param(name, marks=pytest.mark.faults) for name in WORK],
)
def test_f41_long_work_of_one_rank_ends_nobody(lab: Lab, function: str) -> None:
    limits = {"HF_FINETUNE_PEER_TIMEOUT": "4", "HF_FINETUNE_COLLECTIVE_TIMEOUT": "4"}
    job = lab.job(ranks=2, **limits)
    ended = job.go(["work", {"function": function, "action": "sleep", "rank": WORK[function], "seconds": 8}])
    assert ended.codes == [0, 0], ended.output
    assert job.status["state"] == "done"


@pytest.mark.faults
def test_f41_a_rank_that_dies_in_long_work_ends_the_others(lab: Lab) -> None:
    job = lab.job(ranks=2, **TIMEOUT)
    children = job.fork(["work", {"function": "inference.saving.verify", "action": "die", "rank": 0}])
    begun = time.monotonic()
    assert children[0].wait() == -signal.SIGKILL
    assert children[1].wait(60) == 10, children[1].output
    assert time.monotonic() - begun < 60
    assert "rank 0" in children[1].output
    assert (job.run / "adapter" / "adapter_model.safetensors").exists()
    job.env.clear()
    assert job.go().codes == [0, 0]


@pytest.mark.parametrize("error", ["hf_finetune.errors.DataError", "ValueError"])
@pytest.mark.faults
def test_f36_a_rank_that_fails_is_told_first(lab: Lab, error: str) -> None:
    job = lab.job(ranks=2, **TIMEOUT)
    plugin = [
        "at",
        {"place": "forward", "step": 13, "action": "fail", "error": error, "message": "row 7 is odd", "rank": 1},
    ]
    process = job.launch(*LAUNCH, plugins=[plugin])
    # The clock starts with training: three processes that load torch may take a busy machine a minute.
    while process.poll() is None and not (job.run / "metrics.jsonl").exists():
        time.sleep(0.1)
    begun = time.monotonic()
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 1, output
    assert time.monotonic() - begun < 60
    before, cause, _ = output.partition("row 7 is odd")
    assert cause
    assert "gloo" not in before.lower()
    assert "Connection closed" not in before
    assert job.status["state"] == "failed"
    assert "rank 1" in job.status["reason"]
    job.env.clear()
    resume(lab, job, at=10)
