"""Signals that ask for a stop: which count, and which are copies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from torch import distributed

from hf_finetune.errors import Stopped
from hf_finetune.training import callbacks
from hf_finetune.training.callbacks import StopRequest


@pytest.fixture
def under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")


def test_alone_a_second_signal_does_not_wait() -> None:
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # a copy, as `timeout` sends it
        stop._since -= callbacks.COPY_S
        with pytest.raises(Stopped) as stopped:
            signal.raise_signal(signal.SIGTERM)
    assert "at once by a second signal, SIGTERM" in stopped.value.reason


@pytest.mark.usefixtures("under_a_launcher")
def test_a_copy_that_the_launcher_hands_on_changes_nothing() -> None:
    stop = StopRequest()
    with stop.listening():
        with stop.deferred():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            assert stop.agreed() == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)  # one that comes late, while status.json is written


@pytest.mark.usefixtures("under_a_launcher")
def test_a_later_signal_or_another_one_is_no_copy() -> None:
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped, match="130"):
            signal.raise_signal(signal.SIGINT)
        stop._since -= callbacks.ECHO_S
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)


def test_the_first_signal_of_a_rank_that_knows_already_changes_nothing() -> None:
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        stop._agreed = signal.SIGTERM  # as `agreed` leaves it where another rank was told before
        signal.raise_signal(signal.SIGTERM)
        stop._since -= callbacks.COPY_S
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)


def interrupted_with_its_launcher(told: Any) -> None:
    """What `accelerate launch` with one process does on Ctrl-C: it dies of the signal while the process saves."""
    launcher_sees, process_is_ready = os.pipe()
    launcher = os.getpid()
    if os.fork():
        os.read(launcher_sees, 1)
        os._exit(0)
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        signal.raise_signal(signal.SIGINT)
        os.write(process_is_ready, b"!")
        deadline = time.monotonic() + 30
        while os.getppid() == launcher and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(1.2 * callbacks.COPY_S)
        told.send(stop.agreed())
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGINT)
        told.send("a second one still does not wait")
    os._exit(0)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_ctrl_c_that_kills_the_launcher_too_is_one_signal() -> None:
    heard, told = multiprocessing.Pipe(duplex=False)
    launcher = multiprocessing.get_context("fork").Process(target=interrupted_with_its_launcher, args=(told,))
    launcher.start()
    launcher.join(60)
    assert heard.poll(30), "the process ended before it could save"
    assert heard.recv() == signal.SIGINT
    assert heard.poll(30)
    heard.recv()


def test_before_training_a_signal_ends_at_once() -> None:
    stop = StopRequest()
    with stop.listening(), pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)


def signalled_while_it_waits(rank: int, store: str, told: Any) -> None:
    """Rank 0 is signalled inside of the collective, where rank 1 comes late."""
    distributed.init_process_group("gloo", store=distributed.FileStore(store, 2), rank=rank, world_size=2)  # type: ignore[attr-defined]
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        if rank == 0:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            time.sleep(1.5)
        told.put([stop.agreed(), stop.agreed()])
    distributed.destroy_process_group()


def test_a_signal_inside_a_finaliser_is_not_lost() -> None:
    class Finalised:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    def finalise() -> None:
        Finalised()
        time.sleep(10)

    with pytest.raises(Stopped) as stopped, StopRequest().listening():
        finalise()
    assert stopped.value.code == 143


def test_a_signal_that_comes_while_the_ranks_compare_is_not_lost(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    ranks = [
        context.Process(target=signalled_while_it_waits, args=(rank, str(tmp_path / "store"), told)) for rank in (0, 1)
    ]
    for rank in ranks:
        rank.start()
    answers = [told.get(timeout=120) for _ in ranks]
    for rank in ranks:
        rank.join(60)
    assert answers == [[0, signal.SIGTERM]] * 2
