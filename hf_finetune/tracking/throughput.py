"""Rates, the parts of a step, and the share of the machine's arithmetic that is used: of each log and of the run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_finetune import memory

if TYPE_CHECKING:
    from hf_finetune.flops import Flops
    from hf_finetune.tracking.step_times import StepTimes


@dataclass
class Tally:
    """What was processed in some time, over all ranks."""

    rows: float = 0.0
    tokens: float = 0.0
    slots: float = 0.0
    """Token positions that were computed, padding included."""
    seconds: float = 0.0
    squares: float = 0.0
    """Sum of the squared lengths of all documents, which attention costs."""
    steps: float = 0.0
    """Optimiser steps."""

    def rates(self) -> dict[str, float]:
        """Rows and tokens (padding not counted) per second, and the padding's share of all positions."""
        if not self.seconds or not self.slots:
            return {}
        return {
            "samples_per_second": self.rows / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "padding_share": 1.0 - self.tokens / self.slots,
        }


@dataclass(frozen=True)
class Arithmetic:
    """What a step costs, and what the machine could do."""

    flops: Flops
    peak: float
    """FLOP/s of a large matrix product, of all ranks together."""

    def share(self, tally: Tally) -> dict[str, float]:
        """`matmul_share`: FLOPs of the model, for tokens without padding, over what the peak would have allowed."""
        if not tally.seconds or not self.peak:
            return {}
        needed = self.flops.training(tally.tokens, tally.rows, tally.squares)
        return {"matmul_share": needed / (tally.seconds * self.peak)}


@dataclass(eq=False)
class Throughput(TrainerCallback):
    """Adds rates to every training log; time spent in evaluation and saving does not count."""

    times: StepTimes
    """What the trainer measures."""
    arithmetic: Arithmetic | None = None
    """None where nobody measured the machine."""
    window: Tally = field(default_factory=Tally)
    """Since the last log."""
    total: Tally = field(default_factory=Tally)
    """Of the whole run, earlier processes included."""
    _mark: float = 0.0

    @staticmethod
    def sizes(batches: list[Any]) -> tuple[torch.Tensor, ...]:
        """Rows, tokens, token positions and squares of this rank's micro-batches, as float64 scalars."""
        rows = sum(len(batch["input_ids"]) for batch in batches)
        tokens = sum(int(batch["tokens"]) for batch in batches)
        slots = sum(batch["input_ids"].numel() for batch in batches)
        squares = sum(int(batch["squares"]) for batch in batches)
        one = partial(torch.tensor, dtype=torch.float64)
        return one(rows), one(tokens), one(slots), one(squares)

    def count(self, sizes: list[float]) -> None:
        """Add the `sizes` of a global batch."""
        for tally in (self.window, self.total):
            tally.rows += sizes[0]
            tally.tokens += sizes[1]
            tally.slots += sizes[2]
            tally.squares += sizes[3]

    def rates(self) -> dict[str, float]:
        """Of the whole run, with the `matmul_peak` (FLOP/s) that `matmul_share` is a share of."""
        found = self.total.rates()
        if self.arithmetic is None or not found:
            return found
        return found | self.arithmetic.share(self.total) | {"matmul_peak": self.arithmetic.peak}

    def begin(self) -> None:
        """Start the clock before the data of a step are loaded, where it does not run yet."""
        self._mark = self._mark or time.perf_counter()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Note that the optimiser is done."""
        self.times.optimizer_stepped()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Book the time of this step, data loading before it included."""
        now = time.perf_counter()
        for tally in (self.window, self.total):
            tally.seconds += now - self._mark
            tally.steps += 1
        # The clock runs on into the next step's data loading, unless something else comes in between.
        self._mark = now

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start anew after an evaluation."""
        self._mark = 0.0

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Start anew after a checkpoint."""
        self._mark = 0.0

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add everything that was measured since the last log, and the norm of the gradient after clipping."""
        if logs is None or "loss" not in logs:
            return
        if args.max_grad_norm and "grad_norm" in logs:
            logs["grad_norm_clipped"] = min(logs["grad_norm"], args.max_grad_norm)
        window, self.window = self.window, Tally()
        logs.update(window.rates())
        logs.update(self.times.means(window.steps))
        if window.steps:
            logs["seconds_step"] = window.seconds / window.steps
        if self.arithmetic is not None:
            logs.update(self.arithmetic.share(window))
        held = memory.peak(args.device.type)
        if held is not None:
            logs["memory"] = held
