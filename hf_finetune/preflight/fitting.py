"""Rows of a micro-batch, and activation checkpointing, so that a training step fits the memory that is free.

The rule of `hardware.micro_batch` comes first; `memory` simulates a step only where a bound that costs nothing comes
near what is free. Neither choice changes what is learned: micro-batches divide the global batch, and checkpointing
computes the same numbers twice.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list, gather_object

from hf_finetune import jobs, memory, resources
from hf_finetune.memory import Shapes
from hf_finetune.memory.bound import bound
from hf_finetune.preflight.load import load
from hf_finetune.preflight.plan import size, too_little
from hf_finetune.terminal import phase
from hf_finetune.tuning.choices import Choice, Choices

if TYPE_CHECKING:
    from hf_finetune.findings import Findings
    from hf_finetune.preflight.heavy import Ready

MARGIN = 0.85
"""Share of the free memory that an estimate may take: it was up to a tenth too low."""
NEAR = 0.5
"""Share of the free memory below which the bound settles that everything fits."""
SMALL = 8
"""Part of the rule's micro-batch below which activations are rather recomputed: products of few rows are slow, too."""
ROWS, AGAIN = "micro_batch", "activation_checkpointing"


@dataclass(frozen=True)
class Fit:
    """What was chosen."""

    made: Mapping[str, Choice]
    """`micro_batch` and `activation_checkpointing`."""
    lacking: int = 0
    """Bytes of a training step by the estimate, where that is more than fits."""


def fit(ready: Ready, before: Choices | None, findings: Findings) -> Ready:
    """Choose, or go on with what was chosen; every rank comes here, and gets the same.

    Args:
        ready: A run of which nothing is wrong; rows of a micro-batch are the recipe's, or the rule's.
        before: What was chosen when the run began, if it is to go on.
        findings: Takes on rank 0 that nothing fits.

    Raises:
        RecipeError: `HF_FINETUNE_MEMORY` says no amount of memory.
    """
    kept = {} if before is None else before.made
    if all(name in kept for name in _left_open(ready)):
        return _with(ready, {**_ruled(ready), **{name: kept[name] for name in _left_open(ready)}})
    known = [free for free in gather_object([resources.memory_available(ready.machine)]) if free is not None]
    least = min(known, default=None)
    told = [choose(ready, least) if ready.machine.is_main else None]
    broadcast_object_list(told)
    if told[0] is None:
        raise AssertionError("rank 0 tells everyone")
    fitted = _with(ready, told[0].made)
    if told[0].lacking and ready.machine.is_main:
        findings.warn([too_little(fitted, told[0].lacking, least or 0)])
    return fitted


def ahead(ready: Ready) -> Ready:
    """The run with what would be chosen for it now, as this process alone sees it.

    Raises:
        RecipeError: `HF_FINETUNE_MEMORY` says no amount of memory.
    """
    return _with(ready, choose(ready, resources.memory_available(ready.machine)).made)


def choose(ready: Ready, free: int | None) -> Fit:
    """What fits, and why.

    Args:
        ready: See `fit`.
        free: Bytes that every rank may take; None where that is unknown.
    """
    if not _left_open(ready):
        return Fit(_ruled(ready))
    if free is None:
        return Fit(_ruled(ready, "by rule: how much memory is free is unknown"))
    lengths = ready.assignment.lengths
    longest = ready.recipe.data.max_length if lengths is None else int(lengths.max(initial=1))
    shape = (ready.assignment.job.division.micro_batch, longest)
    if bound(ready.outline, ready.machine, shape) <= NEAR * free:
        return Fit(_ruled(ready, "by rule: there is plenty of memory"))
    with phase("estimating the memory"):
        return _Search(ready, free).fit()


@dataclass(frozen=True)
class _Search:
    """Looks for the largest micro-batch that fits."""

    ready: Ready
    free: int
    known: dict[tuple[int, bool], int] = field(default_factory=dict)
    """What `needed` found."""

    def fit(self) -> Fit:
        """Without recomputing if that fits, else with; the most frugal way where nothing fits."""
        plain, frugal = self._ways()
        rows, again = self._largest(plain, again=False), False
        if rows is None and frugal:
            rows, again = self._largest(frugal, again=True), True
        does_fit, rows = rows is not None, rows or (frugal or plain)[-1]
        first, why = (plain or frugal)[0], [self._told(rows, again=again) + f" of {size(self.free)} free"]
        if rows != first:
            why.append(self._told(first, again=not plain))
        made = _ruled(self.ready)
        if _is_open(self.ready, ROWS):
            made[ROWS] = Choice(rows, ("by rule: " if rows == first else "estimated: ") + ", ".join(why))
        if _is_open(self.ready, AGAIN):
            because = f"estimated: without it {self._told(plain[-1], again=False)}" if again else "by rule: not needed"
            made[AGAIN] = Choice(again, because)
        return Fit(made, 0 if does_fit else self.needed(rows, again=again))

    def needed(self, rows: int, *, again: bool) -> int:
        """Bytes at the peak of a training step, without what the process holds now."""
        if (rows, again) not in self.known:
            ready = self.ready
            machine = replace(ready.machine, activation_checkpointing=again)
            largest = load(replace(ready, assignment=jobs.divided(ready.assignment, rows))).largest
            targets = ready.prepared.targets
            found = memory.estimate(ready.recipe, targets, ready.tokenizer, machine, Shapes(largest))
            self.known[rows, again] = found.training
        return self.known[rows, again]

    def _ways(self) -> tuple[list[int], list[int]]:
        """Rows to try, from many to few: without recomputing, and with."""
        rows = [self.ready.assignment.job.division.micro_batch]
        while _is_open(self.ready, ROWS) and rows[-1] > 1:
            rows.append(rows[-1] // 2)
        if _is_open(self.ready, AGAIN) and not self.ready.outline.supports_gradient_checkpointing:
            return rows, []
        if _is_open(self.ready, AGAIN):
            return [few for few in rows if few * SMALL >= rows[0]], rows
        return ([], rows) if self.ready.machine.activation_checkpointing else (rows, [])

    def _largest(self, ladder: list[int], *, again: bool) -> int | None:
        """The first of the ladder that fits, as fewer rows need less; usually that is the first of all."""

        def fits(rows: int) -> bool:
            return self.needed(rows, again=again) <= MARGIN * self.free

        if ladder and fits(ladder[0]):
            return ladder[0]
        place = bisect.bisect_left(ladder, True, lo=min(1, len(ladder)), key=fits)
        return ladder[place] if place < len(ladder) else None

    def _told(self, rows: int, *, again: bool) -> str:
        counted = "1 row needs" if rows == 1 else f"{rows} rows need"
        return f"{counted} {size(self.needed(rows, again=again))}"


def _is_open(ready: Ready, name: str) -> bool:
    """Whether the recipe leaves it to the machine."""
    return bool(getattr(ready.recipe.training, name) == "auto")


def _left_open(ready: Ready) -> list[str]:
    return [name for name in (ROWS, AGAIN) if _is_open(ready, name)]


def _ruled(ready: Ready, why: str = "") -> dict[str, Choice]:
    """What the recipe says, or the rule where it says nothing."""
    values = {ROWS: ready.assignment.job.division.micro_batch, AGAIN: ready.machine.activation_checkpointing}
    return {name: Choice(values[name], why if _is_open(ready, name) else "asked for") for name in (ROWS, AGAIN)}


def _with(ready: Ready, made: Mapping[str, Choice]) -> Ready:
    """The run as it was chosen."""
    machine = replace(ready.machine, activation_checkpointing=made[AGAIN].value)
    return replace(ready, machine=machine, assignment=jobs.divided(ready.assignment, made[ROWS].value), chosen=made)
