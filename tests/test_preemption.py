"""Signals that ask for a stop: which count, and which are copies."""

from __future__ import annotations

import signal

import pytest

from hf_finetune import preemption
from hf_finetune.preemption import Stopped, StopRequest


@pytest.fixture
def under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")


def test_alone_a_second_signal_does_not_wait() -> None:
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)


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
        stop._since -= preemption.ECHO_S
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)


def test_the_first_signal_of_a_rank_that_knows_already_changes_nothing() -> None:
    stop = StopRequest()
    with stop.listening(), stop.deferred():
        stop._received = signal.SIGTERM  # as `agreed` leaves it where another rank was told before
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)


def test_before_training_a_signal_ends_at_once() -> None:
    stop = StopRequest()
    with stop.listening(), pytest.raises(Stopped):
        signal.raise_signal(signal.SIGTERM)
