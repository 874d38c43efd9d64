"""The plan of a run in a few lines: model, rows, steps, padding, memory, disk."""

from __future__ import annotations

import bisect
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from transformers import PreTrainedModel

from hf_finetune import device
from hf_finetune.data.batches import lengths_of, rows_of
from hf_finetune.data.job import Job
from hf_finetune.data.stream import Look
from hf_finetune.errors import Findings, Problem, StorageError
from hf_finetune.log import phase
from hf_finetune.models import memory, pretrained
from hf_finetune.models.memory import bound
from hf_finetune.recipe import Recipe
from hf_finetune.reports import run
from hf_finetune.run.folder import nearest_existing
from hf_finetune.run.lock import Choice, Choices

MOMENTS = {"adamw": 2.0, "adamw_8bit": 0.5, "adafactor": 0.1, "sgd": 0.0}
"""Numbers of fp32 that each optimiser keeps of a trained weight, about."""
LOGS = 20_000_000
"""Bytes set aside for metrics, event files, tokenizer and reports."""
SHARE_OF_MEMORY = 0.95


def plan(
    job: Job, looked: Look | None, chosen: Mapping[str, Choice], findings: Findings
) -> tuple[dict[str, str], dict[str, Any]]:
    """Plan a run; a machine that is too small for it is a finding.

    Args:
        job: Of a recipe with no errors.
        looked: The first rows of a stream; None where rows are not streamed.
        chosen: Micro-batch and checkpointing, with reasons.
        findings: Takes too little memory and too small a disk.

    Returns:
        Sentences by name, for people; and numbers by name, for machines, whose names end with the unit.
    """
    recipe, machine, division, length = job.recipe, job.machine, job.division, job.length
    prepared, (padding, largest) = job.prepared, job.load()
    if looked is not None:
        prepared = replace(prepared, counted={"train": looked.report, **prepared.counted})
    estimate = memory.estimate(
        recipe, job.targets, job.tokenizer, machine=machine, train=largest, evaluated=_evaluated(job)
    )
    trained, parameters = estimate.parameters
    free = device.memory_available(machine)
    # It is an estimate, so it stops nothing.
    if free is not None and estimate.more > free * SHARE_OF_MEMORY:
        findings.warn([too_little(job, estimate.more, free)])
    disk, output = _disk(recipe, trained), nearest_existing(Path(recipe.output))
    disk_free = shutil.disk_usage(output).free
    if disk_free < disk:
        message = f"the run needs about {size(disk)}, {output} has {size(disk_free)} left; "
        findings.add(StorageError(Problem(f"{message}free space or name another folder", key="output")))
    made_of = ", ".join(f"{name} {size(part)}" for name, part in estimate.parts.items())
    lines = {
        "task": recipe.task.kind,
        "model": run.model_line(recipe, estimate.parameters).removeprefix("model ") + _commit(recipe),
    }
    for line in run.data_lines(prepared):
        name, _, text = line.partition(": ")
        if looked is not None and name == "train":
            rows = f"all {looked.report.rows:,}" if looked.whole else f"first {looked.report.rows:,}"
            text = f"{rows} rows of a stream looked at: {text}"
        lines[name] = text
    lines |= {
        "steps": run.plan_line(division, length),
        "padding": "unknown for a stream" if padding is None else f"{padding:.1%}",
        "machine": machine.describe(),
        "chosen": Choices(machine.device, chosen).describe(),
        "memory": f"{size(estimate.total)} a device, most in {estimate.peak}: {made_of}",
        "checkpoints": _checkpoints(recipe, trained),
        "disk": f"{size(disk)} in {recipe.output}",
    }
    splits = {
        name: {
            **{f"{fate}_rows": getattr(report, fate) for fate in ("kept", "cut", "dropped", "untrained", "empty")},
            "read_rows": report.rows,
            "all_tokens": report.tokens,
            "trained_items": report.trained,
            "longest_tokens": report.longest,
        }
        for name, report in prepared.reports.items()
    }
    numbers = {
        "splits": splits,
        "label_rows": dict(prepared.facts["train"].labels if "train" in prepared.facts else {}),
        "total_steps": length.total_steps,
        "epoch_steps": length.steps_per_epoch,
        "warmup_steps": length.warmup_steps,
        "batch_rows": division.batch_size,
        "micro_batch_rows": division.micro_batch,
        "micro_batches": division.accumulation,
        "ranks": division.world_size,
        "padding_share": padding,
        "largest_micro_batch_rows": largest[0],
        "largest_micro_batch_tokens": largest[1],
        "trained_parameters": trained,
        "parameters": parameters,
        "memory_bytes": estimate.total,
        "memory_peak": estimate.peak,
        "memory_parts_bytes": dict(estimate.parts),
        "memory_free_bytes": free,
        "disk_bytes": disk,
        "disk_free_bytes": disk_free,
        "threads": machine.threads,
    }
    return lines, numbers


def _evaluated(job: Job) -> tuple[int, int]:
    """Find the largest batch that the model will evaluate: rows, and tokens of a row."""
    evaluated = [rows for rows in (job.prepared.validation, job.prepared.test) if rows is not None]
    most = max(map(len, evaluated), default=0)
    longest = max((int(lengths_of(rows).max(initial=0)) for rows in evaluated), default=0)
    all_logits = job.machine.is_sharded or not job.recipe.speed.fused_loss
    return min(rows_of(longest, *job.eval_batch(all_logits=all_logits)), most), longest


def size(count: float) -> str:
    """Return bytes for people, e.g. `1.3 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _commit(recipe: Recipe) -> str:
    """Say which commit of the Hub the model is, and how to keep it."""
    commit = pretrained.commit(recipe.model)
    if commit is None:
        return ""
    pinned = recipe.model.revision == commit
    return f", commit {commit}" + ("" if pinned else f" (not pinned; model.revision: {commit} keeps it)")


def too_little(job: Job, needed: int, free: int) -> Problem:
    """Say that a run needs more memory than there is, and what is left to do about it."""
    ways = ["lower it"] if job.division.micro_batch > 1 else []
    ways += ["lower data.max_length"]
    ways += [] if job.machine.activation_checkpointing else ["set training.activation_checkpointing"]
    message = f"about {size(needed)} of memory are needed and {size(free)} are free; {', or '.join(ways)}"
    return Problem(message, key="training.micro_batch")


def _disk(recipe: Recipe, trained: int) -> int:
    """Return the bytes of adapter, checkpoints and logs."""
    has_best = recipe.training.best_metric is not None
    kept = 1  # of a run that is stopped
    if has_best or not recipe.saving.is_off:
        kept = recipe.saving.keep + 1 + has_best  # the next one is written before the oldest goes
    return 4 * trained + _checkpoint_bytes(recipe, trained) * kept + LOGS


def _checkpoint_bytes(recipe: Recipe, trained: int) -> int:
    """Return the bytes of one checkpoint: the trained weights and what the optimiser keeps of each, in fp32."""
    return int(4 * trained * (1 + MOMENTS[recipe.training.optimizer]))


def _checkpoints(recipe: Recipe, trained: int) -> str:
    """Say when they are written, how large they are, and what stays when the run is done."""
    saving = recipe.saving
    often = [] if saving.every_minutes is None else [f"every {saving.every_minutes:g} minutes"]
    if saving.every is not None:
        often.append("at each epoch" if saving.every in ("auto", "epoch") else f"every {saving.every} steps")
    often += [] if recipe.training.best_metric is None else [f"at the best {recipe.training.best_metric}"]
    if saving.is_off:
        kept = "" if not often else f", {often[0]} excepted"
        return f"off{kept}: a run that is killed starts again, one that is done can't be extended"
    is_paced = saving.every == "auto" or saving.every_minutes is not None
    rarer = " (less often where that would take over 1 % of the time)" if is_paced else ""
    each = size(_checkpoint_bytes(recipe, trained))
    return f"{' and '.join(often)}{rarer}; {saving.keep} kept, {each} each; the last one stays, to extend the run"


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
    known = [free for free in gather_object([device.memory_available(job.machine)]) if free is not None]
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
    return _with(job, choose(job, outline, device.memory_available(job.machine)).made)


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
        """Return bytes at the peak of a training step, without what the process holds now."""
        if (rows, again) not in self.known:
            job = self.job
            machine = replace(job.machine, activation_checkpointing=again)
            train = job.divided(rows).load()[1]
            found = memory.estimate(job.recipe, job.targets, job.tokenizer, machine=machine, train=train)
            self.known[rows, again] = found.training
        return self.known[rows, again]

    def _ways(self) -> tuple[list[int], list[int]]:
        """Return rows to try, from many to few: without recomputing, and with."""
        rows = [self.job.division.micro_batch]
        while _is_open(self.job, ROWS) and rows[-1] > 1:
            rows.append(rows[-1] // 2)
        if _is_open(self.job, AGAIN) and not self.outline.supports_gradient_checkpointing:
            return rows, []
        if _is_open(self.job, AGAIN):
            return [few for few in rows if few * SMALL >= rows[0]], rows
        return ([], rows) if self.job.machine.activation_checkpointing else (rows, [])

    def _largest(self, ladder: list[int], *, again: bool) -> int | None:
        """Return the first of the ladder that fits, as fewer rows need less; usually that is the first of all."""

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
