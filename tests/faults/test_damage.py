"""Checkpoints that are damaged, lost, or older than they look: F25-F27, F37."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from faults.lab import Job, Lab
from faults.oracle import resume, resumed_at

FILES = (
    "MANIFEST.json",
    "trained.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "trainer_state.json",
    "progress.json",
    "rng_state_0.pt",
)


@pytest.fixture(scope="module")
def killed(lab: Lab) -> Job:
    """A run with the checkpoints of 10 and 15."""
    job = lab.job()
    assert job.go(["at", {"place": "step_end", "step": 18, "action": "die"}]).code == -signal.SIGKILL
    assert job.checkpoints == [10, 15]
    assert {path.name for path in job.checkpoint(15).iterdir()} == set(FILES)
    job.keep()
    return job


def flip(file: Path, share: float) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[min(int(len(content) * share), len(content) - 1)] ^= 1 << 3
    file.write_bytes(content)


def spoilt(lab: Lab, killed: Job, name: str, spoil: Callable[[Path], None]) -> None:
    killed.back()
    spoil(killed.checkpoint(15) / name)
    before = (killed.run / "metrics.jsonl").read_text()
    ended = resume(lab, killed, at=10, before=before)
    told = [line for line in ended.output.splitlines() if "checkpoint-15" in line]
    assert any(name in line for line in told), ended.output


# Of every file and bit: test_checkpoints.py.
@pytest.mark.parametrize(("name", "share"), [("MANIFEST.json", 0.0), ("trained.safetensors", 1.0)])
@pytest.mark.faults
def test_f25_one_flipped_bit_is_seen(lab: Lab, killed: Job, name: str, share: float) -> None:
    spoilt(lab, killed, name, lambda file: flip(file, share))


@pytest.mark.parametrize("name", ["MANIFEST.json", "progress.json"])
@pytest.mark.faults
def test_f26_a_lost_file_is_seen(lab: Lab, killed: Job, name: str) -> None:
    spoilt(lab, killed, name, Path.unlink)


def test_f25_f26_one_of_each(lab: Lab, killed: Job) -> None:
    spoilt(lab, killed, "optimizer.pt", lambda file: flip(file, 0.5))
    spoilt(lab, killed, "scheduler.pt", Path.unlink)


@pytest.mark.faults
def test_f27_no_whole_checkpoint_is_never_a_new_start(lab: Lab, killed: Job) -> None:
    killed.back()
    flip(killed.checkpoint(15) / "trained.safetensors", 0.7)
    (killed.checkpoint(10) / "optimizer.pt").unlink()
    before = (killed.run / "metrics.jsonl").read_bytes()
    ended = killed.go()
    assert ended.code == 9, ended.output
    for word in ("checkpoint-15", "trained.safetensors", "checkpoint-10", "optimizer.pt", "--restart"):
        assert word in ended.output
    assert "Traceback" not in ended.output
    assert (killed.run / "metrics.jsonl").read_bytes() == before
    assert killed.checkpoints == [10, 15]
    anew = killed.go(more=["--restart"])
    assert anew.code == 0, anew.output
    assert resumed_at(anew.output) == 0
    shutil.rmtree(killed.folder / "run.old-1")


@pytest.mark.faults
def test_f37_newest_means_the_highest_step_whatever_the_clock_says(lab: Lab, killed: Job) -> None:
    killed.back()
    for path in [killed.checkpoint(15), *killed.checkpoint(15).iterdir()]:
        os.utime(path, (0, 0))
    for path in [killed.checkpoint(10), *killed.checkpoint(10).iterdir()]:
        os.utime(path, (4e9, 4e9))
    resume(lab, killed, at=15, before=(killed.run / "metrics.jsonl").read_text())


@pytest.mark.faults
def test_f37_a_clock_that_went_back_blocks_nobody(lab: Lab, killed: Job) -> None:
    killed.back()
    status = killed.run / "status.json"
    beat = killed.status["heartbeat"]
    status.write_text(status.read_text().replace(beat, beat.replace("20", "21", 1)))
    resume(lab, killed, at=15, before=(killed.run / "metrics.jsonl").read_text())
