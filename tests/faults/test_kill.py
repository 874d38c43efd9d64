"""SIGKILL at any step, and the same command again: K1-K5, K10, K12, F10."""

from __future__ import annotations

import random
import signal
import sys
import time
from functools import partial

import pytest

from faults.lab import ROOT, STEPS, Child, Job, Lab
from faults.oracle import finished, readable, resume, resumed_at

PLACES = ("forward", "step_end", "logged")
KILLED = (1, 5, 6, 10, 14, 21, 25, 26)
"""Before and after the first checkpoint, in both epochs, in the last step; each place of a step comes up."""


def kill(place: str, step: int, rank: int | None = None) -> list[object]:
    return ["at", {"place": place, "step": step, "action": "die", "rank": rank}]


def last_save(place: str, step: int, every: int = 5) -> int:
    done = step if place == "logged" else step - 1
    return done if done == STEPS else done - done % every  # the last step is saved whatever its number


@pytest.mark.parametrize("step", [13, *(pytest.param(n, marks=pytest.mark.faults) for n in KILLED)])
def test_k1_killed_at_every_step_in_turn(lab: Lab, step: int) -> None:
    job, place = lab.job(), PLACES[step % 3]
    assert job.go(kill(place, step)).code == -signal.SIGKILL
    resume(lab, job, at=last_save(place, step))


@pytest.mark.parametrize(
    ("step", "victim"),
    [(3, 0), (14, 1), (26, None)],
)
@pytest.mark.faults
def test_k2_two_processes_killed(lab: Lab, step: int, victim: int | None) -> None:
    job = lab.job(ranks=2)
    children = job.fork(kill("step_end", step, victim))
    dead = children[victim or 0]
    assert dead.wait() == -signal.SIGKILL, dead.output
    for child in children:  # as a machine that goes down does
        if child.code is None and child is not dead and victim is not None:
            child.send(signal.SIGKILL)
    job.end(children)
    resume(lab, job, at=last_save("step_end", step))


def test_k2_two_processes_killed_once(lab: Lab) -> None:
    job = lab.job(ranks=2)
    assert job.go(kill("logged", 17)).codes == [-signal.SIGKILL] * 2
    resume(lab, job, at=15)


@pytest.mark.faults
@pytest.mark.parametrize("parts", [4, 2])
def test_k2_three_processes_add_up_in_the_same_order(lab: Lab, parts: int) -> None:
    # DDP's first step has another layout of gradients than those after it, unless it looks for unused parameters:
    # see training/trainer.py.
    job = lab.job(f"training.micro_batch={parts}", ranks=3)
    assert job.go(kill("logged", 13)).codes == [-signal.SIGKILL] * 3
    resume(lab, job, at=10)


@pytest.mark.faults
def test_k2_under_the_launcher(lab: Lab) -> None:
    config = str(ROOT / "accelerate_configs" / "cpu_2_processes.yaml")
    launcher = ("-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0")
    entry = (sys.executable, *launcher, str(ROOT / "tests" / "faults" / "entry.py"))
    job = lab.job(ranks=2)
    first = job.launch(*entry, plugins=[kill("logged", 17)])
    assert first.wait(120) == 1
    again = job.launch(*entry)
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert resumed_at(output) == 15
    finished(lab, job)


@pytest.mark.faults
def test_k1_from_outside_through_the_real_command_line(lab: Lab) -> None:
    job = lab.job()
    entry = (sys.executable, str(ROOT / "tests" / "faults" / "entry.py"))
    first = job.launch(*entry, plugins=[["slow", {"seconds": 0.1}]])
    job.until_step(12)
    first.kill()
    first.wait()
    before = (job.run / "metrics.jsonl").read_text()
    again = job.launch(sys.executable, "-m", "hf_finetune")
    output, _ = again.communicate(timeout=120)
    assert again.returncode == 0, output
    assert resumed_at(output) in (10, 15)
    assert (job.run / "metrics.jsonl").read_text()[:200] == before[:200]
    finished(lab, job)


@pytest.mark.faults
def test_k3_killed_five_times(lab: Lab) -> None:
    job, expected = lab.job(), [0, 0, 5, 10, 20]
    for step, begin in zip((4, 8, 13, 21, 25), expected, strict=True):
        ended = job.go(kill("step_end", step))
        assert ended.code == -signal.SIGKILL, ended.output
        assert resumed_at(ended.output) == begin
    resume(lab, job, at=20)


@pytest.mark.parametrize("micro_batch", [*(pytest.param(n, marks=pytest.mark.faults) for n in (8,)), 2])
def test_k4_accumulation_with_a_remainder(lab: Lab, micro_batch: int) -> None:
    job = lab.job(f"training.micro_batch={micro_batch}", "checkpoints.every=13")
    assert job.go(kill("forward", 26)).code == -signal.SIGKILL
    resume(lab, job, at=13)
    assert {line["step"]: line["loss"] for line in job.lines("train")}.keys() == set(range(1, STEPS + 1))


@pytest.mark.faults
def test_k5_at_the_boundary_of_an_epoch(lab: Lab) -> None:
    job = lab.job("checkpoints.every=epoch")
    assert job.go(kill("data", 14)).code == -signal.SIGKILL
    assert job.checkpoints == [13]
    resume(lab, job, at=13)


@pytest.mark.faults
def test_k5_after_the_last_step(lab: Lab) -> None:
    job = lab.job("checkpoints.every=13")
    assert job.go(kill("logged", 26)).code == -signal.SIGKILL
    resume(lab, job, at=26)


def test_k5_before_the_first_checkpoint(lab: Lab) -> None:
    job = lab.job()
    assert job.go(kill("step_end", 1)).code == -signal.SIGKILL
    ended = resume(lab, job, at=0)
    assert "--restart" not in ended.output


@pytest.mark.faults
def test_k10_logs_that_do_not_divide_the_checkpoints(lab: Lab) -> None:
    job = lab.job("training.log_every=7")
    assert job.go(kill("step_end", 17)).code == -signal.SIGKILL
    resume(lab, job, at=15)


def test_k12_warmup_and_cosine_go_on(lab: Lab) -> None:
    job = lab.job("training.schedule=cosine", "training.warmup_steps=12")
    assert job.go(kill("step_end", 11)).code == -signal.SIGKILL
    resume(lab, job, at=10)


@pytest.mark.faults
def test_k13_fifty_logged_steps_outlive_a_kill(lab: Lab) -> None:
    job = lab.job("training.epochs=4")
    assert job.go(kill("logged", 50)).code == -signal.SIGKILL
    assert [line["step"] for line in job.lines("train")] == list(range(1, 51))
    resume(lab, job, at=50)
    readable(job)


@pytest.mark.faults
def test_k14_the_same_loss_however_a_batch_is_cut(lab: Lab) -> None:
    whole = [lab.reference(["training.micro_batch=8", "adapter.dropout=0", "model.dropout=0"])]
    whole.append(lab.reference(["training.micro_batch=1", "adapter.dropout=0", "model.dropout=0"]))
    whole.append(lab.reference(["training.micro_batch=4", "adapter.dropout=0", "model.dropout=0"], ranks=2))
    losses = [[line["loss"] for line in job.lines("train")[:5]] for job in whole]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.faults
def test_f10_twenty_kills_at_random_times_in_one_run(lab: Lab) -> None:
    job, draw, begun = lab.job("training.epochs=40", "checkpoints.every=2"), random.Random(4), []
    for attempt in range(20):
        child = job.fork(["slow", {"seconds": 0.1}])[0]
        if attempt % 3:  # while it trains; else while it loads
            job.until(partial(trains, child))
        if attempt % 3 == 2:  # with some progress, however slow the disk is
            job.until(partial(commits, job, job.status["checkpoint"]))
        time.sleep(draw.uniform(0.0, 0.6))
        child.send(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, child.output
        begun.append(resumed_at(child.output))
    assert len(set(begun)) > 5
    resume(lab, job, at=None)


def trains(child: Child) -> bool:
    """Whether a run has taken a step since it was started."""
    return "\nstep " in child.output


def commits(job: Job, before: str | None) -> bool:
    """Whether a run has written another checkpoint than the one before."""
    return bool(job.status["checkpoint"] != before)


@pytest.mark.faults
def test_a_restart_keeps_the_killed_run_aside(lab: Lab) -> None:
    job = lab.job()
    assert job.go(kill("logged", 12)).code == -signal.SIGKILL
    before = (job.run / "metrics.jsonl").read_text()
    ended = job.go(more=["--restart"])
    assert ended.code == 0, ended.output
    assert resumed_at(ended.output) == 0
    assert (job.folder / "run.old-1" / "metrics.jsonl").read_text() == before
    finished(lab, job)
