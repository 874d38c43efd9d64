"""One agreed decision to stop: a signal to any rank ends all of them at the same step, with a checkpoint.

SIGTERM, SIGINT and SIGUSR1 only set a flag while training runs; at the end of each step, and at each step of an
evaluation, the ranks compare their flags. A second signal does not wait, unless it is a copy of the first: a scheduler
signals every process of a job, and the launcher, which is one of them, hands on its own. Outside of training there is
nothing to save, and a signal ends the process at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import distributed

from hf_finetune import patience, terminal
from hf_finetune.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_S = 5.0
"""Under a launcher, the same signal within so many seconds is the same wish."""
COPY_S = 0.5
"""The same without one: `timeout` signals its command and then the whole group, and keys are pressed twice."""
STOPPING = "stopping after this step, with a checkpoint; a second signal stops at once, without one"
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Notes signals, and lets the ranks agree on them. Made by every rank, after the process group."""

    def __init__(self) -> None:
        self._agreed = 0
        """What any rank received. Written by `agreed` alone, and `_own` by the handler alone: it may run in between."""
        self._own, self._since = 0, 0.0
        """The first that came here, and when."""
        self._echo = ECHO_S if "TORCHELASTIC_RUN_ID" in os.environ else COPY_S
        self._deferred = False
        self.is_due = False
        """Whether any rank wanted a checkpoint when they last agreed."""
        self._parent = os.getppid()
        self._before: dict[int, Any] = {}
        self._group: Any = None
        self._process = os.getpid()
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            # Flags live on the host; a GPU's group would have to copy them.
            self._group = distributed.new_group(backend="gloo", timeout=patience.collective())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside, and restore the handlers afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python hands signals to the main thread alone, which may do what it likes with them
            return
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        _follow_parent()
        try:
            yield
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a first signal waits until the ranks have agreed on it."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    @property
    def is_asked(self) -> bool:
        """Whether this rank received a signal."""
        return bool(self._own or self._agreed)

    def agreed(self, *, due: bool = False) -> int:
        """The signal that any rank received, 0 for none; the same on every rank, which all call this together.

        Args:
            due: This rank wants a checkpoint now; `is_due` then says so on every rank, by the same exchange.
        """
        self.is_due = due
        if self._group is None:
            return self._own
        flags = torch.tensor([self._agreed or self._own, int(due)], dtype=torch.int32)
        distributed.all_reduce(flags, op=distributed.ReduceOp.MAX, group=self._group)
        self._agreed, self.is_due = int(flags[0]), bool(flags[1])
        return self._agreed

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank says so; every rank asks at the same moment."""
        if self._group is None:
            return flag
        told = torch.tensor([int(flag)], dtype=torch.int32)
        distributed.all_reduce(told, op=distributed.ReduceOp.MAX, group=self._group)
        return bool(told)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked worker: Python swallows what is raised right after a fork, and the pool would wait for ever.
            os._exit(128 + number)
        now = time.monotonic()
        if number == self._own and now - self._since < self._echo:
            return
        if self._own and os.getppid() != self._parent:
            # The launcher died of the signal that came here too, as of Ctrl-C: see `_follow_parent`. No second wish.
            self._parent = os.getppid()
            return
        is_first = not self._own
        if is_first:
            self._own, self._since = number, now
        if is_first and self._agreed:
            return  # another rank was told before, and all of them are stopping already
        if not is_first or not self._deferred:
            raise Stopped.by(number, at_once=not is_first)
        terminal.notice(STOPPING)


def _follow_parent() -> None:
    """Have the kernel send SIGTERM when the launcher dies: `accelerate launch` with one process does not forward it.

    (accelerate 1.15, `commands/launch.py`, `simple_launcher`.) Without it, the process would train on unnoticed.
    """
    if sys.platform != "linux" or "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), signal.SIGTERM)
