"""Disks that are full, read-only, or gone: F21-F24."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from faults.lab import Job, Lab
from faults.oracle import adapter_hash, exact, resume

root = pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting needs root")


@contextmanager
def small_disk(job: Job, size: str) -> Iterator[Path]:
    """A small file system over the folder of a job."""
    recipe = job.recipe.read_text()
    mount(job.folder, "-t", "tmpfs", "-o", f"size={size}", "none")
    try:
        job.recipe.write_text(recipe)
        yield job.folder
    finally:
        subprocess.run(["umount", "-l", str(job.folder)], check=True)


def mount(place: Path, *options: str) -> None:
    subprocess.run(["mount", *options, str(place)], check=True)


def fill(folder: Path, leave: int) -> str:
    """A command that fills a disk but for some KiB."""
    free = f"$(( $(df --output=avail -k {folder} | tail -1) - {leave} ))"
    return f"head -c {free}K /dev/zero > {folder}/filler"


@root
@pytest.mark.parametrize(
    ("step", "left"),
    [(8, 5), pytest.param(3, 0, marks=pytest.mark.faults)],
)
def test_f21_a_full_disk_ends_the_run_and_costs_nothing_else(lab: Lab, step: int, left: int) -> None:
    job = lab.job()
    with small_disk(job, "16m") as disk:
        command = fill(disk, 16)
        ended = job.go(["at", {"place": "forward", "step": step, "action": "shell", "command": command}])
        assert ended.code == 5, ended.output
        assert "bytes needed" in ended.output
        assert "free" in ended.output
        assert "Traceback" not in ended.output
        assert (job.checkpoints or [0])[-1] == left
        assert (job.status["state"], job.status["exit_code"]) == ("failed", 5)
        (disk / "filler").unlink()
        resume(lab, job, at=left)


@root
@pytest.mark.faults
def test_f21_a_disk_without_a_single_byte(lab: Lab) -> None:
    job = lab.job()
    with small_disk(job, "16m") as disk:
        command = f"head -c 100M /dev/zero > {disk}/filler; true"
        ended = job.go(["at", {"place": "forward", "step": 8, "action": "shell", "command": command}])
        assert ended.code == 5, ended.output
        assert job.checkpoints == [5]
        (disk / "filler").unlink()
        resume(lab, job, at=5)


@root
@pytest.mark.faults
def test_f21_two_processes_end_together_on_a_full_disk(lab: Lab) -> None:
    job = lab.job(ranks=2)
    with small_disk(job, "16m") as disk:
        ended = job.go(["at", {"place": "forward", "step": 8, "action": "shell", "command": fill(disk, 16), "rank": 0}])
        assert ended.codes == [5, 5], ended.output
        (disk / "filler").unlink()
        resume(lab, job, at=5)


@pytest.mark.faults
def test_f21_a_limit_on_the_size_of_files(lab: Lab) -> None:
    job = lab.job()
    ended = job.go(["at", {"place": "forward", "step": 8, "action": "limit", "name": "FSIZE", "value": 20_000}])
    assert ended.code == 5, ended.output
    assert job.checkpoints == [5]
    resume(lab, job, at=5)


@root
def test_f22_metrics_that_cannot_be_written_never_stop_training(lab: Lab) -> None:
    job = lab.job()
    disk, file = job.folder / "disk", job.run / "metrics.jsonl"
    disk.mkdir()
    mount(disk, "-t", "tmpfs", "-o", "size=16k", "none")
    command = f"mv {file} {disk} && ln -s {disk}/metrics.jsonl {file} && head -c 1M /dev/zero > {disk}/filler; true"
    try:
        ended = job.go(["at", {"place": "forward", "step": 8, "action": "shell", "command": command}])
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)
    assert ended.code == 0, ended.output
    told = [line for line in ended.output.splitlines() if "metrics.jsonl" in line and "warning" in line]
    assert len(told) == 1, ended.output
    assert adapter_hash(job) == adapter_hash(lab.reference(()))


@root
@pytest.mark.faults
def test_f22_a_full_disk_under_tensorboard_never_stops_training(lab: Lab) -> None:
    job = lab.job()
    board = job.run / "tensorboard"
    command = (
        f"mkdir -p {board} && mount -t tmpfs -o size=4k none {board} && head -c 4K /dev/zero > {board}/filler; true"
    )
    try:
        ended = job.go(["at", {"place": "start", "step": 0, "action": "shell", "command": command}])
    finally:
        subprocess.run(["umount", "-l", str(board)], check=False)
    assert ended.code == 0, ended.output
    told = [line for line in ended.output.splitlines() if "tensorboard" in line.lower() and "warning" in line]
    assert len(told) == 1, ended.output
    reference = lab.reference(())
    assert [exact(line) for line in job.lines("train")] == [exact(line) for line in reference.lines("train")]
    assert adapter_hash(job) == adapter_hash(reference)


@root
@pytest.mark.parametrize("kind", ["read-only", "a link to nowhere", "no permission"])
@pytest.mark.faults
def test_f23_an_output_that_cannot_be_written_is_told_before_the_model_is_loaded(lab: Lab, kind: str) -> None:
    job = lab.job()
    place = job.folder / "place"
    place.mkdir()
    job.overrides.append(f"output={place / 'run'}")
    before: tuple[str, ...] = ()
    if kind == "read-only":
        mount(place, "-t", "tmpfs", "-o", "ro,size=1m", "none")
    elif kind == "a link to nowhere":
        (place / "run").symlink_to(place / "nowhere" / "deep")
    else:
        place.chmod(0o555)
        before = (
            "setpriv",
            "--bounding-set=-dac_override,-dac_read_search",
            "--inh-caps=-dac_override,-dac_read_search",
        )
    try:
        process = job.launch(*before, sys.executable, "-m", "hf_finetune")
        output, _ = process.communicate(timeout=60)
    finally:
        if kind == "read-only":
            subprocess.run(["umount", str(place)], check=True)
    assert process.returncode == 5, output
    assert str(place) in output
    assert "parameters" not in output
    assert "Traceback" not in output


@root
@pytest.mark.faults
def test_f23_a_disk_that_becomes_read_only_while_training(lab: Lab) -> None:
    job = lab.job()
    with small_disk(job, "16m") as disk:
        command = f"mount --bind {disk} {disk} && mount -o remount,bind,ro {disk}"
        ended = job.go(["at", {"place": "forward", "step": 8, "action": "shell", "command": command}])
        assert ended.code == 5, ended.output
        assert "Traceback" not in ended.output
        again = job.go()
        assert again.code == 5, again.output
        subprocess.run(["umount", str(disk)], check=True)
        resume(lab, job, at=5)


@pytest.mark.faults
def test_f24_an_output_folder_that_is_deleted_is_told(lab: Lab) -> None:
    job = lab.job()
    ended = job.go(["at", {"place": "forward", "step": 8, "action": "remove", "path": str(job.run)}])
    assert ended.code == 5, ended.output
    assert "Traceback" not in ended.output
    assert "deleted" in ended.output
    resume(lab, job, at=0, before="")
