"""F20, F28: nothing of a run that was stopped or has diverged is uploaded; what is finished later is, once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hubserver import Fault, Hub, serving
from pushing import REPO, TOKEN, environment

from faults.lab import Job, Lab


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty Hub."""
    with serving(TOKEN) as made:
        yield made


@pytest.fixture
def job(lab: Lab, hub: Hub, tmp_path: Path) -> Job:
    """A run that is to be uploaded."""
    env = {name: value for name, value in environment(hub.url, tmp_path).items() if name.startswith("HF_")}
    made = lab.job(f"hub.repo={REPO}")
    made.env.update(env)
    return made


@pytest.mark.faults
def test_f20_a_stopped_run_uploads_nothing_until_it_is_finished(job: Job, hub: Hub) -> None:
    for step in (3, 9):
        stop = {"place": "forward", "step": step, "action": "die", "number": signal.SIGTERM, "wait": 0}
        ended = job.go(["at", stop])
        assert ended.code == 143, ended.output
    assert hub.requests == []
    ended = job.go()
    assert ended.code == 0, ended.output
    assert len(hub.repos[REPO].log) == 2


@pytest.mark.faults
def test_f28_a_diverged_run_uploads_nothing(job: Job, hub: Hub) -> None:
    assert job.go(["poison", {"what": "loss", "value": "nan", "steps": [8]}]).code == 6
    assert hub.requests == []


@pytest.mark.faults
def test_a_signal_while_it_uploads_ends_with_8_and_the_run_is_done(job: Job, hub: Hub) -> None:
    hub.faults = [Fault(".", "hang", times=99)]
    (child,) = job.fork()
    job.until(lambda: hub.requests)
    child.send(signal.SIGTERM)
    assert child.wait() == 8, child.output
    assert (job.status["state"], job.status["exit_code"]) == ("done", 8)
    assert "stopped by SIGTERM; try it again with: hf-finetune push" in job.status["reason"]
