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
OVERFLOWS = 25
"""Steps in a row that overflow in fp16 before the run ends; from the scaler's first scale, 2^16, 17 come to 1."""
NO_FP16 = "set training.precision to bf16 or fp32"
SMALLEST_SCALE = 1.0
"""A loss that is not scaled up any more, and gradients still overflow: no scale helps."""


class Guard:
    """Looks at each step before the optimiser takes it; every rank sees the same numbers.

    Args:
        training: Says what to do.
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

    @property
    def not_taken(self) -> int:
        """Steps that the optimiser did not take, for whatever reason."""
        return self.skipped + self.overflowed

    def fits(self, step: int, *, finite: bool, scale: float) -> bool:
        """Whether a gradient fits into fp16: the loss scaler leaves out steps that do not, and lowers its scale.

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
        """See that training was any.

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
            told = f"{message}, for {self._leaps} steps; {LOWER}"
            raise DivergedError(Problem(told, key="training.loss_spike"))
