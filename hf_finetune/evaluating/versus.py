"""Two models on the same rows: differences with paired intervals, and McNemar's test of which is right more often."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_finetune.errors import DataError, RecipeError
from hf_finetune.runreport import intervals

if TYPE_CHECKING:
    from hf_finetune.evaluating.scoring import Scored
    from hf_finetune.tasks._sums import Sums

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class McNemar:
    """McNemar's exact test (McNemar 1947; two-sided, binomial): do both models err equally often?"""

    metric: str
    """The share that is compared: accuracy or exact_match."""
    only_this: int
    """Rows that only this model has right."""
    only_other: int
    """Rows that only the other has right."""
    p_value: float


@dataclass(frozen=True)
class Versus:
    """How this model compares with another."""

    name: str
    """The other's."""
    rows: int
    """Rows that both evaluated."""
    metrics: Mapping[str, float]
    """The other's, on these rows."""
    differences: Mapping[str, float]
    """This model's metrics minus the other's, on these rows."""
    bounds: Mapping[str, tuple[float, float]]
    """95 % intervals of the differences, where they follow from sums over rows."""
    mcnemar: McNemar | None
    notes: list[str] = field(default_factory=list)
    """What was left out."""


def compare(this: Scored, other: Scored, name: str) -> Versus:
    """Compare two models on the rows that both evaluated.

    Raises:
        RecipeError: They do different tasks, or know different labels.
        DataError: They have no row in common.
    """
    _refuse_strangers(this, other, name)
    common = np.intersect1d(this.numbers, other.numbers)
    if not len(common):
        raise DataError(f"{name} evaluated none of the rows that this run did; look at what was dropped")
    left_out = len(this.numbers) - len(common)
    notes = [f"{left_out:,} rows are left out: {name} drops them"] if left_out else []
    this, other, unlike = _same_answers(this.only(common), other.only(common), name)
    notes += unlike
    mine, theirs = this.metrics(), other.metrics()
    if not _same_tokens(this, other):
        notes.append("loss, perplexity and token_accuracy are not compared: the tokenizers cut texts into other tokens")
        mine = {metric: value for metric, value in mine.items() if metric in this.answers}
    differences = {metric: mine[metric] - theirs[metric] for metric in mine if metric in theirs}
    found = [intervals.of_differences(*pair) for pair in _pairs(this, other)]
    bounds = {metric: pair for part in found for metric, pair in part.bounds.items() if metric in differences}
    return Versus(name, len(common), theirs, differences, bounds, _mcnemar(this, other), notes)


def _refuse_strangers(this: Scored, other: Scored, name: str) -> None:
    mine, theirs = (scored.task.title for scored in (this, other))
    if mine != theirs:
        raise RecipeError(f"{name} does {theirs}, this run {mine}; only runs of one task can be compared")
    names = [set(scored.targets.names) for scored in (this, other)]
    if names[0] != names[1] and max(map(len, names)) > 1:  # a single name is only a column's
        strange = ", ".join(sorted(names[0] ^ names[1])[:5])
        raise RecipeError(f"{name} knows other labels than this run ({strange}); they can't be compared")


def _same_answers(this: Scored, other: Scored, name: str) -> tuple[Scored, Scored, list[str]]:
    """Both with the generated answers that can be compared, and what is said of the others."""
    if not this.answers and not other.answers:
        return this, other, []
    common = np.intersect1d(this.answered, other.answered)
    patterns = [getattr(scored.task, "answer_pattern", None) for scored in (this, other)]
    told = []
    if patterns[0] != patterns[1]:
        common = common[:0]
        told = [f"generated answers are not compared: {name} has another task.answer_pattern; give one to both"]
    elif not len(common):
        told = [f"generated answers are not compared: {name} and this run answer no row in common; "
                "give task.generate_rows"]  # fmt: skip
    elif max(len(this.answered), len(other.answered)) > len(common):
        told = [f"generated answers are compared on the {len(common):,} rows that both answer"]
    return this.answering(common), other.answering(common), told


def _same_tokens(this: Scored, other: Scored) -> bool:
    """Tell whether losses of tokens are of the same tokens."""
    mine, theirs = this.predictions.get("tokens"), other.predictions.get("tokens")
    return mine is None or theirs is None or np.array_equal(mine, theirs)


def _pairs(this: Scored, other: Scored) -> list[tuple[Sums, Sums]]:
    """Sums over the same rows, in the same order: both are in the order of the split."""
    pairs = zip(this.sums(), other.sums(), strict=True)
    return [pair for pair in pairs if pair[0].of_rows.shape[1] == pair[1].of_rows.shape[1]]


def _mcnemar(this: Scored, other: Scored) -> McNemar | None:
    from scipy import stats

    mine, theirs = this.right(), other.right()
    if mine is None or theirs is None:
        return None
    metric, numbers, right = mine
    _, other_numbers, other_right = theirs
    _, at, other_at = np.intersect1d(numbers, other_numbers, return_indices=True)
    only_this = int((right[at] & ~other_right[other_at]).sum())
    only_other = int((~right[at] & other_right[other_at]).sum())
    both = only_this + only_other
    p_value = float(stats.binomtest(only_this, both).pvalue) if both else 1.0
    return McNemar(metric, only_this, only_other, p_value)
