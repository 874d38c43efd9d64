"""Rates, the parts of a step, and the share of the machine's arithmetic that is used: of each log and of the run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from hf_finetune.data.batches import COUNTED
from hf_finetune.models import memory
from hf_finetune.models.flops import Flops

DATA, FORWARD, BACKWARD, OPTIMIZER = "data", "forward", "backward", "optimizer"
PARTS = (DATA, FORWARD, BACKWARD, OPTIMIZER)


class StepTimes:
    """Seconds of each part of an optimiser step since the last log.

    On a CUDA device the clock is the device's: events in its stream, which nobody waits for until the log, when
    everything is done. So `data` there is how long the device had to wait for data. On other devices it is the wall's.

    Args:
        device: Where the model is trained: `cpu`, `cuda`, ...
    """

    def __init__(self, device: str) -> None:
        self.is_cuda = device == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []
        self._micro_batch_ended: Any = None

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count the time inside for one part."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Count a forward pass, which calls `part` inside, and its backward pass, which is the rest."""
        start, before = self._now(), len(self._spans)
        yield
        self._micro_batch_ended = self._now()
        forward = next((span for span in self._spans[before:] if span[0] == FORWARD), None)
        self._spans.append((BACKWARD, start if forward is None else forward[2], self._micro_batch_ended))

    def optimizer_stepped(self) -> None:
        """Count everything since the last micro-batch for the optimiser: clipping, the check for NaN, the step."""
        if self._micro_batch_ended is not None:
            self._spans.append((OPTIMIZER, self._micro_batch_ended, self._now()))
            self._micro_batch_ended = None

    def means(self, steps: float) -> dict[str, float]:
        """Return `seconds_<part>` of an optimiser step since the last call, as a mean over so many; forgets them."""
        sums = dict.fromkeys(PARTS, 0.0)
        if self.is_cuda and self._spans:
            self._spans[-1][2].synchronize()  # done long since: the loss that is logged came after
        for name, start, end in self._spans:
            sums[name] += start.elapsed_time(end) / 1e3 if self.is_cuda else end - start
        self._spans.clear()
        return {f"seconds_{name}": seconds / steps for name, seconds in sums.items()} if steps else {}

    def _now(self) -> Any:
        if not self.is_cuda:
            return time.perf_counter()
        cuda: Any = torch.cuda
        event = cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class Tally:
    """Rows, tokens and time of some steps, over all ranks; a checkpoint holds that of the run."""

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
        """Return rows and tokens (padding not counted) per second, and the padding's share of all positions."""
        if not self.seconds or not self.slots:
            return {}
        return {
            "samples_per_second": self.rows / self.seconds,
            "tokens_per_second": self.tokens / self.seconds,
            "padding_share": 1.0 - self.tokens / self.slots,
        }


@dataclass(frozen=True)
class Arithmetic:
    """FLOPs that a step costs, and that the machine could do."""

    flops: Flops
    peak: float
    """FLOP/s of a large matrix product, of all ranks together."""

    def share(self, tally: Tally) -> dict[str, float]:
        """Return `matmul_share`: FLOPs of the model, for tokens without padding, over those that the peak allows."""
        if not tally.seconds or not self.peak:
            return {}
        needed = self.flops.training(tally.tokens, tally.rows, tally.squares)
        return {"matmul_share": needed / (tally.seconds * self.peak)}


@dataclass(eq=False)
class Throughput(TrainerCallback):
    """Add rates to every training log; time spent in evaluation and saving does not count."""

    times: StepTimes
    """Measured by the trainer."""
    arithmetic: Arithmetic | None = None
    """None where nobody measured the machine."""
    window: Tally = field(default_factory=Tally)
    """Since the last log."""
    total: Tally = field(default_factory=Tally)
    """Of the whole run, earlier processes included."""
    _mark: float = 0.0

    @staticmethod
    def sizes(batches: list[Any]) -> tuple[torch.Tensor, ...]:
        """Return rows, tokens, token positions and squares of this rank's micro-batches, as float64 scalars."""
        totals = (sum(int(batch[name]) for batch in batches) for name in COUNTED)
        return tuple(torch.tensor(total, dtype=torch.float64) for total in totals)

    def count(self, sizes: list[float]) -> None:
        """Add the `sizes` of a global batch."""
        for tally in (self.window, self.total):
            tally.rows += sizes[0]
            tally.tokens += sizes[1]
            tally.slots += sizes[2]
            tally.squares += sizes[3]

    def rates(self) -> dict[str, float]:
        """Return those of the whole run, with the `matmul_peak` (FLOP/s) that `matmul_share` is a share of."""
        found = self.total.rates()
        if self.arithmetic is None or not found:
            return found
        return found | self.arithmetic.share(self.total) | {"matmul_peak": self.arithmetic.peak}

    def begin(self) -> None:
        """Start the clock before the data of a step are loaded, unless it runs."""
        self._mark = self._mark or time.perf_counter()

    def on_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note that the optimiser is done."""
        self.times.optimizer_stepped()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count the time of this step, data loading before it included."""
        now = time.perf_counter()
        for tally in (self.window, self.total):
            tally.seconds += now - self._mark
            tally.steps += 1
        # The clock runs on into the next step's data loading, unless something else comes in between.
        self._mark = now

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self._mark = 0.0

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self._mark = 0.0

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
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
