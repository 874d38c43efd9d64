"""When the next checkpoint is due by the clock: so seldom that saving takes under 1 % of the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_finetune.schema.blocks import Checkpoints

SHARE = 0.01
"""Of the time between two checkpoints, what the second one may take."""
FIRST_S = 0.05
"""What a checkpoint is taken to cost before one was measured."""
NEWS = 1.5
"""A pause this many times longer than the one that was last said is said anew."""


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
        """Whether the state after the last step is kept."""
        self._pause = None if wanted.every_minutes is None else 60 * wanted.every_minutes
        self._by_epoch = wanted.every == "auto"
        self._tell, self._clock = tell, clock
        self._cost, self._said = FIRST_S, self._pause or 0.0
        self._since = clock()

    def begin(self) -> None:
        """Start counting: training begins now."""
        self._since = self._clock()

    def is_due(self, *, ends_epoch: bool) -> bool:
        """Whether a checkpoint is due after this step.

        Args:
            ends_epoch: It is the last step of an epoch.
        """
        passed = self._clock() - self._since
        if passed < self._cost / SHARE:
            return False
        return (ends_epoch and self._by_epoch) or (self._pause is not None and passed >= self._pause)

    def saved(self, seconds: float) -> None:
        """A checkpoint was written.

        Args:
            seconds: What it took.
        """
        self._cost, self._since = seconds, self._clock()
        pause = seconds / SHARE
        if self._pause is not None and pause > NEWS * self._said:
            self._said = pause
            took = f"a checkpoint took {seconds:.1f} s"
            self._tell(f"note: {took}: the next ones are {pause / 60:.3g} minutes apart, to stay under 1 % of the time")
