"""Rows and tokens per second, and the share of padding, of every logged step and of the whole run."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


@dataclass
class Tally:
    """What was processed in some time, over all ranks."""

    rows: float = 0.0
    tokens: float = 0.0
    slots: float = 0.0
    """Token positions that were computed, padding included."""
    seconds: float = 0.0

    def rates(self) -> dict[str, float]:
        """Rows and tokens (padding not counted) per second, and the padding's share of all positions."""
        if not self.seconds or not self.slots:
            return {}
        return {
            "samples_per_second": self.rows / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "padding_share": 1.0 - self.tokens / self.slots,
        }


class Throughput(TrainerCallback):
    """Adds rates to every training log; time spent in evaluation and saving does not count."""

    def __init__(self) -> None:
        self.window = Tally()
        self.total = Tally()
        self._mark = 0.0

    @staticmethod
    def sizes(batches: list[Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rows, tokens and token positions of this rank's micro-batches, as float64 scalars."""
        rows = sum(len(batch["input_ids"]) for batch in batches)
        tokens = sum(int(batch["tokens"]) for batch in batches)
        slots = sum(batch["input_ids"].numel() for batch in batches)
        one = partial(torch.tensor, dtype=torch.float64)
        return one(rows), one(tokens), one(slots)

    def count(self, sizes: list[float]) -> None:
        """Add the rows, tokens and slots of a global batch."""
        for tally in (self.window, self.total):
            tally.rows += sizes[0]
            tally.tokens += sizes[1]
            tally.slots += sizes[2]

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, where it does not run yet."""
        self._mark = self._mark or time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Book the time of this step, data loading before it included."""
        now = time.perf_counter()
        for tally in (self.window, self.total):
            tally.seconds += now - self._mark
        # The clock runs on into the next step's data loading, unless something else comes in between.
        self._mark = 0.0 if control.should_evaluate or control.should_save else now

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the rates since the last log."""
        if logs is not None and "loss" in logs:
            logs.update(self.window.rates())
            self.window = Tally()
