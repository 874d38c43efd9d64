"""Ranks that watch each other: real processes that are killed, stopped, or end in an order of their own."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from hf_finetune.device import Machine
from hf_finetune.errors import CheckpointError, DataError, PeerError, RecipeError
from hf_finetune.pipeline.train import peer_failed
from hf_finetune.run.status import Status
from hf_finetune.training import peers
from hf_finetune.training.peers import Failure, Heartbeat, Watch, is_of_a_peer

RANK = """
import os, sys, threading, time
from pathlib import Path
from hf_finetune.errors import DataError, Problem
from hf_finetune.training import peers
from hf_finetune.training.peers import Watch

def tell(failure):
    (folder / f"told-{rank}").write_text(f"{failure.rank} {failure.exit_code} {failure.reason}")

def meet():
    (folder / f"here-{rank}").touch()
    while len(list(folder.glob("here-*"))) < size:
        time.sleep(0.02)

folder, rank, size, timeout = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
"""
WATCHED = """
with Watch(folder, "launch", rank, size, on_failure=tell, timeout=timeout) as watch:
    watch.progress(17, "training")
    meet()
"""
WAIT = "    time.sleep(60)"
GLOO = """
import torch
from torch import distributed
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
with Watch(folder, "launch", rank, size, on_failure=tell, timeout=timeout) as watch:
    watch.progress(17, "training")
    distributed.all_reduce(torch.ones(1))
    meet()
"""


class Launch:
    """Processes that act as the ranks of a run."""

    def __init__(self, folder: Path, *bodies: str, timeout: float = 60, before: str = WATCHED) -> None:
        self.folder = folder
        environment = os.environ | {"MASTER_PORT": folder.name, "OMP_NUM_THREADS": "1"}
        environment.pop("LOCAL_RANK", None)
        self.ranks = [
            subprocess.Popen(
                [sys.executable, "-c", RANK + before + body, str(folder), str(rank), str(len(bodies)), str(timeout)],
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank, body in enumerate(bodies)
        ]

    def meet(self) -> None:
        """Wait until all are inside their watch."""
        deadline = time.monotonic() + 60
        while len(list(self.folder.glob("here-*"))) < len(self.ranks) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(1.5)  # a beat and a look

    def end(self, rank: int) -> tuple[int, str]:
        """How a rank ended: exit code and stderr."""
        _, errors = self.ranks[rank].communicate(timeout=60)
        return self.ranks[rank].returncode, errors


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Launch]]:
    launches: list[Launch] = []

    def go(*bodies: str, timeout: float = 60, before: str = WATCHED) -> Launch:
        launches.append(Launch(tmp_path, *bodies, timeout=timeout, before=before))
        return launches[-1]

    yield go
    for rank in (rank for one in launches for rank in one.ranks):
        rank.kill()
        rank.communicate()


Start = Callable[..., Launch]


def test_a_killed_rank_is_named_once_and_all_others_end(start: Start, tmp_path: Path) -> None:
    run = start(WAIT, WAIT, WAIT)
    run.meet()
    began = time.monotonic()
    run.ranks[1].kill()
    (code, said), (other_code, other_said) = run.end(0), run.end(2)
    assert time.monotonic() - began < 10
    who = f"rank 1 ({socket.gethostname()}, process {run.ranks[1].pid})"
    line = f"{who} died after step 17, while training; resume with the same command"
    assert (code, other_code, said + other_said) == (10, 10, f"hf_finetune: error: {line}\n")
    assert [(tmp_path / f"told-{rank}").read_text() for rank in (0, 2)] == [f"1 10 {line}"] * 2


def test_a_stopped_rank_is_given_up_after_its_time(start: Start) -> None:
    run = start("    watch.progress(18, 'training')\n" + WAIT, WAIT, timeout=2)
    run.meet()
    run.ranks[1].send_signal(signal.SIGSTOP)
    code, said = run.end(0)
    assert code == 10
    assert "has not answered for 2 s (it is stopped by a signal), last after step 17, while training" in said
    assert "last step of each: 17 (rank 1), 18 (rank 0); resume with the same command" in said
    run.ranks[1].send_signal(signal.SIGCONT)
    assert run.end(1) == (10, "")


def test_ranks_that_were_all_stopped_go_on(start: Start) -> None:
    work = "    for _ in range(20): time.sleep(0.1)"
    run = start(work, work, timeout=2)
    run.meet()
    for number, pause in ((signal.SIGSTOP, 3), (signal.SIGCONT, 0)):
        for rank in run.ranks:
            rank.send_signal(number)
        time.sleep(pause)
    assert [run.end(0), run.end(1)] == [(0, ""), (0, "")]


def test_an_error_of_one_rank_ends_the_others_with_that_error(start: Start, tmp_path: Path) -> None:
    run = start(WAIT, "    raise DataError(Problem('label 7 is not among the 2', file='train.csv', line=3))")
    code, said = run.end(0)
    reason = "rank 1: train.csv:3: label 7 is not among the 2"
    assert (code, said) == (3, f"hf_finetune: error: {reason}\n")
    assert (tmp_path / "told-0").read_text() == f"1 3 {reason}"


def test_the_first_rank_says_its_own_error_itself(start: Start) -> None:
    run = start("    raise DataError('no rows')", WAIT)
    assert run.end(1) == (3, "")
    assert "no rows" in run.end(0)[1]


def test_an_unforeseen_error_is_told_too(start: Start) -> None:
    run = start(WAIT, "    {}['x']")
    assert run.end(0) == (1, "hf_finetune: error: rank 1: KeyError: 'x'\n")


@pytest.mark.parametrize("late", [0, 1])
def test_a_normal_end_is_no_failure(start: Start, late: int) -> None:
    run = start(*("    time.sleep(1.5)" if rank == late else "    pass" for rank in range(2)))
    assert [run.end(0), run.end(1)] == [(0, ""), (0, "")]


def test_an_agreed_stop_is_no_failure(start: Start) -> None:
    run = start("    time.sleep(1.5); sys.exit(143)", "    sys.exit(143)")
    assert [run.end(0), run.end(1)] == [(143, ""), (143, "")]


def test_whoever_is_stopped_because_a_peer_died_names_the_peer(start: Start) -> None:
    # A launcher sends SIGTERM to all ranks when one is gone.
    run = start("    os.kill(int((folder / 'pid').read_text()), 9); time.sleep(0.1); sys.exit(143)", WAIT, before=PID)
    code, said = run.end(0)
    assert (code, "rank 1" in said, "died" in said) == (10, True, True)


PID = WATCHED.replace("    meet()", "    (folder / 'pid').write_text(str(os.getpid())) if rank else 0; meet()")


def test_a_hung_main_thread_is_found_by_a_rank_that_waits_in_gloo(start: Start) -> None:
    hang = "    threading.Event().wait()"
    run = start("    distributed.all_reduce(torch.ones(1))", hang, before=GLOO, timeout=3)
    code, said = run.end(0)
    assert code == 10
    assert "rank 1 (" in said
    assert "has made no progress for" in said
    assert "after step 17, while training, at threading.py:" in said
    assert run.end(1) == (10, "")


def test_gloo_makes_no_noise_about_a_killed_rank(start: Start, tmp_path: Path) -> None:
    run = start("    distributed.all_reduce(torch.ones(1))", WAIT, before=GLOO)
    run.meet()
    run.ranks[1].kill()
    code, said = run.end(0)
    assert code == 10, said[-3000:]
    assert re.findall(r"error: rank 1 \(.*\) (died after step 17, while training)", said) == [
        "died after step 17, while training"
    ]
    assert not re.search("Traceback|gloo|by peer", said), said
    assert (tmp_path / "told-0").read_text().startswith("1 10 rank 1")


NODES = """
peers._machine = lambda: f"machine {rank // 8}"
os.environ |= {"LOCAL_RANK": str(rank % 8), "LOCAL_WORLD_SIZE": "8"}
"""
"""Ranks that take each eight of themselves for one machine."""


@pytest.mark.slow
def test_of_many_ranks_the_machine_of_a_killed_one_notices_and_the_others_hear_of_it(start: Start) -> None:
    run = start(*[WAIT] * 16, before=NODES + WATCHED)
    run.meet()
    began = time.monotonic()
    run.ranks[5].kill()
    ends = [run.end(rank) for rank in range(16) if rank != 5]
    assert time.monotonic() - began < 20  # and no rank has been silent for sixty seconds
    assert [code for code, _ in ends] == [10] * 15
    (named,) = {line for _, said in ends for line in said.splitlines()}
    assert "rank 5 (" in named
    assert sum(bool(said) for _, said in ends) == 2  # one a machine


@pytest.mark.slow
def test_of_many_ranks_a_hanging_one_ends_them_all(start: Start) -> None:
    work = "    for _ in range(600): watch.progress(18, 'training'); time.sleep(0.1)"
    run = start(
        *[work] * 15, "    os.kill(os.getpid(), signal.SIGSTOP)", before=NODES + "import signal" + WATCHED, timeout=4
    )
    run.meet()
    ends = [run.end(rank) for rank in range(15)]
    assert [code for code, _ in ends] == [10] * 15
    assert all("rank 15 (" in line for _, said in ends for line in said.splitlines())
    run.ranks[15].send_signal(signal.SIGCONT)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4"), True),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1000ms for recv"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] writev [127.0.0.1]:4: Broken pipe"), True),
        (PeerError("rank 1 did not answer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError("Connection reset by peer"), False),
        (CheckpointError("Connection closed"), False),
        (DataError("x"), False),
    ],
)
def test_errors_of_communication_are_known(error: Exception, expected: bool) -> None:
    assert is_of_a_peer(error) is expected


def test_torchs_own_errors_of_communication_are_known() -> None:
    from torch import distributed

    assert all(is_of_a_peer(kind("x")) for kind in (distributed.DistBackendError, distributed.DistStoreError))


@pytest.mark.parametrize(
    ("rank", "local_rank", "lost", "said", "writes"),
    [
        (0, 0, 2, "running", True),
        (0, 0, 0, "failed", True),  # rank 0 does not know who is lost
        (1, 1, 0, "running", True),
        (8, 0, 0, "running", True),  # the first node is lost, with all of its ranks
        (8, 0, 8, "running", True),
        (8, 0, 8, "failed", False),
        (9, 1, 0, "running", False),
        (8, 0, 2, "running", False),  # rank 0 lives, and says it
        (8, 0, 0, "", False),  # the folder is on a disk of another node
    ],
)
def test_who_says_in_the_status_that_a_peer_failed(
    tmp_path: Path, rank: int, local_rank: int, lost: int, said: str, *, writes: bool
) -> None:
    file = tmp_path / "status.json"
    if said:
        file.write_text(json.dumps({"state": said}))
    machine = Machine("cpu", rank, local_rank, 16, 8, 1, "fp32", "eager")
    peer_failed(Status(file), machine, Failure(lost, "it is gone", 10))
    assert (file.exists() and "it is gone" in file.read_text()) == writes


@pytest.mark.parametrize("text", ["soon", "0", "-1", "inf", "nan", ""])
def test_the_time_limit_is_a_positive_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("HF_FINETUNE_PEER_TIMEOUT", text)
    with pytest.raises(RecipeError, match="HF_FINETUNE_PEER_TIMEOUT is"):
        Watch(tmp_path, "launch", 0, 2, on_failure=lambda failure: None)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Rank 0 of two, whose thread does not run."""
    monkeypatch.setattr(Watch, "_run", lambda this: None)
    return Watch(tmp_path, "launch", 0, 2, on_failure=lambda failure: None, timeout=5).__enter__()


def beat(this: Watch, **changes: Any) -> None:
    """Rank 1 of another machine writes its file."""
    told = replace(Heartbeat(1, "elsewhere", "another machine", 4711, "1"), **changes)
    (this.folder / "1.json").write_text(json.dumps(asdict(told)))


def test_a_rank_of_another_machine_is_given_up_when_its_file_no_longer_changes(alone: Watch) -> None:
    beat(alone, count=1)
    assert alone._look(100, 5, is_waiting=False) is None
    assert alone._look(4, 5, is_waiting=False) is None
    beat(alone, count=2)
    assert alone._look(4, 5, is_waiting=False) is None
    (alone.folder / "1.json").write_text('{"rank": 1')  # half a file is no news
    failure = alone._look(8, 5, is_waiting=False)
    assert failure is not None
    assert "rank 1 (elsewhere, process 4711) has not answered for 8 s" in failure.reason
    (alone.folder / "1.json").unlink()
    assert alone._look(8, 5, is_waiting=False) is None


def test_a_process_number_that_is_used_again_is_a_death(alone: Watch) -> None:
    beat(alone, machine=alone._own.machine, pid=alone._own.pid, started=alone._own.started)
    assert alone._look(1, 5, is_waiting=False) is None
    beat(alone, machine=alone._own.machine, pid=alone._own.pid, started="1", count=1)
    failure = alone._look(1, 5, is_waiting=False)
    assert failure is not None
    assert "died after step 0" in failure.reason


def test_an_idle_rank_is_to_blame_where_this_one_waits_and_it_does_not(alone: Watch) -> None:
    idle = {"idle": 700.0, "place": "loader.py:41 (fetch)", "step": 17, "phase": "training"}
    beat(alone, count=1, waits=True, **idle)
    assert alone._look(1, 5, is_waiting=True) is None
    beat(alone, count=2, allowed=900.0, **idle)
    assert alone._look(1, 5, is_waiting=True) is None
    beat(alone, count=3, **idle)
    assert alone._look(1, 5, is_waiting=False) is None
    failure = alone._look(1, 5, is_waiting=True)
    assert failure is not None
    assert "no progress for 700 s after step 17, while training, at loader.py:41 (fetch); last step" in failure.reason


def test_a_stop_that_was_not_agreed_on_ends_a_rank_that_waits_in_vain(alone: Watch) -> None:
    left = Failure(1, "rank 1: stopped by SIGTERM", 143, is_stop=True)
    assert alone._record(left)
    assert alone._recorded(60) is None
    alone._own = replace(alone._own, waits=True, idle=31.0)
    assert alone._recorded(1) == left


def test_an_error_is_traced_to_the_rank_behind_it(alone: Watch) -> None:
    told = Failure(1, "rank 1: a\nrank 1: b", 3, is_own=True)
    assert alone._record(told)
    assert not alone._record(Failure(0, "later", 10))
    assert alone._cause(RuntimeError("Connection closed by peer")) == told
    assert alone._cause(ValueError("x")) is None


def test_a_node_that_lost_its_power_is_named_when_connections_break(alone: Watch) -> None:
    beat(alone, count=1)
    failure = alone._cause(RuntimeError("Connection closed by peer [10.0.0.2]:7"))
    assert failure is not None
    assert (failure.rank, failure.exit_code) == (1, 10)
    assert "rank 1 (elsewhere, process 4711) has not answered" in failure.reason
    assert json.loads((alone.folder / "0.json").read_text())["count"] > 2  # and so is not blamed itself


def test_a_lost_connection_without_a_culprit_says_where_the_ranks_are(
    alone: Watch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "LOST_S", 0.1)
    found = alone._cause(RuntimeError("Connection closed by peer [10.0.0.2]:4\nmore"))
    assert found is not None
    assert found.reason == (
        "rank 0 lost the others after step 0, while starting: Connection closed by peer [10.0.0.2]:4; "
        "last step of each: 0 (rank 0); resume with the same command"
    )


def test_one_process_has_nobody_to_watch(tmp_path: Path) -> None:
    with Watch(tmp_path, "launch", 0, 1, on_failure=lambda failure: None) as this:
        this.progress(1, "training")
    assert list(tmp_path.iterdir()) == []


def test_what_earlier_launches_left_goes(tmp_path: Path) -> None:
    (tmp_path / ".ranks" / "old").mkdir(parents=True)
    for name in ("7.json", "old/failure.json"):
        (tmp_path / ".ranks" / name).touch()
    with Watch(tmp_path, "launch", 0, 2, on_failure=lambda failure: None):
        pass
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == [".ranks", ".ranks/launch"]


def test_many_ranks_hardly_touch_the_shared_folder(tmp_path: Path) -> None:
    assert Watch(tmp_path, "launch", 17, 512, on_failure=lambda failure: None).every > 10


def test_a_run_folder_that_is_gone_accuses_nobody(alone: Watch) -> None:
    beat(alone)
    alone._look(0, 5, is_waiting=False)
    alone.folder.parent.rename(alone.folder.parent.with_name("away"))
    assert not alone._show(1)
    assert alone._look(100, 5, is_waiting=False) is None


def test_progress_costs_nothing(alone: Watch) -> None:
    began = time.perf_counter()
    for step in range(10_000):
        alone.progress(step, "training")
    assert (time.perf_counter() - began) / 10_000 < 20e-6
