"""A real Slurm of two nodes: a job is submitted, preempted, queues up again and finishes with the same bits."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest
from faults.lab import ROOT, Job, Lab
from faults.oracle import finished, resume, resumed_at

from jobs.hosts import START, need_hosts
from jobs.slurm import Slurm, absent, cluster

pytestmark = pytest.mark.jobs
SCRIPT = str(ROOT / "deploy" / "slurm" / "finetune.sbatch")
LONG = ("data.cache=null", "training.epochs=8")
"""Long enough to be hit in the middle: 104 steps."""
STEP = 12


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A cluster of two nodes with one core each, a partition `low`, and one `high` that preempts it."""
    need_hosts(absent())
    with cluster(2, tmp_path_factory.mktemp("slurm")) as made:
        yield made


def submit(slurm: Slurm, job: Job, *options: str, **env: str) -> str:
    """Hand the job to Slurm, as its users do; returns its number."""
    own = {"HF_FINETUNE_PYTHON": sys.executable, "GLOO_SOCKET_IFNAME": "eth0", **job.env, **env}
    words = [
        "env",
        *(f"{name}={value}" for name, value in own.items()),
        "sbatch",
        "--parsable",
        f"--chdir={job.folder}",
    ]
    number = slurm.ask(*words, f"--output={job.folder}/log", *options, SCRIPT, *job.command).strip()
    assert number, slurm.told()
    return number


def log(job: Job) -> str:
    """All that the job has printed, over all of its starts."""
    file = job.folder / "log"
    return file.read_text(errors="replace") if file.exists() else ""


def ended(slurm: Slurm, job: Job, number: str) -> dict[str, str]:
    """Wait for the end of a job; how it ended."""

    def is_over() -> bool:
        return slurm.state(number).get("JobState", "") in ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")

    try:
        slurm.until(is_over, START)
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{log(job)}") from None
    return slurm.state(number)


def until_step(slurm: Slurm, job: Job) -> None:
    """Wait until the run is under way."""
    file = job.run / "metrics.jsonl"
    slurm.until(lambda: file.exists() and f'"step": {STEP},' in file.read_text(), START)


def until_stopped(slurm: Slurm, job: Job) -> int:
    """Wait until the run has stopped because of a signal; returns its step: the last one that was taken."""
    slurm.until(lambda: job.status["state"] != "running", START)
    status = job.status
    assert (status["state"], status["exit_code"]) == ("preempted", 143), f"{status}\n{log(job)}"
    step: int = status["step"]
    assert [line["step"] for line in job.lines("train")][-1] == job.checkpoints[-1] == step
    return step


def test_a_job_on_two_nodes_is_preempted_and_ends_with_the_same_bits(slurm: Slurm, lab: Lab) -> None:
    job = lab.job(*LONG, ranks=2)
    number = submit(slurm, job, "--nodes=2", "--partition=low")
    until_step(slurm, job)
    urgent = slurm.ask("sbatch", "--parsable", "--partition=high", "--nodes=2", "--output=/dev/null", "--wrap=true")
    step = until_stopped(slurm, job)
    state = ended(slurm, job, number)
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("COMPLETED", "0:0", "1"), log(job)
    assert slurm.state(urgent.strip())["JobState"] == "COMPLETED"
    assert f"exit code 143, job {number} queues up again" in log(job)
    assert resumed_at(log(job)) == step
    finished(lab, job)


def test_a_node_that_is_lost_starts_the_job_again_on_whole_ones(slurm: Slurm, lab: Lab) -> None:
    job = lab.job(*LONG, ranks=2)
    number = submit(slurm, job, "--nodes=2")
    until_step(slurm, job)
    slurm.power_off(slurm.made.hosts[1])
    slurm.until(lambda: slurm.state(number)["Restarts"] == "1", START)
    slurm.power_on(slurm.made.hosts[1])
    state = ended(slurm, job, number)
    assert (state["JobState"], state["Restarts"]) == ("COMPLETED", "1"), log(job)
    assert resumed_at(log(job)) > 0
    finished(lab, job)


def test_scancel_with_a_signal_asks_for_a_checkpoint_and_scancel_alone_for_the_end(slurm: Slurm, lab: Lab) -> None:
    job = lab.job(*LONG)
    number = submit(slurm, job)
    until_step(slurm, job)
    slurm.ask("scancel", "--signal=TERM", number)  # what `--signal` sends before the time limit
    step = until_stopped(slurm, job)
    slurm.until(lambda: f"at step {step}" in log(job).partition("queues up again")[2], START)
    slurm.ask("scancel", number)
    state = ended(slurm, job, number)
    assert (state["JobState"], state["Restarts"]) == ("CANCELLED", "1"), log(job)
    resume(lab, job, at=None)


def test_what_no_restart_can_help_is_not_started_again(slurm: Slurm, lab: Lab) -> None:
    job = lab.job("training.epochs=none")
    state = ended(slurm, job, submit(slurm, job))
    assert (state["JobState"], state["ExitCode"], state["Restarts"]) == ("FAILED", "2:0", "0"), log(job)
    assert "training.epochs" in log(job)


@pytest.mark.parametrize(
    ("kind", "expected"), [("nothing", "it is pyxis or apptainer"), ("apptainer", "name the image")]
)
def test_a_container_that_is_not_described_is_refused(slurm: Slurm, lab: Lab, kind: str, expected: str) -> None:
    job = lab.job()
    state = ended(slurm, job, submit(slurm, job, HF_FINETUNE_CONTAINER=kind))
    assert state["JobState"] == "FAILED"
    assert expected in log(job)


def stand_in(job: Job, name: str, script: str) -> str:
    """A PATH on which a program comes first that shows what it is asked to do."""
    file = job.folder / "bin" / name
    file.parent.mkdir()
    file.write_text(f'#!/bin/sh\necho "{name} $*"\n{script}\n')
    file.chmod(0o755)
    return f"{file.parent}:{os.environ['PATH']}"


def test_pyxis_is_asked_for_the_image_and_the_folders(slurm: Slurm, lab: Lab) -> None:
    # pyxis needs enroot, which Debian has not: what srun would be given is shown, and no more.
    job = lab.job()
    variables = {"HF_FINETUNE_CONTAINER": "pyxis", "HF_FINETUNE_IMAGE": "image.sqsh", "HF_FINETUNE_MOUNTS": "/mnt:/mnt"}
    state = ended(slurm, job, submit(slurm, job, PATH=stand_in(job, "srun", ":"), **variables))
    assert state["ExitCode"] == "0:0", log(job)
    folder = job.folder
    asked = f"--container-image=image.sqsh --container-mounts={folder}:{folder},/mnt:/mnt --container-workdir={folder}"
    assert asked in log(job)


def test_apptainer_runs_the_same_command_inside(slurm: Slurm, lab: Lab) -> None:
    # apptainer itself is not among Debian's packages: a program of its name shows what it is asked to do, and does it.
    job = lab.job()
    path = stand_in(job, "apptainer", 'while [ "$1" != image.sif ]; do shift; done; shift; exec "$@"')
    variables = {
        "HF_FINETUNE_CONTAINER": "apptainer",
        "HF_FINETUNE_IMAGE": "image.sif",
        "HF_FINETUNE_MOUNTS": "/mnt:/mnt",
    }
    state = ended(slurm, job, submit(slurm, job, PATH=path, **variables))
    assert state["ExitCode"] == "0:0", log(job)
    assert f"apptainer exec --nv --no-home --bind {job.folder},/mnt:/mnt --pwd {job.folder} image.sif" in log(job)
    finished(lab, job)
