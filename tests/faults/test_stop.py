"""A signal asks for a stop: all ranks agree, save and end with 143 (130): F14-F20."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faults.lab import ROOT, TESTS, Job, Lab
from faults.oracle import finished, resume, resumed_at

PLACES = ("forward", "data", "eval", "save")
STEP = 8
"""Where the signal comes; there is an evaluation."""
ENTRY = (sys.executable, str(ROOT / "tests" / "faults" / "entry.py"))
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch")
TWO = ("--config_file", str(ROOT / "accelerate_configs" / "cpu_2_processes.yaml"), "--main_process_port", "0")


def pause(job: Job, place: str, rank: int | None = None) -> list[Any]:
    """A rank stops at a place until the test says go."""
    files = {"ready": str(job.folder / "ready"), "go": str(job.folder / "go")}
    if place == "save":
        return [
            "saving",
            {
                "step": 10,
                "file": f"rng_state_{rank or 0}.pt",
                "when": "before",
                "action": "pause",
                "rank": rank,
                **files,
            },
        ]
    return ["at", {"place": place, "step": STEP, "action": "pause", "rank": rank, **files}]


def interrupt(job: Job, send: Callable[[], Any], wait: float = 0.3) -> None:
    """Send a signal while the run waits, and let it go on."""
    job.until(lambda: (job.folder / "ready").exists())
    send()
    time.sleep(wait)
    (job.folder / "go").touch()


def stopped(job: Job, code: int = 143, state: str = "preempted", name: str = "SIGTERM") -> int:
    """What a stopped run leaves; returns the step of its checkpoint."""
    status = job.status
    assert (status["state"], status["exit_code"], status["resumable"]) == (state, code, True)
    assert name in status["reason"]
    step: int = status["step"]
    assert job.checkpoints[-1] == step
    assert status["checkpoint"].endswith(f"checkpoint-{step}")
    assert not (job.run / "adapter").exists()
    return step


def expected(place: str) -> int:
    """The step whose end comes next: a save is finished first, and the next step taken."""
    return 11 if place == "save" else STEP


@pytest.mark.parametrize("place", ["forward", *(pytest.param(p, marks=pytest.mark.faults) for p in PLACES[1:])])
def test_f14_sigterm_to_one_process(lab: Lab, place: str) -> None:
    job = lab.job()
    children = job.fork(pause(job, place))
    interrupt(job, lambda: children[0].send(signal.SIGTERM))
    ended = job.end(children)
    assert ended.code == 143, ended.output
    step = stopped(job)
    assert step == expected(place)
    resume(lab, job, at=step)


@pytest.mark.parametrize("place", ["forward", *(pytest.param(p, marks=pytest.mark.faults) for p in PLACES[1:])])
def test_f15_sigterm_to_the_second_rank_only(lab: Lab, place: str) -> None:
    job = lab.job(ranks=2)
    children = job.fork(pause(job, place, rank=1))
    interrupt(job, lambda: children[1].send(signal.SIGTERM))
    ended = job.end(children)
    assert ended.codes == [143, 143], ended.output
    step = stopped(job)
    assert step == expected(place)
    resume(lab, job, at=step)


@pytest.mark.parametrize(("ranks", "place"), [(1, "forward"), (2, "forward"), (2, "save")])
@pytest.mark.faults
def test_f16_sigterm_to_the_launcher(lab: Lab, place: str, ranks: int) -> None:
    job = lab.job(ranks=ranks)
    launcher = (*LAUNCH, *(TWO if ranks == 2 else ("--cpu", "--num_processes", "1")), ENTRY[1])
    process = job.launch(*launcher, plugins=[pause(job, place, rank=0)], start_new_session=True)
    interrupt(job, process.terminate, wait=1.0)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0, output
    job.until(lambda: job.status["state"] != "running", 60)
    step = stopped(job)
    job.until(lambda: not orphans(job), 30)
    if place == "forward":
        again = job.launch(*launcher)
        output, _ = again.communicate(timeout=120)
        assert again.returncode == 0, output
        assert resumed_at(output) == step
        finished(lab, job)
    else:
        resume(lab, job, at=step)


@pytest.mark.parametrize("place", ["forward", "save"])
@pytest.mark.faults
def test_f17_sigterm_as_process_1(lab: Lab, place: str) -> None:
    job = lab.job()
    process = job.launch("unshare", "-pf", "--mount-proc", *ENTRY, plugins=[pause(job, place)])
    first = as_process_1(process)
    begun = time.monotonic()
    interrupt(job, lambda: os.kill(first, signal.SIGTERM))
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert time.monotonic() - begun < 60
    resume(lab, job, at=stopped(job))


@pytest.mark.faults
def test_f17_sigterm_to_a_launcher_of_two_that_is_process_1(lab: Lab) -> None:
    job = lab.job(ranks=2)
    process = job.launch("unshare", "-pf", "--mount-proc", *LAUNCH, *TWO, ENTRY[1], plugins=[pause(job, "forward", 0)])
    first = as_process_1(process)
    interrupt(job, lambda: os.kill(first, signal.SIGTERM), wait=1.0)
    process.communicate(timeout=60)
    resume(lab, job, at=stopped(job))


@pytest.mark.faults
def test_f17_as_process_1_the_launcher_of_one_hears_no_sigterm(lab: Lab) -> None:
    # accelerate 1.15 (`simple_launcher`) handles no signal, and the kernel drops those that process 1 does not handle.
    # Where this fails, docs/reliability.md may say so.
    job = lab.job()
    process = job.launch("unshare", "-pf", "--mount-proc", *LAUNCH, "--cpu", ENTRY[1], plugins=[pause(job, "forward")])
    first = as_process_1(process)
    interrupt(job, lambda: os.kill(first, signal.SIGTERM), wait=1.0)
    process.communicate(timeout=60)
    assert job.status["state"] == "done"


@pytest.mark.faults
def test_f18_a_second_sigterm_does_not_wait(lab: Lab) -> None:
    job = lab.job()
    children = job.fork(pause(job, "forward"))
    job.until(lambda: (job.folder / "ready").exists())
    children[0].send(signal.SIGTERM)
    time.sleep(1.0)
    children[0].send(signal.SIGTERM)
    assert children[0].wait(5) == 143
    assert job.status["state"] == "preempted"
    resume(lab, job, at=5)


@pytest.mark.faults
def test_f18_two_sigterms_in_a_save_leave_nothing_torn(lab: Lab) -> None:
    job = lab.job()
    children = job.fork(pause(job, "save"))
    job.until(lambda: (job.folder / "ready").exists())
    for _ in range(2):
        children[0].send(signal.SIGTERM)
        time.sleep(0.7)
    assert children[0].wait(5) == 143
    assert job.checkpoints == [5]
    resume(lab, job, at=5)


@pytest.mark.parametrize(("number", "code", "state"), [("SIGINT", 130, "interrupted"), ("SIGUSR1", 143, "preempted")])
@pytest.mark.faults
def test_f19_sigint_and_sigusr1(lab: Lab, number: str, code: int, state: str) -> None:
    job = lab.job()
    children = job.fork(pause(job, "forward"))
    interrupt(job, lambda: children[0].send(signal.Signals[number]))
    ended = job.end(children)
    assert ended.code == code, ended.output
    assert "Traceback" not in ended.output
    resume(lab, job, at=stopped(job, code, state, number))


def test_what_a_run_that_is_stopped_tells_to_type_resumes_it(lab: Lab) -> None:
    job = lab.job("training.epochs=1")
    stop = ["at", {"place": "step_end", "step": 7, "action": "die", "number": 2, "wait": 0}]
    ended = job.go(stop, more=["--restart"])
    assert ended.code == 130
    (told,) = [line for line in ended.output.splitlines() if "to resume from" in line]
    assert told.startswith("stopped by SIGINT at step 7; to resume from ")
    program, *words = shlex.split(told.partition(", run: ")[2])
    assert program == "hf-finetune"
    child = job.server.start(*words)
    assert child.wait() == 0, child.output
    assert resumed_at(child.output) == 7


@pytest.mark.faults
def test_f19_ctrl_c_in_a_terminal_reaches_both_ranks_and_the_launcher(lab: Lab) -> None:
    job = lab.job(ranks=2)
    job.overrides.append("--restart")
    process = job.launch(*LAUNCH, *TWO, ENTRY[1], plugins=[pause(job, "forward", rank=0)], start_new_session=True)
    interrupt(job, lambda: os.killpg(process.pid, signal.SIGINT), wait=1.0)
    output, _ = process.communicate(timeout=120)
    job.until(lambda: job.status["state"] != "running", 60)
    assert not orphans(job)
    step = stopped(job, 130, "interrupted", "SIGINT")
    job.overrides.clear()
    assert "to resume from" in output, output
    (command,) = re.findall(r"to resume from .*, run: (.*)", output)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(ROOT)])}
    again = subprocess.run(command, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stdout + again.stderr
    assert resumed_at(again.stdout) == step
    finished(lab, job)


@pytest.mark.faults
def test_f20_a_stopped_run_writes_no_adapter_and_can_be_stopped_again(lab: Lab) -> None:
    job, begun = lab.job(), []
    for step in (3, 9, 16):
        ended = job.go(["at", {"place": "forward", "step": step, "action": "die", "number": signal.SIGTERM, "wait": 0}])
        assert ended.code == 143, ended.output
        assert stopped(job) == step
        begun.append(resumed_at(ended.output))
    assert begun == [0, 3, 9]
    resume(lab, job, at=16)


@pytest.mark.faults
@pytest.mark.parametrize("wait", [0.0, 0.6])
def test_a_signal_before_training_ends_at_once(lab: Lab, wait: float) -> None:
    job = lab.job()
    children = job.fork(["slow", {"seconds": 0.05}])
    time.sleep(wait)
    children[0].send(signal.SIGTERM)
    code = children[0].wait(30)
    assert code in (143, -signal.SIGTERM), children[0].output
    resume(lab, job, at=None)


def orphans(job: Job) -> list[str]:
    """Processes that still have this job on their command line."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(job.recipe) in words:
            found.append(folder.name)
    return found


def as_process_1(process: subprocess.Popen[str]) -> int:
    """The process that `unshare` made the first one of its own namespace."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    deadline = time.monotonic() + 30
    while not children.read_text().split():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(children.read_text().split()[0])
