"""Results of a task that are shown, drawn or answered, by whatever does it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from hf_finetune.errors import DivergedError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from hf_finetune.tasks._sums import Sums

    Array = np.ndarray[Any, Any]


def check_finite(values: Array) -> None:
    """Refuse numbers of a model that can't be answered.

    Raises:
        DivergedError: One is not finite.
    """
    import numpy as np

    if not np.isfinite(values).all():
        raise DivergedError("the model gives numbers that are not finite; look at how its training ended")


def short(value: float) -> float:
    """Round to the digits of float32, so that nobody reads more into a number."""
    return float(f"{value:.8g}")


@dataclass(frozen=True)
class Judged:
    """Predictions beside the truth, for people; rows without a truth are left out."""

    places: Array
    """(M,) indices into the predictions."""
    truth: list[str]
    predicted: list[str]
    confidence: Array
    """(M,) how sure the model was of what it predicted, or how far off; the most confident mistakes are shown."""
    wrong: Array
    """(M,) bool."""
    metric: str = ""
    """Metric that is the share of rows that are not wrong; empty where no metric is."""


@dataclass(frozen=True)
class Plot:
    """Numbers that the charts of a split are drawn from, in TensorBoard, report and card alike."""

    kind: str | None
    """Layout of the rows, which decides what is drawn: `single_label`, `multi_label`, `regression`, `ranking`, `pairs`,
    None for tokens."""
    rows: Array
    """Float32: (N, C + 1) logits and label id, (N, 2C) logits and cells, (N, 2) prediction and label, the measures of
    `_retrieval.COLUMNS`, (N, 5) rewards of chosen and rejected, loss and both lengths, or (N, 3) nats, tokens and right
    tokens."""
    threshold: float | None = None
    """Least probability at which a cell counts as predicted."""


@dataclass(frozen=True)
class Prompts:
    """Prompts whose answers are generated, for people to read or to be compared with the data."""

    prompts: list[Any]
    """What `Task.ask` returned."""
    max_new_tokens: int
    score: Callable[[list[Any]], list[Sums]] = lambda answers: []
    """Sums over the answers, from which metrics follow; of a list of `Generation`, in the order of `prompts`."""
    references: Sequence[str] = ()
    """The data's answers, in the order of `prompts`, to be shown beside; empty where it has none."""
    told: Sequence[str] = ()
    """What people read of each prompt, where that is not the text of its tokens."""


def is_blank(value: Any) -> bool:
    """Tell whether a cell is null, NaN, blank text or an empty list."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


def read_output(found: Any, name: str | None) -> torch.Tensor:
    """Return what a task reads of what a model returned; see `Task.output`."""
    read: torch.Tensor = found if name is None else getattr(found, name)
    return read


def as_output(values: torch.Tensor, name: str | None) -> Any:
    """Return what a model would return that a task reads these values of."""
    return values if name is None else SimpleNamespace(**{name: values})


def literal(value: Any) -> str:
    """Return a Python literal that ends no block of code in Markdown."""
    return repr(value).replace("`", "\\x60")
