"""Examine a recipe with the libraries, but no weights: tokenizer, data, the model on the meta device, the job.

Then choose what the recipe leaves to the machine: rows of a micro-batch, and activation checkpointing.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel

from hf_finetune import device
from hf_finetune.data import checks, prepare, sources
from hf_finetune.data.job import Job
from hf_finetune.data.prepare import Prepared
from hf_finetune.data.stream import Look, Stream
from hf_finetune.device import Machine
from hf_finetune.errors import DataError, Findings, ModelError, Problem, RecipeError
from hf_finetune.log import phase
from hf_finetune.models import load, memory, pretrained, sharded
from hf_finetune.models.memory import bound
from hf_finetune.recipe import Recipe
from hf_finetune.run.lock import Choice, Choices


@dataclass(frozen=True)
class Parts:
    """Tokenizer, data, model outline and job; a part that could not be made is None, and an error says why."""

    recipe: Recipe
    machine: Machine
    tokenizer: Any = None
    prepared: Prepared | None = None
    outline: PreTrainedModel | None = None
    job: Job | None = None
    looked: Look | None = None
    """The first training rows of a stream; None where they are not streamed."""


def examine(recipe: Recipe, machine: Machine, findings: Findings, day: str | None = None) -> Parts:
    """Look at everything that needs the libraries, but no weights; a mistake in one part does not hide the others.

    Args:
        recipe: What is to be done.
        machine: Where. Ranks other than the first of their node wait for its data.
        findings: Takes what is wrong.
        day: On which the run began, as YYYY-MM-DD; None is today.
    """
    for check in (device.check, sharded.check_launch):
        with findings.collect():
            check(recipe, machine)
    sources.settle(recipe)
    tokenizer = prepared = job = looked = None
    # Its name is malformed or must not be read, or nothing is there.
    if findings.blame("model", RecipeError) or findings.blame("model.name", ModelError):
        return Parts(recipe, machine)
    with findings.collect():
        machine = replace(machine, attention=load.attention(recipe, machine))
    if findings.blame("model.name", ModelError) and not Path(recipe.model.name).expanduser().is_dir():
        return Parts(recipe, machine)  # what the Hub does not give now it gives no later; each try takes long
    with findings.collect():
        tokenizer = pretrained.load_processor(recipe.model, recipe.task)
        task = recipe.task.on(day or date.today().isoformat(), tokenizer)
        recipe = recipe.model_copy(update={"task": task})
    # Rows are encoded with the tokenizer: without one, nothing can be said of them. Nor where a file has no rows.
    if tokenizer is not None and not findings.blame("data"):
        with findings.collect():
            try:
                prepared = prepare.prepare(recipe, tokenizer, machine)
            except prepare.UnfitError as error:
                # Rows that can't be used end the preparation, but what was counted until then is worth telling.
                found = checks.findings(recipe, error.facts, error.counted, error.places, error.left_out)
                _judge(found, findings)
                raise
    outline = load.examine(recipe, load.UNKNOWN if prepared is None else prepared.targets, tokenizer, findings)
    if outline is not None:
        with findings.collect():
            sharded.check(recipe, machine, outline)
    if prepared is not None:
        _judge(checks.findings(recipe, prepared.facts, prepared.counted, prepared.places), findings)
        if isinstance(prepared.train, Stream):
            with findings.collect():
                looked = prepared.train.look()
                _judge(checks.noticed(recipe, looked.marks, prepared.train.reading.places), findings)
        with findings.collect():
            job = Job.of(recipe, prepared, machine, tokenizer)
    return Parts(recipe, machine, tokenizer, prepared, outline, job, looked)


def _judge(found: Iterable[tuple[str, Problem]], findings: Findings) -> None:
    """Keep what the checks of the data found, by its level."""
    found = list(found)
    if errors := [problem for level, problem in found if level == "error"]:
        findings.add(DataError(errors))
    findings.warn(problem for level, problem in found if level == "warn")


# Rows of a micro-batch, and activation checkpointing, so that a training step fits the memory that is free.
#
# The rule of `data.job.micro_batch` comes first; `memory` simulates a step only where a bound that costs nothing comes
# near what is free. Neither choice changes what is learned: micro-batches divide the global batch, and checkpointing
# computes the same numbers twice.

MARGIN = 0.85
"""Share of the free memory that an estimate may take: it was up to a tenth too low."""
NEAR = 0.5
"""Share of the free memory below which the bound settles that everything fits."""
SMALL = 8
"""Part of the rule's micro-batch below which activations are rather recomputed: products of few rows are slow, too."""
ROWS, AGAIN = "micro_batch", "activation_checkpointing"

Made = dict[str, Choice]
"""`micro_batch` and `activation_checkpointing`, each with its reason."""


def fit(job: Job, outline: PreTrainedModel, before: Choices | None, findings: Findings) -> tuple[Job, Made]:
    """Choose, or go on with what was chosen; every rank calls this, and gets the same.

    Args:
        job: Rows of a micro-batch are the recipe's, or the rule's.
        outline: The model on the meta device.
        before: What was chosen when the run began, if it is resumed.
        findings: Takes on rank 0 that nothing fits.

    Raises:
        RecipeError: `HF_FINETUNE_MEMORY` says no amount of memory.
    """
    # With another micro-batch the sums of a step are added up in another order: a resumed run keeps the old one.
    kept = {} if before is None else before.made
    left_open = [name for name in (ROWS, AGAIN) if _is_open(job, name)]
    if all(name in kept for name in left_open):
        made = _ruled(job) | {name: kept[name] for name in left_open}
        return _with(job, made), made
    known = [free for free in gather_object([device.memory_available(job.machine)]) if free is not None]
    least = min(known, default=None)
    # The estimate takes seconds and all processors: rank 0 makes it, with the least memory that any rank has.
    chosen = [choose(job, outline, least) if job.machine.is_main else ({}, 0)]
    broadcast_object_list(chosen)
    made, lacking = chosen[0]
    fitted = _with(job, made)
    if lacking and job.machine.is_main:
        findings.warn([too_little(fitted, lacking, least or 0)])
    return fitted, made


def fit_alone(job: Job, outline: PreTrainedModel) -> tuple[Job, Made]:
    """Choose as this process alone sees it.

    Raises:
        RecipeError: `HF_FINETUNE_MEMORY` says no amount of memory.
    """
    made, _ = choose(job, outline, device.memory_available(job.machine))
    return _with(job, made), made


def choose(job: Job, outline: PreTrainedModel, free: int | None) -> tuple[Made, int]:
    """Find what fits, and say why.

    Args:
        job: See `fit`.
        outline: The model on the meta device.
        free: Bytes that every rank may take; None where that is unknown.

    Returns:
        The choices, and the bytes of a training step by the estimate where that is more than fits, else 0.
    """
    if not (_is_open(job, ROWS) or _is_open(job, AGAIN)):
        return _ruled(job), 0
    if free is None:
        return _ruled(job, "by rule: how much memory is free is unknown"), 0
    longest = job.recipe.data.max_length if job.lengths is None else int(job.lengths.max(initial=1))
    if bound(outline, job.machine, (job.division.micro_batch, longest)) <= NEAR * free:
        return _ruled(job, "by rule: there is plenty of memory"), 0
    with phase("estimating the memory"):
        return search(job, outline, free)


def search(job: Job, outline: PreTrainedModel, free: int) -> tuple[Made, int]:
    """Search for the largest micro-batch that fits; arguments and result as of `choose`.

    Activations are recomputed only where nothing fits without; where nothing fits at all, the most frugal way is taken.
    """
    needed = cache(lambda rows, again: step_bytes(job, rows, again=again))

    def largest(ladder: list[int], *, again: bool) -> int | None:
        """Return the first of the ladder that fits, as fewer rows need less."""

        def fits(rows: int) -> bool:
            return bool(needed(rows, again) <= MARGIN * free)

        if ladder and fits(ladder[0]):  # usually
            return ladder[0]
        place = bisect.bisect_left(ladder, True, lo=min(1, len(ladder)), key=fits)
        return ladder[place] if place < len(ladder) else None

    def told(rows: int, *, again: bool) -> str:
        return f"{'1 row needs' if rows == 1 else f'{rows} rows need'} {size(needed(rows, again))}"

    # Rows to try, from many to few: without recomputing, and with.
    plain, frugal = [job.division.micro_batch], list[int]()
    while _is_open(job, ROWS) and plain[-1] > 1:
        plain.append(plain[-1] // 2)
    if not _is_open(job, AGAIN) and job.machine.activation_checkpointing:
        plain, frugal = [], plain
    elif _is_open(job, AGAIN) and outline.supports_gradient_checkpointing:
        plain, frugal = [rows for rows in plain if rows * SMALL >= plain[0]], plain
    fitting, again = largest(plain, again=False), False
    if fitting is None and frugal:
        fitting, again = largest(frugal, again=True), True
    rows = fitting or (frugal or plain)[-1]
    first, why = (plain or frugal)[0], [told(rows, again=again) + f" of {size(free)} free"]
    if rows != first:
        why.append(told(first, again=not plain))
    made = _ruled(job)
    if _is_open(job, ROWS):
        made[ROWS] = Choice(rows, ("by rule: " if rows == first else "estimated: ") + ", ".join(why))
    if _is_open(job, AGAIN):
        because = f"estimated: without it {told(plain[-1], again=False)}" if again else "by rule: not needed"
        made[AGAIN] = Choice(again, because)
    return made, 0 if fitting else needed(rows, again)


def step_bytes(job: Job, rows: int, *, again: bool) -> int:
    """Estimate the bytes at the peak of a training step, without what the process holds now.

    Args:
        job: The run.
        rows: Of a micro-batch.
        again: Activations are recomputed.
    """
    machine = replace(job.machine, activation_checkpointing=again)
    _, train = job.divided(rows).load()
    return memory.estimate(job.recipe, job.targets, job.tokenizer, machine=machine, train=train).training


def _is_open(job: Job, name: str) -> bool:
    """Tell whether the recipe leaves a setting to the machine."""
    return bool(getattr(job.recipe.training, name) == "auto")


def _ruled(job: Job, why: str = "") -> Made:
    """Take what the recipe says, or the rule where it says nothing."""
    values = {ROWS: job.division.micro_batch, AGAIN: job.machine.activation_checkpointing}
    return {name: Choice(values[name], why if _is_open(job, name) else "asked for") for name in (ROWS, AGAIN)}


def _with(job: Job, made: Mapping[str, Choice]) -> Job:
    """Apply what was chosen."""
    machine = replace(job.machine, activation_checkpointing=made[AGAIN].value)
    return replace(job, machine=machine).divided(made[ROWS].value)


def too_little(job: Job, needed: int, free: int) -> Problem:
    """Say that a run needs more memory than there is, and what is left to do about it."""
    ways = ["lower it"] if job.division.micro_batch > 1 else []
    ways += ["lower data.max_length"]
    ways += [] if job.machine.activation_checkpointing else ["set training.activation_checkpointing"]
    message = f"about {size(needed)} of memory are needed and {size(free)} are free; {', or '.join(ways)}"
    return Problem(message, key="training.micro_batch")


def size(count: float) -> str:
    """Return bytes for people, e.g. `1.3 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
