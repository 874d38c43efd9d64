"""The agreed stop, the guard against divergence, and checkpoints by the clock.

A signal to any rank ends all of them at the same step, with a checkpoint. SIGTERM, SIGINT and SIGUSR1 only set a flag
while training runs; at the end of each step, and at each step of an evaluation, the ranks compare their flags. A second
signal does not wait, unless it is a copy of the first: a scheduler signals every process of a job, and the launcher,
which is one of them, forwards its own. Outside of training there is nothing to save, and a signal ends the process.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import distributed

from hf_finetune import device, log
from hf_finetune.config.blocks import Checkpoints, Training
from hf_finetune.errors import DivergedError, Problem, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Under a launcher, the same signal within so many seconds is a copy.
ECHO_S = 5.0
# The same without one: `timeout` signals its command and then the whole group, and keys are pressed twice.
COPY_S = 0.5
# After so many seconds a signal that Python dropped is sent once more.
AGAIN_S = 0.05
STOPPING = "stopping after this step, with a checkpoint; a second signal stops at once, without one"
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Notes signals, and has the ranks agree on them. Every rank makes one, after the process group."""

    def __init__(self) -> None:
        self._agreed = 0
        """The signal that any rank received. Written by `agreed` alone, and `_own` by the handler alone, which may run
        in between."""
        self._own, self._since = 0, 0.0
        """The first signal that came here, and its time."""
        self._echo = ECHO_S if "TORCHELASTIC_RUN_ID" in os.environ else COPY_S
        self._deferred = False
        self.is_due = False
        """Any rank wanted a checkpoint when they last agreed."""
        self._parent = os.getppid()
        self._before: dict[int, Any] = {}
        self._group: Any = None
        self._process = os.getpid()
        self._dropped: Stopped | None = None
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            # Flags live on the host; a GPU's group would have to copy them.
            self._group = distributed.new_group(backend="gloo", timeout=device.collective_timeout())

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside, and restore the handlers afterwards."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python hands signals to the main thread alone, which may do what it likes with them
            return
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        _follow_parent()
        hook, again = sys.unraisablehook, list[threading.Timer]()

        def unraisable(found: Any) -> None:
            """Send the signal once more, a moment later: Python drops what is raised inside a finaliser."""
            if not isinstance(found.exc_value, Stopped):
                hook(found)
                return
            self._dropped = found.exc_value
            again.append(threading.Timer(AGAIN_S, os.kill, (self._process, self._own)))
            again[-1].start()

        sys.unraisablehook = unraisable
        try:
            yield
        finally:
            sys.unraisablehook = hook
            for timer in again:
                timer.cancel()
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
        """Tell whether this rank received a signal."""
        return bool(self._own or self._agreed)

    def agreed(self, *, due: bool = False) -> int:
        """Return the signal that any rank received, 0 for none; all ranks call this together, and get the same.

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
        """Tell whether any rank says so; every rank asks at the same moment."""
        if self._group is None:
            return flag
        raised = torch.tensor([int(flag)], dtype=torch.int32)
        distributed.all_reduce(raised, op=distributed.ReduceOp.MAX, group=self._group)
        return bool(raised)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked worker: Python swallows what is raised right after a fork, and the pool would wait for ever.
            os._exit(128 + number)
        if self._dropped is not None:
            dropped, self._dropped = self._dropped, None
            raise dropped
        now = time.monotonic()
        if number == self._own and now - self._since < self._echo:
            return
        if self._own and os.getppid() != self._parent:
            # The launcher died of a signal that came here too, as of Ctrl-C: `_follow_parent` sent this one, no user.
            self._parent = os.getppid()
            return
        is_first = not self._own
        if is_first:
            self._own, self._since = number, now
        if is_first and self._agreed:
            return  # another rank had a signal before, and all of them are stopping already
        if not is_first or not self._deferred:
            raise Stopped.by(number, at_once=not is_first)
        log.notice(STOPPING)


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


# End training that went wrong: a loss or a gradient that is not finite, or a loss that leaps and stays there.

# Steps whose median loss is the usual one.
WINDOW = 50
# Steps before a leap can be recognised.
FIRST = 10
LOWER = "lower training.learning_rate"
# Steps in a row that overflow in fp16 before the run ends; from the scaler's first scale, 2^16, 17 come to 1.
OVERFLOWS = 25
NO_FP16 = "set training.precision to bf16 or fp32"
# A loss that is not scaled up any more, and gradients still overflow: no scale helps.
SMALLEST_SCALE = 1.0


class Guard:
    """Looks at each step before the optimiser takes it; every rank sees the same numbers.

    Args:
        training: The recipe's block.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.skipped = 0
        """Steps that `on_nonfinite: skip` left out."""
        self.overflowed = 0
        """Steps that the loss scaler of fp16 left out."""
        self.overflows_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._leaps = 0

    def takes(self, step: int, *, finite: bool) -> bool:
        """Tell whether the optimiser may take this step.

        Args:
            step: Its number, from 1.
            finite: Whether its loss and gradient are finite on every rank.

        Raises:
            DivergedError: They are not, and such steps are not to be skipped, or were too often.
        """
        if finite:
            return True
        if self.training.on_nonfinite == "stop":
            raise DivergedError(Problem(f"loss or gradient is not finite at step {step}; {LOWER}"))
        self.skipped += 1
        if self.skipped > self.training.max_skipped:
            message = f"loss or gradient is not finite at step {step}, after {self.skipped - 1} skipped steps"
            raise DivergedError(Problem(f"{message}; {LOWER}", key="training.max_skipped"))
        return False

    @property
    def not_taken(self) -> int:
        """Count the steps that the optimiser did not take, for whatever reason."""
        return self.skipped + self.overflowed

    def fits(self, step: int, *, finite: bool, scale: float) -> bool:
        """Tell whether a gradient fits into fp16: the loss scaler skips steps that do not, and lowers its scale.

        Args:
            step: Its number, from 1.
            finite: Whether the gradient is finite.
            scale: By what the loss was multiplied before the backward pass.

        Raises:
            DivergedError: It is not, and no scale helps.
        """
        if finite:
            self.overflows_in_a_row = 0
            return True
        self.overflowed += 1
        self.overflows_in_a_row += 1
        if self.overflows_in_a_row >= OVERFLOWS or scale <= SMALLEST_SCALE:
            many = self.overflows_in_a_row
            message = (
                f"gradients overflow in fp16: {many} steps in a row until step {step} were not taken, and the loss "
                f"scale is down to {scale:.3g}"
            )
            raise DivergedError(Problem(f"{message}; {NO_FP16}", key="training.precision"))
        return False

    def conclude(self, steps: int) -> None:
        """Refuse training that was none.

        Args:
            steps: All steps of the run.

        Raises:
            DivergedError: The optimiser took none of them.
        """
        if steps and self.not_taken >= steps:
            message = f"loss or gradient was not finite at any of the {steps} steps: nothing was trained"
            remedy = f"train longer, or {NO_FP16}" if self.overflowed else LOWER
            raise DivergedError(Problem(f"{message}; {remedy}"))

    def see(self, step: int, loss: float) -> None:
        """Compare a step's loss with those before it, where the recipe asks for that.

        Raises:
            DivergedError: It was more than `factor` times the usual one for `patience` steps in a row.
        """
        spike = self.training.loss_spike
        if spike is None:
            return
        usual = float(torch.tensor(list(self._losses)).median()) if len(self._losses) >= FIRST else float("inf")
        if loss <= spike.factor * usual:
            self._leaps = 0
            self._losses.append(loss)
            return
        self._leaps += 1
        if self._leaps >= spike.patience:
            message = f"the loss {loss:.4g} at step {step} is more than {spike.factor:g} times the usual {usual:.4g}"
            message = f"{message}, for {self._leaps} steps; {LOWER}"
            raise DivergedError(Problem(message, key="training.loss_spike"))


# Checkpoints by the clock, so seldom that saving takes under 1 % of the time.

# The part of the time between two checkpoints that the second one may take.
SHARE = 0.01
# A checkpoint is assumed to cost so much until one was measured.
ASSUMED_COST_S = 0.05
# A pause is announced again once it is this many times longer than the last one announced.
ANNOUNCE_FACTOR = 1.5


class Pace:
    """Decides on rank 0; the other ranks follow it.

    Args:
        wanted: The recipe's block.
        tell: Says that checkpoints are further apart than the recipe asks for.
        clock: Seconds, from any moment on.
    """

    def __init__(
        self, wanted: Checkpoints, tell: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.keeps_last = not wanted.is_off
        """Keep the state after the last step."""
        self._pause = None if wanted.every_minutes is None else 60 * wanted.every_minutes
        self._by_epoch = wanted.every == "auto"
        self._tell, self._clock = tell, clock
        self._cost, self._said = ASSUMED_COST_S, self._pause or 0.0
        self._since = clock()

    def begin(self) -> None:
        """Start counting: training begins now."""
        self._since = self._clock()

    def is_due(self, *, ends_epoch: bool) -> bool:
        """Tell whether a checkpoint is due after this step.

        Args:
            ends_epoch: It is the last step of an epoch.
        """
        passed = self._clock() - self._since
        if passed < self._cost / SHARE:
            return False
        return (ends_epoch and self._by_epoch) or (self._pause is not None and passed >= self._pause)

    def saved(self, seconds: float) -> None:
        """Note that a checkpoint was written.

        Args:
            seconds: The time it took.
        """
        self._cost, self._since = seconds, self._clock()
        pause = seconds / SHARE
        if self._pause is not None and pause > ANNOUNCE_FACTOR * self._said:
            self._said = pause
            took = f"a checkpoint took {seconds:.1f} s"
            self._tell(f"note: {took}: the next ones are {pause / 60:.3g} minutes apart, to stay under 1 % of the time")
