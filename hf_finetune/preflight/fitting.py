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

from hf_finetune import memory, resources
from hf_finetune.findings import Findings
from hf_finetune.job import Job
from hf_finetune.memory import Shapes
from hf_finetune.memory.bound import bound
from hf_finetune.preflight.plan import size, too_little
from hf_finetune.terminal import phase
from hf_finetune.tuning.choices import Choice, Choices

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARGIN = 0.85
"""Share of the free memory that an estimate may take: it was up to a tenth too low."""
NEAR = 0.5
"""Share of the free memory below which the bound settles that everything fits."""
SMALL = 8
"""Part of the rule's micro-batch below which activations are rather recomputed: products of few rows are slow, too."""
ROWS, AGAIN = "micro_batch", "activation_checkpointing"


Fitted = tuple[Job, Mapping[str, Choice]]
"""The job as it was fitted, with `micro_batch` and `activation_checkpointing` and the reason of each."""


@dataclass(frozen=True)
class Fit:
    """A choice of micro-batch and checkpointing."""

    made: Mapping[str, Choice]
    """`micro_batch` and `activation_checkpointing`."""
    lacking: int = 0
    """Bytes of a training step by the estimate, where that is more than fits."""


def fit(job: Job, outline: PreTrainedModel, before: Choices | None, findings: Findings) -> Fitted:
    """Choose, or go on with what was chosen; every rank calls this, and gets the same.

    Args:
        job: Rows of a micro-batch are the recipe's, or the rule's.
        outline: The model on the meta device.
        before: What was chosen when the run began, if it is resumed.
        findings: Takes on rank 0 that nothing fits.

    Raises:
        RecipeError: `HF_FINETUNE_MEMORY` says no amount of memory.
    """
    kept = {} if before is None else before.made
    left_open = _left_open(job)
    if all(name in kept for name in left_open):
        return _with(job, {**_ruled(job), **{name: kept[name] for name in left_open}})
    known = [free for free in gather_object([resources.memory_available(job.machine)]) if free is not None]
    least = min(known, default=None)
    # The estimate takes seconds and all processors: rank 0 makes it, with the least memory that any rank has.
    told = [choose(job, outline, least) if job.machine.is_main else None]
    broadcast_object_list(told)
    if told[0] is None:
        raise AssertionError("rank 0 tells everyone")
    fitted, made = _with(job, told[0].made)
    if told[0].lacking and job.machine.is_main:
        findings.warn([too_little(fitted, told[0].lacking, least or 0)])
    return fitted, made


def ahead(job: Job, outline: PreTrainedModel) -> Fitted:
    """Choose as this process alone sees it.

    Raises:
        RecipeError: `HF_FINETUNE_MEMORY` says no amount of memory.
    """
    return _with(job, choose(job, outline, resources.memory_available(job.machine)).made)


def choose(job: Job, outline: PreTrainedModel, free: int | None) -> Fit:
    """Find what fits, and say why.

    Args:
        job: See `fit`.
        outline: The model on the meta device.
        free: Bytes that every rank may take; None where that is unknown.
    """
    if not _left_open(job):
        return Fit(_ruled(job))
    if free is None:
        return Fit(_ruled(job, "by rule: how much memory is free is unknown"))
    longest = job.recipe.data.max_length if job.lengths is None else int(job.lengths.max(initial=1))
    shape = (job.division.micro_batch, longest)
    if bound(outline, job.machine, shape) <= NEAR * free:
        return Fit(_ruled(job, "by rule: there is plenty of memory"))
    with phase("estimating the memory"):
        return _Search(job, outline, free).fit()


@dataclass(frozen=True)
class _Search:
    """Search for the largest micro-batch that fits."""

    job: Job
    outline: PreTrainedModel
    free: int
    known: dict[tuple[int, bool], int] = field(default_factory=dict)
    """Results of `needed`."""

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
        made = _ruled(self.job)
        if _is_open(self.job, ROWS):
            made[ROWS] = Choice(rows, ("by rule: " if rows == first else "estimated: ") + ", ".join(why))
        if _is_open(self.job, AGAIN):
            because = f"estimated: without it {self._told(plain[-1], again=False)}" if again else "by rule: not needed"
            made[AGAIN] = Choice(again, because)
        return Fit(made, 0 if does_fit else self.needed(rows, again=again))

    def needed(self, rows: int, *, again: bool) -> int:
        """Bytes at the peak of a training step, without what the process holds now."""
        if (rows, again) not in self.known:
            job = self.job
            machine = replace(job.machine, activation_checkpointing=again)
            shapes = Shapes(job.divided(rows).load().largest)
            found = memory.estimate(job.recipe, job.targets, job.tokenizer, machine, shapes)
            self.known[rows, again] = found.training
        return self.known[rows, again]

    def _ways(self) -> tuple[list[int], list[int]]:
        """Rows to try, from many to few: without recomputing, and with."""
        rows = [self.job.division.micro_batch]
        while _is_open(self.job, ROWS) and rows[-1] > 1:
            rows.append(rows[-1] // 2)
        if _is_open(self.job, AGAIN) and not self.outline.supports_gradient_checkpointing:
            return rows, []
        if _is_open(self.job, AGAIN):
            return [few for few in rows if few * SMALL >= rows[0]], rows
        return ([], rows) if self.job.machine.activation_checkpointing else (rows, [])

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


def _is_open(job: Job, name: str) -> bool:
    """Tell whether the recipe leaves a setting to the machine."""
    return bool(getattr(job.recipe.training, name) == "auto")


def _left_open(job: Job) -> list[str]:
    return [name for name in (ROWS, AGAIN) if _is_open(job, name)]


def _ruled(job: Job, why: str = "") -> dict[str, Choice]:
    """Take what the recipe says, or the rule where it says nothing."""
    values = {ROWS: job.division.micro_batch, AGAIN: job.machine.activation_checkpointing}
    return {name: Choice(values[name], why if _is_open(job, name) else "asked for") for name in (ROWS, AGAIN)}


def _with(job: Job, made: Mapping[str, Choice]) -> Fitted:
    """Apply what was chosen."""
    machine = replace(job.machine, activation_checkpointing=made[AGAIN].value)
    return replace(job, machine=machine).divided(made[ROWS].value), made
