"""What a run will do, in a few lines: model, rows, steps, padding, memory, disk."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_finetune import memory, resources, runreport
from hf_finetune.errors import Problem, StorageError
from hf_finetune.memory import Shapes
from hf_finetune.model import pretrained
from hf_finetune.runfolder import nearest_existing

if TYPE_CHECKING:
    from hf_finetune.findings import Findings
    from hf_finetune.preflight.heavy import Ready

BATCHES_LOOKED_AT = 2_000
"""Global batches of the first epoch from which padding and the largest micro-batch are read."""
LOGS = 20_000_000
"""Bytes set aside for metrics, event files, tokenizer and reports."""
SHARE_OF_MEMORY = 0.95


@dataclass(frozen=True)
class Load:
    """What the micro-batches of an epoch hold."""

    tokens: int
    """Without padding."""
    cells: int
    """With padding."""
    largest: tuple[int, int]
    """Rows and tokens of the micro-batch with most cells."""

    @property
    def padding(self) -> float:
        """Share of the cells that is padding."""
        return 1.0 - self.tokens / self.cells if self.cells else 0.0


def load(ready: Ready) -> Load:
    """Count rows and padding of the first epoch's micro-batches on every rank; of a stream only what is the most."""
    job, lengths = ready.assignment.job, ready.assignment.lengths
    if job.batches is None or lengths is None:
        return Load(0, 0, (job.division.micro_batch, ready.recipe.data.max_length))
    ranks = [replace(job.division, rank=rank) for rank in range(job.division.world_size)]
    tokens = cells = 0
    largest = (0, 0)
    for batch in itertools.islice(job.batches.global_batches(), BATCHES_LOOKED_AT):
        for rows in itertools.chain.from_iterable(division.share(batch) for division in ranks):
            held = [lengths[row] for row in rows if row >= 0] or [lengths[~rows[0]]]
            tokens += sum(held)
            cells += len(held) * max(held)
            largest = max(largest, (len(held), max(held)), key=lambda shape: shape[0] * shape[1])
    return Load(tokens, cells, largest)


def shapes(ready: Ready, of: Load) -> Shapes:
    """The largest batches that the model will see."""
    evaluated = [rows for rows in (ready.prepared.validation, ready.prepared.test) if rows is not None]
    most = max((len(rows) for rows in evaluated), default=0)
    longest = max((max(rows["length"]) for rows in evaluated), default=0)
    all_logits = ready.machine.is_sharded or not ready.recipe.speed.fused_loss
    rows = ready.assignment.job.eval_batch.rows_of(longest, all_logits=all_logits)
    return Shapes(train=of.largest, evaluation=(min(rows, most), longest))


def lines(ready: Ready, findings: Findings) -> list[tuple[str, str]]:
    """Name and text of each line of the plan; a machine that is too small for it is a finding.

    Args:
        ready: A run of which nothing is wrong.
        findings: Takes what the plan shows: too little memory, too small a disk.
    """
    recipe, machine = ready.recipe, ready.machine
    job, length, of = ready.assignment.job, ready.assignment.length, load(ready)
    estimate = memory.estimate(recipe, ready.prepared.targets, ready.tokenizer, machine, shapes(ready, of))
    _fits(ready, estimate.total, findings)
    disk = _disk(ready, estimate.parameters[0])
    with findings.collect():
        _has_room(Path(recipe.output), disk)
    made_of = ", ".join(f"{name} {size(part)}" for name, part in estimate.parts.items())
    return [
        ("task", recipe.task.kind),
        ("model", runreport.model_line(recipe, estimate.parameters).removeprefix("model ") + _commit(ready)),
        *_data_lines(ready),
        ("steps", runreport.plan_line(job.division, length)),
        ("padding", f"{of.padding:.1%}" if of.cells else "unknown for a stream"),
        ("machine", machine.describe()),
        ("memory", f"{size(estimate.total)} a device, most in {estimate.peak}: {made_of}"),
        ("disk", f"{size(disk)} in {recipe.output}"),
    ]


def _data_lines(ready: Ready) -> Iterator[tuple[str, str]]:
    """What the splits hold; of a stream, the rows that were looked at."""
    prepared, looked = ready.prepared, ready.looked
    if looked is not None:
        prepared = replace(prepared, counted={"train": looked.report, **prepared.counted})
    for line in runreport.data_lines(prepared):
        name, _, text = line.partition(": ")
        if looked is not None and name == "train":
            rows = f"all {looked.report.rows:,}" if looked.whole else f"first {looked.report.rows:,}"
            text = f"{rows} rows of a stream looked at: {text}"
        yield name, text


def size(count: float) -> str:
    """Bytes for people, e.g. `1.3 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _commit(ready: Ready) -> str:
    """Which commit of the Hub the model is, and how to keep it."""
    commit = pretrained.commit(ready.recipe.model)
    if commit is None:
        return ""
    pinned = ready.recipe.model.revision == commit
    return f", commit {commit}" + ("" if pinned else f" (not pinned; model.revision: {commit} keeps it)")


def _fits(ready: Ready, needed: int, findings: Findings) -> None:
    """Warn where the estimate is more than the device has; it is an estimate, so it stops nothing."""
    free = resources.memory_available(ready.machine)
    if free is not None and needed > free * SHARE_OF_MEMORY:
        message = (
            f"about {size(needed)} of memory are needed and {size(free)} are there; lower it, or data.max_length, or "
            "set training.activation_checkpointing"
        )
        findings.warn([Problem(message, key="training.micro_batch")])


def _disk(ready: Ready, trained: int) -> int:
    """Bytes of adapter, checkpoints (weights and two optimiser moments each) and logs."""
    recipe = ready.recipe
    kept = 0
    if recipe.checkpoints.every is not None or recipe.training.best_metric is not None:
        kept = recipe.checkpoints.keep + 1  # the next one is written before the oldest goes
    return 4 * trained * (1 + 3 * kept) + LOGS


def _has_room(output: Path, needed: int) -> None:
    place = nearest_existing(output)
    free = shutil.disk_usage(place).free
    if free < needed:
        message = (
            f"the run needs about {size(needed)}, {place} has {size(free)} left; free space or name another folder"
        )
        raise StorageError(Problem(message, key="output"))
