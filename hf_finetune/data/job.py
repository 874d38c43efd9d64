"""The work of a run: its rows, how they are cut into global and micro-batches, and how many steps that makes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hf_finetune.adapters.base import Adapter
from hf_finetune.data import batches as data_batches
from hf_finetune.data import stream as data_stream
from hf_finetune.data.packs import pack
from hf_finetune.data.prepare import Prepared
from hf_finetune.device import Machine, cores
from hf_finetune.errors import DataError, Problem, RecipeError
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import Batch, Prompts, State, Task

COUNTS = (*data_batches.COUNTED, data_batches.STREAMED)
"""Added to training batches by their loader; no model takes them."""
SAMPLE_ROWS = 8
"""Rows of a batch that is looked at besides training."""
STREAM_WORKERS = 4
"""Most processes of a rank that encode streamed rows, where the recipe names no number: each of them reads all rows."""
BATCHES_LOOKED_AT = 2_000
"""Global batches of the first epoch from which padding and the largest micro-batch are read."""

# Most tokens of a micro-batch that `micro_batch: auto` allows: rows x the longest row that there is.
AUTO_TOKENS = {"cpu": 8_192, "mps": 8_192, "cuda": 32_768}
# Most logits of a language model's micro-batch that `auto` allows: tokens x vocabulary.
AUTO_LOGITS = {"cpu": 1 << 27, "mps": 1 << 27, "cuda": 1 << 31}
# Rows of an evaluation batch that `auto` allows at most, where they are short: times those of `data.max_length`.
EVALUATION_ROWS = 4


def micro_batch(recipe: Recipe, machine: Machine, vocabulary: int, longest: int) -> int:
    """Return the rows of one forward pass on one device, before its memory is asked.

    A token has `vocabulary` logits, 0 for a classifier; the longest training row, or packed sequence, `longest` tokens.
    """
    if recipe.training.micro_batch != "auto":
        return recipe.training.micro_batch
    share = -(-recipe.training.batch_size // machine.world_size)
    tokens = min(AUTO_TOKENS[machine.device], AUTO_LOGITS[machine.device] // max(vocabulary, 1))
    return min(share, max(1, tokens // longest))


def eval_batch(recipe: Recipe, machine: Machine, vocabulary: int, *, all_logits: bool) -> tuple[int, int | None]:
    """Return the most rows of one forward pass of one rank in evaluation, and the most tokens, padding included.

    None sets no bound: the recipe names the rows. With `all_logits`, the logits of the whole batch are held at once;
    `vocabulary` as for `micro_batch`.
    """
    if recipe.training.eval_batch != "auto":
        return recipe.training.eval_batch, None
    # A classifier keeps nothing for a backward pass and has next to no logits.
    tokens = AUTO_TOKENS[machine.device] * (1 if vocabulary else 4)
    rows = EVALUATION_ROWS * max(1, tokens // recipe.data.max_length)
    return rows, min(tokens, AUTO_LOGITS[machine.device] // max(vocabulary, 1)) if all_logits else tokens


@dataclass(frozen=True)
class Length:
    """Optimiser steps of a run."""

    total_steps: int
    steps_per_epoch: int | None
    """None for a stream."""
    warmup_steps: int

    @classmethod
    def of(cls, recipe: Recipe, rows: int | None) -> Length:
        """Count the steps; rows are packed sequences where packing is on, and None for a stream.

        Raises:
            RecipeError: Warmup is longer than training, or early stopping could never act.
        """
        training = recipe.training
        per_epoch = None if rows is None else math.ceil(rows / training.batch_size)
        total = training.steps or math.ceil((training.epochs or 0) * (per_epoch or 0))
        warmup = training.warmup_steps
        problems = []
        if warmup is not None and warmup > total:
            message = f"{warmup} is more than all {total} steps of this run; lower it, or use warmup_ratio"
            problems.append(Problem(message, key="training.warmup_steps"))
        stopping = training.early_stopping
        every = per_epoch if training.eval_every == "epoch" else training.eval_every
        evaluations = total // every if isinstance(every, int) else 0
        if stopping is not None and evaluations <= stopping.patience:
            message = f"patience {stopping.patience} is never used up in {evaluations} evaluations; lower eval_every"
            problems.append(Problem(message, key="training.early_stopping"))
        if problems:
            raise RecipeError(problems)
        return cls(total, per_epoch, math.ceil(total * training.warmup_ratio) if warmup is None else warmup)


@dataclass(frozen=True)
class Job:
    """Everything the trainer needs besides the model: rows, batches, and the task that learns from them."""

    recipe: Recipe
    machine: Machine
    prepared: Prepared
    tokenizer: Any
    train: Dataset[Any]
    """`Rows`, `PackedRows` or `StreamedBatches`."""
    lengths: np.ndarray[Any, Any] | None
    """Tokens of each row of `train` (of each sequence where rows are packed); None for a stream."""
    batches: data_batches.GlobalBatches | None
    """Batch sampler of `train`; None for a stream."""
    division: data_batches.Division
    questions: Mapping[str, Prompts | None]
    """Prompts to answer when a split (`validation`, `test`) is evaluated."""
    length: Length

    @classmethod
    def of(cls, recipe: Recipe, prepared: Prepared, machine: Machine, tokenizer: Any) -> Job:
        """Divide the work among the ranks.

        Raises:
            DataError: There are fewer rows than ranks.
            RecipeError: The global batch can't be divided, warmup is longer than training, early stopping could never
                act, or answers are to be generated from sharded weights.
        """
        rows: Any = None
        lengths = None
        if not isinstance(prepared.train, data_stream.Stream):
            rows, lengths = data_batches.Rows(prepared.train, recipe.task), data_batches.lengths_of(prepared.train)
            if recipe.data.packing:
                packed = pack(lengths, recipe.data.max_length)
                rows, lengths = data_batches.PackedRows(rows, packed), packed.sums(lengths)
        ranks, seed, batches = machine.world_size, recipe.training.seed, None
        longest = recipe.data.max_length if lengths is None else int(lengths.max(initial=1))
        rows_of_a_pass = micro_batch(recipe, machine, recipe.task.vocabulary(tokenizer), longest)
        division = data_batches.Division(recipe.training.batch_size, rows_of_a_pass, machine.rank, ranks)
        if lengths is None:
            workers = recipe.data.workers
            if workers is None:
                # On the CPU training takes every core; else one core a rank is left for the training itself.
                spare = 0 if machine.device == "cpu" else max(1, cores() // machine.local_world_size - 1)
                workers = min(STREAM_WORKERS, spare)
            elif workers == 1:
                workers = 0  # the training process encodes itself
            rows = data_batches.StreamedBatches(prepared.train, division, seed, workers)
        else:
            if len(lengths) < ranks:
                message = f"the train split has {len(lengths)} rows, fewer than the {ranks} ranks; add rows"
                raise DataError(Problem(message, key="data.train"))
            grouped = lengths if recipe.training.group_by_length else np.ones_like(lengths)
            name = recipe.task.apart
            apart = None if name is None else rows.encoded.select_columns(name)[name][:]
            batches = data_batches.GlobalBatches(grouped, division, seed, apart)
        questions = {
            split: recipe.task.questions(rows_of_split, tokenizer, recipe.data.max_length)
            for split, rows_of_split in (("validation", prepared.raw_validation), ("test", prepared.raw_test))
        }
        if machine.is_sharded and any(questions.values()):
            message = "answers can't be generated while the weights are sharded (FSDP, ZeRO-3); set it to 0"
            raise RecipeError(Problem(message, key="task.generate_rows"))
        if machine.is_sharded and recipe.task.needs_start:
            message = "compares the model with what it was, which is not kept while weights are sharded (FSDP, ZeRO-3)"
            raise RecipeError(Problem(f"{message}; train on whole weights, or take another method", key="task.kind"))
        length = Length.of(recipe, None if lengths is None else len(lengths))
        return cls(recipe, machine, prepared, tokenizer, rows, lengths, batches, division, questions, length)

    @property
    def task(self) -> Task:
        """The recipe's."""
        return self.recipe.task

    @property
    def adapter(self) -> Adapter:
        """The recipe's."""
        return self.recipe.adapter

    @property
    def targets(self) -> State:
        """The labels that the training data have."""
        return self.prepared.targets

    @property
    def validation(self) -> Any:
        """Encoded rows that are evaluated during training, or None."""
        return self.prepared.validation

    def eval_batch(self, *, all_logits: bool) -> tuple[int, int | None]:
        """Return the most rows and tokens of one forward pass in evaluation; see the function."""
        return eval_batch(self.recipe, self.machine, self.task.vocabulary(self.tokenizer), all_logits=all_logits)

    def divided(self, micro_batch: int) -> Job:
        """Cut the same work into micro-batches of at most so many rows; the global batches and their order stay."""
        division = replace(self.division, micro_batch=micro_batch)
        batches, train = self.batches, self.train
        if batches is not None:
            batches = data_batches.GlobalBatches(batches.lengths, division, batches.seed, batches.apart)
        if isinstance(train, data_batches.StreamedBatches):
            train = replace(train, division=division)
        return replace(self, division=division, batches=batches, train=train)

    def remembering(self, prepared: Prepared) -> Job:
        """Take the same rows, with features that were added to them; `lengths` and order stay."""
        return replace(self, prepared=prepared, train=data_batches.Rows(prepared.train, self.task))

    def load(self) -> tuple[float | None, tuple[int, int]]:
        """Look through the first epoch's micro-batches on every rank.

        Returns:
            The share of padding, None for a stream; and rows and tokens a row of the largest micro-batch: of a stream,
            the most that there can be.
        """
        if self.batches is None or self.lengths is None:
            return None, (self.division.micro_batch, self.recipe.data.max_length)
        ranks = [replace(self.division, rank=rank) for rank in range(self.division.world_size)]
        tokens = cells = 0
        largest = (0, 0)
        for batch in itertools.islice(self.batches.global_batches(), BATCHES_LOOKED_AT):
            for rows in itertools.chain.from_iterable(division.share(batch) for division in ranks):
                # A row that only fills a rank is as long as any other.
                held: list[int] = self.lengths[[row for row in rows if row >= 0] or [~rows[0]]].tolist()
                tokens += sum(held)
                cells += len(held) * max(held)
                largest = max(largest, (len(held), max(held)), key=lambda shape: shape[0] * shape[1])
        return 1.0 - tokens / cells, largest

    def loader(self, *, pin: bool = False) -> DataLoader[Any]:
        """Load this rank's micro-batches."""
        return data_batches.train_loader(self.train, self.batches, self.collate, pin=pin)

    @property
    def collate(self) -> Callable[[list[Any]], Batch]:
        """Makes a batch of rows, or of lists of rows that share a sequence; processes of the loader can take it."""
        return partial(self.task.collate, processor=self.tokenizer, state=self.targets)

    def sample(self, device: torch.device) -> Iterator[Batch]:
        """Give training batches on a device: the same on every rank, whatever the micro-batch."""
        division = data_batches.Division(SAMPLE_ROWS, SAMPLE_ROWS)
        batches = None if self.batches is None else data_batches.GlobalBatches(self.batches.lengths, division, seed=0)
        train = self.train
        if isinstance(train, data_batches.StreamedBatches):
            train = data_batches.StreamedBatches(train.stream, division, train.seed)
        for batch in data_batches.train_loader(train, batches, self.collate, pin=False):
            yield {key: value.to(device) for key, value in batch.items() if key not in COUNTS}

    def typical(self, device: torch.device, count: int) -> list[Batch]:
        """Give micro-batches of this run on a device, from short rows to long ones: the same on every rank."""
        # The batches of the first rank, on every rank: all must come to the same choice.
        division = replace(self.division, rank=0)
        train: Any = self.train
        if self.batches is None:
            stream = data_batches.StreamedBatches(train.stream, division, train.seed)
            batches = list(itertools.islice(data_batches.train_loader(stream, None, self.collate, pin=False), count))
        else:
            first = data_batches.GlobalBatches(self.batches.lengths, division, self.batches.seed)
            shares = [division.share(batch)[0] for batch in first.spread(count)]
            batches = [self.collate([train[row] for row in rows]) for rows in shares]
        return [{key: value.to(device) for key, value in batch.items() if key not in COUNTS} for batch in batches]

    def probe(self, device: torch.device) -> Batch:
        """Give a few training rows as one plain batch, never packed: what any user of the saved model would feed it."""
        if not isinstance(self.train, data_batches.Rows | data_batches.PackedRows):
            return next(self.sample(device))
        rows = self.train if isinstance(self.train, data_batches.Rows) else self.train.rows
        batch = self.collate([rows[index] for index in range(min(SAMPLE_ROWS, len(rows)))])
        return {key: value.to(device) for key, value in batch.items()}
