"""How long the parts of an optimiser step take: data, forward, backward, optimiser."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

DATA, FORWARD, BACKWARD, OPTIMIZER = "data", "forward", "backward", "optimizer"
PARTS = (DATA, FORWARD, BACKWARD, OPTIMIZER)


class StepTimes:
    """Seconds of each part since the last log.

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
        """Inside, time counts for one part."""
        start = self._now()
        yield
        self._spans.append((name, start, self._now()))

    @contextmanager
    def micro_batch(self) -> Iterator[None]:
        """Inside is one forward pass, which counts as `part` says, and its backward pass, which is the rest."""
        start, before = self._now(), len(self._spans)
        yield
        self._micro_batch_ended = self._now()
        forward = next((span for span in self._spans[before:] if span[0] == FORWARD), None)
        self._spans.append((BACKWARD, start if forward is None else forward[2], self._micro_batch_ended))

    def optimizer_stepped(self) -> None:
        """Everything since the last micro-batch was the optimiser: clipping, the check for NaN, the step itself."""
        if self._micro_batch_ended is not None:
            self._spans.append((OPTIMIZER, self._micro_batch_ended, self._now()))
            self._micro_batch_ended = None

    def means(self, steps: float) -> dict[str, float]:
        """`seconds_<part>` of an optimiser step since the last call, as a mean over so many; forgets them."""
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
