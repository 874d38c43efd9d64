"""Stops training that went wrong: a loss or a gradient that is not finite, or a loss that leaps and stays there."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import torch

from hf_finetune.errors import DivergedError, Problem

if TYPE_CHECKING:
    from hf_finetune.schema.blocks import Training

WINDOW = 50
"""Steps of which the median loss is what is usual."""
FIRST = 10
"""Steps before a leap can be told."""
LOWER = "lower training.learning_rate"


class Guard:
    """Looks at each step before the optimiser takes it; every rank sees the same numbers.

    Args:
        training: Says what to do.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        self.skipped = 0
        """Steps that the optimiser did not take."""
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._leaps = 0

    def takes(self, step: int, *, finite: bool) -> bool:
        """Whether the optimiser may take this step.

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
            told = f"{message}, for {self._leaps} steps; {LOWER}"
            raise DivergedError(Problem(told, key="training.loss_spike"))
