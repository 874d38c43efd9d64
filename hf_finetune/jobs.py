"""From prepared data to a `Job`: rows, global batches, their division among ranks, and how many steps that makes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_finetune import arguments, batching, data, hardware, packs
from hf_finetune.errors import DataError, Problem, RecipeError
from hf_finetune.job import Job

if TYPE_CHECKING:
    from hf_finetune.arguments import Length
    from hf_finetune.data import Prepared
    from hf_finetune.hardware import Machine
    from hf_finetune.recipe import Recipe


STREAM_WORKERS = 4
"""Processes of a rank that encode streamed rows, at most, where the recipe names no number: each reads all rows."""


@dataclass(frozen=True)
class Assignment:
    """What is trained, in which pieces, for how long."""

    job: Job
    length: Length
    lengths: np.ndarray[Any, Any] | None
    """Tokens of each row of the training set, of each sequence where rows are packed; None for a stream."""


def assign(recipe: Recipe, prepared: Prepared, machine: Machine, tokenizer: Any) -> Assignment:
    """Divide the work.

    Args:
        recipe: Batch size, length of training, packing.
        prepared: Encoded rows.
        machine: Its ranks.
        tokenizer: The model's.

    Raises:
        DataError: There are fewer rows than ranks.
        RecipeError: The global batch can't be divided, warmup is longer than training, early stopping could never act,
            or answers are to be generated from sharded weights.
    """
    vocabulary = len(tokenizer) if recipe.task.peft_type == "CAUSAL_LM" else 0
    rows, lengths = _rows(recipe, prepared)
    longest = recipe.data.max_length if lengths is None else int(lengths.max(initial=1))
    micro_batch = hardware.micro_batch(recipe, machine, vocabulary, longest)
    division = batching.Division(recipe.training.batch_size, micro_batch, machine.rank, machine.world_size)
    train = rows
    if rows is None:
        train = batching.StreamedBatches(
            prepared.train, division, recipe.training.seed, _stream_workers(recipe, machine)
        )
    if lengths is not None and len(lengths) < machine.world_size:
        message = f"the train split has {len(lengths)} rows, fewer than the {machine.world_size} ranks; add rows"
        raise DataError(Problem(message, key="data.train"))
    batches = None
    if lengths is not None:
        grouped = lengths if recipe.training.group_by_length else np.ones_like(lengths)
        batches = batching.GlobalBatches(grouped, division, recipe.training.seed)
    job = Job(
        task=recipe.task,
        targets=prepared.targets,
        adapter=recipe.adapter,
        tokenizer=tokenizer,
        train=train,
        validation=prepared.validation,
        batches=batches,
        division=division,
        eval_batch=hardware.eval_batch(recipe, machine, vocabulary),
        questions={
            "validation": recipe.task.questions(prepared.raw_validation, tokenizer),
            "test": recipe.task.questions(prepared.raw_test, tokenizer),
        },
        packed=recipe.data.packing,
    )
    if machine.is_sharded and any(job.questions.values()):
        message = "answers can't be generated while the weights are sharded (FSDP, ZeRO-3); set it to 0"
        raise RecipeError(Problem(message, key="task.generate_rows"))
    return Assignment(job, arguments.length(recipe, None if lengths is None else len(lengths)), lengths)


def divided(assignment: Assignment, micro_batch: int) -> Assignment:
    """The same work in micro-batches of so many rows at most; the global batches and their order stay."""
    job = assignment.job
    division = replace(job.division, micro_batch=micro_batch)
    batches, train = job.batches, job.train
    if batches is not None:
        batches = batching.GlobalBatches(batches.lengths, division, batches.seed)
    if isinstance(train, batching.StreamedBatches):
        train = replace(train, division=division)
    return replace(assignment, job=replace(job, division=division, batches=batches, train=train))


def _stream_workers(recipe: Recipe, machine: Machine) -> int:
    """Processes of this rank that encode streamed rows while it trains; none on a CPU, which trains with every core."""
    if recipe.data.workers is not None:
        return recipe.data.workers if recipe.data.workers > 1 else 0
    if machine.device == "cpu":
        return 0
    return max(1, min(STREAM_WORKERS, hardware.cores() // machine.local_world_size - 1))


def _rows(recipe: Recipe, prepared: Prepared) -> tuple[Any, np.ndarray[Any, Any] | None]:
    """The training set as the loader reads it, and the length of each of its rows; None of a stream."""
    if isinstance(prepared.train, data.Stream):
        return None, None
    rows = batching.Rows(prepared.train, recipe.task)
    lengths = batching.lengths_of(prepared.train)
    if not recipe.data.packing:
        return rows, lengths
    packed = packs.pack(lengths, recipe.data.max_length)
    return batching.PackedRows(rows, packed), packed.sums(lengths)
