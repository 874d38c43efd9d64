"""Several nodes: real launchers on hosts that are network namespaces, and what happens when one of them is lost."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from faults.lab import Job, Lab
from faults.oracle import finished, resume, resumed_at

from jobs.hosts import START, Network, Nodes, need_hosts, network

pytestmark = pytest.mark.jobs
OWN = "data.cache=null"
"""The cache of each host is where its `HF_FINETUNE_CACHE` says."""
PLAIN = ("adapter.dropout=0", "model.dropout=0")
"""Random numbers belong to a rank: one rank and two see the same only without."""
STEP = 13
TIMEOUT_S = 30
PATIENCE = 90.0
"""Seconds that the end of a run may take, on a busy machine, beyond its time limit."""
LIMITS = {"HF_FINETUNE_PEER_TIMEOUT": str(TIMEOUT_S), "HF_FINETUNE_COLLECTIVE_TIMEOUT": str(TIMEOUT_S)}


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Callable[[int], Network]]:
    """Makes a network of so many hosts."""
    need_hosts()
    with ExitStack() as stack:
        yield lambda count: stack.enter_context(network(count, tmp_path))


def pause(job: Job, rank: int) -> list[Any]:
    """A rank waits in a step until the test says go."""
    files = {"ready": str(job.folder / "ready"), "go": str(job.folder / "go")}
    return ["at", {"place": "forward", "step": STEP, "action": "pause", "rank": rank, **files}]


def paused(job: Job, nodes: Nodes) -> None:
    """Wait until it does."""
    try:
        job.until((job.folder / "ready").exists, START)
    except TimeoutError:
        raise AssertionError(nodes.output) from None


def lost(job: Job, nodes: Nodes, reason: str) -> None:
    """The hosts that are left have ended by themselves, and the status says why."""
    status = job.status
    assert (status["state"], status["exit_code"], status["resumable"]) == ("failed", 10, True), nodes.output
    assert reason in status["reason"], status["reason"]


def test_two_nodes_compute_what_two_processes_and_one_compute(lab: Lab, hosts: Callable[[int], Network]) -> None:
    made = hosts(2)
    job = lab.job(OWN, *PLAIN, ranks=2)
    nodes = Nodes(job, made.hosts)
    assert nodes.wait() == [0, 0], nodes.output
    finished(lab, job)
    for line, expected in zip(job.lines("train"), lab.reference([OWN, *PLAIN]).lines("train"), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    for host in made.hosts:
        assert len(list((host.folder / "cache" / "encoded").iterdir())) == 1


def test_a_node_of_three_that_loses_its_power_ends_the_others(lab: Lab, hosts: Callable[[int], Network]) -> None:
    job = lab.job(OWN, ranks=3, **LIMITS)
    nodes = Nodes(job, hosts(3).hosts, [pause(job, 2)])
    paused(job, nodes)
    nodes.kill(2)
    assert nodes.wait(TIMEOUT_S + PATIENCE)[:2] == [1, 1], nodes.output
    lost(job, nodes, "rank 2 (node3, process ")
    job.env.clear()
    resume(lab, job, at=10)


def test_the_first_node_loses_its_power_and_the_job_goes_on_where_it_was(
    lab: Lab, hosts: Callable[[int], Network]
) -> None:
    job, made = lab.job(OWN, ranks=2, **LIMITS), hosts(2)
    nodes = Nodes(job, made.hosts, [pause(job, 0)])
    paused(job, nodes)
    nodes.kill(0)
    assert nodes.wait(TIMEOUT_S + PATIENCE)[1] == 1, nodes.output
    lost(job, nodes, "rank 0 (node1, process ")
    again = Nodes(job, made.hosts)
    assert again.wait() == [0, 0], again.output
    assert resumed_at(again.output) == 10
    finished(lab, job)


def test_a_cut_network_ends_both_sides_and_a_slow_one_does_not(lab: Lab, hosts: Callable[[int], Network]) -> None:
    job, made = lab.job(OWN, ranks=2, **LIMITS), hosts(2)
    nodes = Nodes(job, made.hosts, [pause(job, 1)])
    paused(job, nodes)
    made.plug(made.hosts[1], is_in=False)
    begun = time.monotonic()
    (job.folder / "go").touch()
    assert nodes.wait(TIMEOUT_S + PATIENCE) == [1, 1], nodes.output
    assert time.monotonic() - begun >= TIMEOUT_S  # nothing but the time limit tells
    lost(job, nodes, " lost the others after step 12")  # whoever waited first says so, and is heard by the other
    assert "look at the network between the nodes" in job.status["reason"]
    made.plug(made.hosts[1], is_in=True)
    made.slow(made.hosts[1], "400kbit")
    job.env.clear()
    again = Nodes(job, made.hosts)
    assert again.wait() == [0, 0], again.output
    assert resumed_at(again.output) == 10
    assert made.held_back(made.hosts[1]) > 10
    finished(lab, job)


def test_nodes_with_disks_of_their_own_lose_one_and_go_on(lab: Lab, hosts: Callable[[int], Network]) -> None:
    job, made = lab.job(OWN, ranks=2, **LIMITS), hosts(2)
    nodes = Nodes(job, made.hosts, [pause(job, 1)], own_disks=True)
    paused(job, nodes)
    nodes.kill(1)
    assert nodes.wait(TIMEOUT_S + PATIENCE)[0] == 1, nodes.output
    lost(job, nodes, "rank 0 lost the others after step 12")
    again = Nodes(job, made.hosts, own_disks=True)
    assert again.wait() == [0, 0], again.output
    assert resumed_at(again.output) == 10
    finished(lab, job)
    other = again.disk(made.hosts[1])
    assert sorted(path.name for path in (other / "checkpoints").iterdir()) == [
        f"checkpoint-{n}" for n in job.checkpoints
    ]
    assert not (other / "status.json").exists()


def test_sigterm_to_one_node_stops_all_of_them_at_the_same_step(lab: Lab, hosts: Callable[[int], Network]) -> None:
    job, made = lab.job(OWN, ranks=2), hosts(2)
    nodes = Nodes(job, made.hosts, [pause(job, 1)])
    paused(job, nodes)
    nodes.terminate(1)
    time.sleep(2.0)
    (job.folder / "go").touch()
    assert nodes.wait(PATIENCE) == [1, 1], nodes.output
    status = job.status
    assert (status["state"], status["exit_code"], status["step"]) == ("preempted", 143, STEP), nodes.output
    resume(lab, job, at=STEP)
