"""When something is looked at: which evaluation this is, and what of it the recipe wants to see."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_finetune.schema.watching import is_due

if TYPE_CHECKING:
    from transformers import TrainerState

EVALUATED = "eval_runtime"
"""What every log of an evaluation during training holds."""


@dataclass(frozen=True)
class Occasion:
    """One evaluation."""

    phase: str
    """eval, final or test."""
    step: int
    number: int
    """Evaluations in training up to this one; from 1."""
    last: bool
    """Whether it is of the model that is saved."""

    def is_due(self, often: int | str | bool) -> bool:
        """Whether this is one of those that a setting of `tracking` asks for."""
        return is_due(often, self.number, last=self.last)

    @classmethod
    def of(cls, phase: str, step: int, state: TrainerState, *, keeps_best: bool) -> Occasion:
        """The evaluation after a step, which has not been made yet.

        Its number follows from the Trainer's history, which a checkpoint holds, so that it is the same after a resume.

        Args:
            phase: eval, final or test.
            step: Optimiser steps before it.
            state: The Trainer's.
            keeps_best: Whether the best checkpoint is loaded after training, and evaluated once more.
        """
        history: list[dict[str, Any]] = state.log_history
        earlier = {logs["step"] for logs in history if EVALUATED in logs and logs["step"] < step}
        ends = step >= state.max_steps > 0 and not keeps_best
        return cls(phase, step, len(earlier) + 1, last=phase != "eval" or ends)
