"""Collect the inputs of a classifier's head in an evaluation, for the projector.

It comes from a hook on the last layer, so it costs no pass of its own. Shapes: B rows, T tokens, D numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

Array = np.ndarray[Any, Any]

LARGEST = torch.finfo(torch.float16).max


def find_head(model: nn.Module, labels: int) -> nn.Module | None:
    """The last linear layer that gives one number a label, adapted or not; None where there is none."""
    found, inside = None, "\0"
    for path, module in model.named_modules():
        if path.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = f"{path}."  # its parts see other inputs
        base: Any = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        if isinstance(base, nn.Linear) and base.out_features == labels and "original_module" not in path:
            found = module
    return found


def chosen(rows: int, most: int) -> list[int]:
    """At most so many rows, spread evenly over the split, as this may be sorted by label."""
    return [int(row) for row in np.unique(np.linspace(0, rows - 1, min(rows, most)).round())]


class HeadInputs:
    """Collects the vectors of some rows, of every rank.

    Args:
        head: See `find_head`.
        rows: Numbers of the rows that are kept.
        pad: Padding token, by which models without a pooler find the last token of a row.
    """

    def __init__(self, head: nn.Module, rows: list[int], pad: int | None) -> None:
        self.head = head
        self.rows = frozenset(rows)
        self.pad = pad
        self._ids: list[int] = []
        self._places: list[int] = []
        self._last: torch.Tensor | None = None
        self._found: list[torch.Tensor] = []
        self._numbers: list[int] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, forward passes are watched."""
        handle = self.head.register_forward_pre_hook(self._see)
        try:
            yield
        finally:
            handle.remove()

    def announce(self, row_ids: torch.Tensor, input_ids: torch.Tensor | None) -> None:
        """Say which rows come next, both still on the CPU.

        Args:
            row_ids: (B,), -1 for rows that only fill a rank.
            input_ids: (B, T); None where rows are not made of tokens.
        """
        self._places = [place for place, number in enumerate(row_ids.tolist()) if number in self.rows]
        self._ids = row_ids[self._places].tolist()
        self._last = None
        if self.pad is not None and input_ids is not None:
            # As transformers' GenericForSequenceClassification pools.
            self._last = (torch.arange(input_ids.shape[1]) * (input_ids != self.pad)).argmax(-1)

    def _see(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not self._ids:
            return
        hidden: torch.Tensor = inputs[0]
        places = torch.tensor(self._places, device=hidden.device)
        if hidden.ndim == 3:
            last = torch.full((len(hidden),), hidden.shape[1] - 1) if self._last is None else self._last
            vectors = hidden[places, last.to(hidden.device)[places]]
        else:
            vectors = hidden[places]
        self._found.append(vectors.detach().float().clamp(-LARGEST, LARGEST).half())
        self._numbers += self._ids
        self._ids = []

    def gather(self) -> tuple[Array, Array]:
        """Row numbers, ascending, and their vectors, (M,) int64 and (M, D) float16; every rank must ask."""
        vectors = torch.cat(self._found).cpu().numpy() if self._found else None
        parts = gather_object([(np.array(self._numbers, dtype=np.int64), vectors)])
        held = [(numbers, found) for numbers, found in parts if found is not None]
        if not held:
            return np.zeros(0, dtype=np.int64), np.zeros((0, 0), dtype=np.float16)
        numbers = np.concatenate([numbers for numbers, _ in held])
        order = np.argsort(numbers, kind="stable")
        return numbers[order], np.concatenate([found for _, found in held])[order]
