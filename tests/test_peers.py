"""Ranks that watch each other: real processes that are killed, stopped, or end in an order of their own."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from hf_finetune import session
from hf_finetune.errors import CheckpointError, DataError, PeerError, Problem, RecipeError
from hf_finetune.hardware import Machine
from hf_finetune.peers import Failure, Watch, is_of_a_peer, process, verdict, watch
from hf_finetune.peers.beat import Beat, launch
from hf_finetune.peers.process import Process, uptime
from hf_finetune.peers.verdict import Peer
from hf_finetune.runfolder import Status

RANK = """
import os, sys, threading, time
from pathlib import Path
from hf_finetune.errors import DataError, Problem
from hf_finetune.peers import Watch

def tell(failure):
    (folder / f"told-{rank}").write_text(f"{failure.rank} {failure.exit_code} {failure.reason}")

def meet():
    (folder / f"here-{rank}").touch()
    while len(list(folder.glob("here-*"))) < size:
        time.sleep(0.02)

folder, rank, size, timeout = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
"""
WATCHED = """
with Watch(folder, rank, size, tell, timeout) as watch:
    watch.progress(17, "training")
    meet()
"""
WAIT = "    time.sleep(60)"
GLOO = """
import torch
from torch import distributed
distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
with Watch(folder, rank, size, tell, timeout) as watch:
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
        time.sleep(0.7)

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


@pytest.mark.slow
def test_a_hung_main_thread_is_found_by_a_rank_that_waits_in_gloo(start: Start) -> None:
    hang = "    threading.Event().wait()"
    run = start("    distributed.all_reduce(torch.ones(1))", hang, before=GLOO, timeout=3)
    code, said = run.end(0)
    assert code == 10
    assert "rank 1 (" in said
    assert "has made no progress for" in said
    assert "after step 17, while training, at threading.py:" in said
    assert run.end(1) == (10, "")


@pytest.mark.slow
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
from dataclasses import replace
from hf_finetune.peers import process
own = replace(process.Process.own(), machine=f"machine {rank // 8}")
process.Process.own = classmethod(lambda cls: own)
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


def test_many_ranks_hardly_touch_the_shared_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touched: list[str] = []
    read, write = Path.read_text, Beat.write

    def noted_read(path: Path, **options: str) -> str:
        touched.extend(["read"] if path.parent.name == ".ranks" else [])
        return read(path, **options)

    def noted_write(told: Beat, file: Path) -> bool:
        touched.append("write")
        return write(told, file)

    monkeypatch.setattr(Path, "read_text", noted_read)
    monkeypatch.setattr(Beat, "write", noted_write)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with Watch(tmp_path, 17, 512, lambda failure: None) as this:
        for step in range(40):
            this.progress(step, ("training", "evaluating")[step // 4 % 2])
            time.sleep(0.1)
        # Ten reads and one write in ten seconds; one write more is the first of all.
        assert (touched.count("read") <= 5, touched.count("write")) == (True, 1)


def test_every_rank_is_watched_by_others_and_word_reaches_all_in_a_few_readings() -> None:
    for size in (2, 10, 11, 96, 500, 512):
        watched = [watch._watched(rank, size)[0] for rank in range(size)]
        assert max(map(len, watched)) <= 10
        knows, rounds = {size // 3}, 0
        while len(knows) < size:
            knows |= {rank for rank in range(size) if knows & watched[rank].keys()}
            rounds += 1
        assert rounds <= 9


def test_what_an_earlier_launch_left_counts_for_nothing(start: Start, tmp_path: Path) -> None:
    start(WAIT, "    raise DataError('old')").end(0)
    for file in tmp_path.glob("here-*"):
        file.unlink()
    run = start("    time.sleep(1)", "    pass", before="if rank: time.sleep(1)\n" + WATCHED)
    assert [run.end(0), run.end(1)] == [(0, ""), (0, "")]


def test_the_same_process_number_is_not_the_same_process() -> None:
    own = Process.own()
    assert not own.is_gone()
    assert replace(own, started=own.started - 1).is_gone()


def test_a_process_that_nobody_waited_for_is_gone() -> None:
    child = subprocess.Popen(["sleep", "60"])
    known = replace(Process.own(), pid=child.pid, started=int(process._stat(child.pid)[19]))
    assert not known.is_gone()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert known.is_gone()
    child.wait()


def beat(**changes: object) -> Beat:
    """A rank of another machine."""
    elsewhere = Process("elsewhere", "another machine", 4711, 1)
    return replace(Beat(launch(), 1, elsewhere, count=1, written=uptime()), **changes)  # type: ignore[arg-type]


def alone(tmp_path: Path) -> Watch:
    """Rank 0 of two, not started."""
    (tmp_path / ".ranks").mkdir()
    return Watch(tmp_path, 0, 2, lambda failure: None, timeout=5)


def test_a_rank_of_another_machine_counts_once_it_has_been_seen_to_beat(tmp_path: Path) -> None:
    this = alone(tmp_path)
    beat(count=1).write(tmp_path / ".ranks" / "1.json")
    this._look(passed=100)
    assert this._sure(patient=True) is None
    beat(count=2).write(tmp_path / ".ranks" / "1.json")
    this._look(passed=4)
    assert this._sure(patient=True) is None
    this._look(passed=4)
    failure = this._sure(patient=True)
    assert failure is not None
    assert "rank 1 (elsewhere, process 4711) has not answered for 8 s" in failure.reason


def test_a_damaged_file_is_no_news(tmp_path: Path) -> None:
    this = alone(tmp_path)
    for text in ("", "[]", "{}", '{"launch": 1}', "null"):
        (tmp_path / ".ranks" / "1.json").write_text(text)
        this._look(passed=100)
    assert this._peers == {}


def test_a_beat_survives_its_file(tmp_path: Path) -> None:
    told = beat(failure=Failure(2, "rank 2: x", 3), state="failed")
    assert told.write(tmp_path / "1.json")
    assert Beat.read(tmp_path / "1.json") == told


def test_a_run_folder_that_is_gone_accuses_nobody(tmp_path: Path) -> None:
    this = alone(tmp_path)
    this._peers[1] = Peer(beat(), is_here=False, is_known=True)
    (tmp_path / ".ranks").rename(tmp_path / "away")
    assert not this._show()
    this._look(passed=100)
    assert this._sure(patient=True) is None


def test_waiting_ranks_accuse_no_waiting_rank() -> None:
    own, peer = beat(rank=0, idle=700.0, waits=True), Peer(beat(idle=700.0, waits=True), is_here=False, is_known=True)
    assert list(verdict.sure({1: peer}, own, 600, patient=True)) == []
    peer.beat = replace(peer.beat, waits=False, place="loader.py:41 (fetch)", step=17, phase="training")
    (failure,) = verdict.sure({1: peer}, own, 600, patient=True)
    assert "no progress for 700 s after step 17, while training, at loader.py:41 (fetch)" in failure.reason
    assert list(verdict.sure({1: peer}, replace(own, waits=False), 600, patient=True)) == []


def test_an_error_comes_before_the_deaths_that_follow_from_it() -> None:
    failed = Peer(beat(rank=2, state="failed", failure=Failure(2, "rank 2: x", 3)), is_here=False, is_known=True)
    silent = Peer(beat(), is_here=False, is_known=True, silent=700)
    found = list(verdict.sure({1: silent, 2: failed}, beat(rank=0), 600, patient=False))
    assert [failure.rank for failure in found] == [2, 1]


def test_a_stop_that_nobody_agreed_on_ends_the_others_in_the_end() -> None:
    left = Failure(1, "rank 1: stopped by SIGTERM", 143)
    peer = Peer(beat(state="stopped", failure=left), is_here=False, is_known=True, left=31)
    assert list(verdict.sure({1: peer}, beat(rank=0, idle=1.0), 600, patient=True)) == []
    assert list(verdict.sure({1: peer}, beat(rank=0, idle=31.0), 600, patient=True)) == [left]


def test_errors_of_communication_are_known() -> None:
    for error, expected in [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:4"), True),
        (RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1000ms for recv"), True),
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] writev [127.0.0.1]:4: Broken pipe"), True),
        (PeerError("rank 1 did not answer"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ConnectionResetError("Connection reset by peer"), False),
        (CheckpointError("Connection closed"), False),
        (DataError("x"), False),
    ]:
        assert is_of_a_peer(error) is expected


def test_torchs_own_errors_of_communication_are_known() -> None:
    from torch import distributed

    assert all(is_of_a_peer(kind("x")) for kind in (distributed.DistBackendError, distributed.DistStoreError))


def test_the_most_suspect_rank_is_named_when_a_collective_times_out() -> None:
    def idle(rank: int, place: str, **changes: object) -> Peer:
        return Peer(beat(rank=rank, idle=599.0, place=place, **changes), is_here=False, is_known=True)

    peers = {1: idle(1, "graph.py:865 (_engine_run_backward)"), 2: idle(2, "x (all_reduce)", waits=True)}
    peers[3] = idle(3, "loader.py:41 (fetch)")
    assert [failure.rank for failure in verdict.likely(peers, beat(rank=0), 600)] == [3, 1]


def test_a_failure_is_said_by_one_rank_whoever_notices_first(tmp_path: Path) -> None:
    this, died = alone(tmp_path), Failure(1, "rank 1 died", 10)
    this._peers[1] = Peer(beat(), is_here=True, is_known=True)
    other = Peer(beat(rank=2, state="failed", failure=died), is_here=True, is_known=True)
    this._peers[2] = other
    assert not this._is_said_by_another(died)
    this.rank = 3
    this._peers[0] = Peer(beat(rank=0, process=Process.own()), is_here=True, is_known=True)
    assert this._is_said_by_another(died)
    this._peers.pop(0)
    other.beat = replace(other.beat, has_said=True)
    assert this._is_said_by_another(died)


def test_a_last_word_counts_that_came_after_the_last_look(tmp_path: Path) -> None:
    this, gone = alone(tmp_path), replace(Process.own(), started=1)
    this._peers[1] = Peer(beat(process=gone), is_here=True, is_known=True)
    beat(process=gone).write(tmp_path / ".ranks" / "1.json")
    assert this._sure(patient=True) is not None
    beat(process=gone, count=2, state="done").write(tmp_path / ".ranks" / "1.json")
    assert this._sure(patient=True) is None


def test_a_beat_goes_on_where_no_new_file_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    told, file = beat(place="a long place" * 9), tmp_path / "1.json"
    told.write(file)
    monkeypatch.setattr("hf_finetune.peers.beat.write_atomically", full)
    assert beat(count=2).write(file)
    assert (read := Beat.read(file)) is not None
    assert read.count == 2
    assert not told.write(tmp_path / "new.json")


def test_an_error_is_traced_to_the_peer_behind_it(tmp_path: Path) -> None:
    this = alone(tmp_path)
    gone = beat(
        process=replace(Process.own(), started=1), state="failed", failure=Failure(1, "rank 1: a\nrank 1: b", 3)
    )
    gone.write(tmp_path / ".ranks" / "1.json")
    found = this.error_of(RuntimeError("Connection closed by peer"))
    assert found is not None
    assert (found.exit_code, [problem.message for problem in found.problems]) == (3, ["rank 1: a", "rank 1: b"])
    assert this.error_of(ValueError("x")) is None


def test_a_lost_connection_without_a_culprit_says_where_the_ranks_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "PATIENCE_S", 0.1)
    found = alone(tmp_path).error_of(RuntimeError("Connection closed by peer [10.0.0.2]:4\nmore"))
    assert str(found) == (
        "rank 0 lost the others after step 0, while starting: Connection closed by peer [10.0.0.2]:4; "
        "last step of each: 0 (rank 0); resume with the same command"
    )


def test_one_process_has_nobody_to_watch(tmp_path: Path) -> None:
    with Watch(tmp_path, 0, 1, lambda failure: None) as this:
        this.progress(1, "training")
        assert this.error_of(RuntimeError("Connection closed by peer")) is None
    assert list(tmp_path.iterdir()) == []


def seen_to_beat(this: Watch, folder: Path) -> None:
    for count in (1, 2):
        beat(count=count).write(folder / ".ranks" / "1.json")
        this._look(passed=0)


def test_whose_node_has_lost_its_power_is_named_when_connections_break(tmp_path: Path) -> None:
    this = alone(tmp_path)
    seen_to_beat(this, tmp_path)
    failure = this._cause(RuntimeError("Connection closed by peer [10.0.0.2]:7"))
    assert failure is not None
    assert (failure.rank, failure.exit_code) == (1, 10)
    assert "rank 1 (elsewhere, process 4711) has not answered" in failure.reason
    own = Beat.read(tmp_path / ".ranks" / "0.json")
    assert own is not None  # whoever looks for the cause goes on beating, and so is not blamed itself
    assert own.count > 5


def test_where_all_are_alive_the_network_is_to_blame(tmp_path: Path) -> None:
    this = alone(tmp_path)
    seen_to_beat(this, tmp_path)
    failure = verdict.unexplained(this._beat, this._known(), RuntimeError("Timed out waiting 7ms"))
    assert "look at the network between the nodes" in failure.reason


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
    session.peer_failed(Status(file), machine, Failure(lost, "it is gone", 10))
    assert (file.exists() and "it is gone" in file.read_text()) == writes


def test_files_of_ranks_that_are_no_more_go(tmp_path: Path) -> None:
    (tmp_path / ".ranks").mkdir()
    for name in ("7.json", ".0.json.4711"):
        (tmp_path / ".ranks" / name).touch()
    with Watch(tmp_path, 0, 2, lambda failure: None):
        pass
    (file,) = (tmp_path / ".ranks").iterdir()
    assert (file.name, json.loads(file.read_text())["state"]) == ("0.json", "done")


def test_the_time_limit_is_a_positive_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ["soon", "0", "-1", "inf", "nan", ""]:
        monkeypatch.setenv("HF_FINETUNE_PEER_TIMEOUT", text)
        with pytest.raises(RecipeError, match="HF_FINETUNE_PEER_TIMEOUT is"):
            Watch(tmp_path, 0, 2, lambda failure: None)


def test_problems_keep_their_places_in_what_others_say() -> None:
    state, failure = verdict.farewell(1, DataError([Problem("a", key="data"), Problem("b", file="f", line=2)]))
    assert (state, failure) == ("failed", Failure(1, "rank 1: data: a\nrank 1: f:2: b", 3))


def test_progress_costs_nothing(tmp_path: Path) -> None:
    this = alone(tmp_path)
    began = time.perf_counter()
    for step in range(10_000):
        this.progress(step, "training")
    assert (time.perf_counter() - began) / 10_000 < 20e-6
