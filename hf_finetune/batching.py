"""Which rows form a global batch, which of them this rank and micro-batch take, and how documents are packed.

The global batches of an epoch follow from the seed alone. Ranks and micro-batches only divide them, so the same recipe
is the same optimisation on any number of devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

if TYPE_CHECKING:
    from hf_finetune.tasks import Collator, Encoded, Task

Lengths = Sequence[int] | np.ndarray[Any, Any] | torch.Tensor
"""Tokens of each row."""

BATCHES_PER_POOL = 50
"""Length grouping sorts pools of so many global batches, so that an epoch stays random at any larger scale."""


def lengths_of(encoded: Any) -> np.ndarray[Any, Any]:
    """Tokens of each encoded row, (rows,) int64; read column by column: `encoded["length"]` alone goes row by row."""
    return np.asarray(encoded.with_format("numpy")["length"][:], dtype=np.int64)


@dataclass(frozen=True)
class Division:
    """How a global batch is divided among ranks and micro-batches."""

    batch_size: int
    """Rows of a global batch."""
    micro_batch: int
    """Most rows of one forward pass on one rank."""
    rank: int = 0
    world_size: int = 1

    @property
    def accumulation(self) -> int:
        """Micro-batches that each rank runs for one full global batch."""
        return self.micro_batches(self.batch_size)

    def micro_batches(self, rows: int) -> int:
        """Micro-batches that each rank runs for a global batch of so many rows; equal on all ranks."""
        return -(-rows // (self.world_size * self.micro_batch))

    def share(self, global_batch: Sequence[int]) -> list[list[int]]:
        """The micro-batches of this rank; sizes differ by one row at most.

        A rank that would get no row gets the first one as `~row`: every rank must take part in every backward pass,
        and `Rows` masks the labels of negative indices.
        """
        parts = self.world_size * self.micro_batches(len(global_batch))
        shares = []
        for part in range(self.rank, parts, self.world_size):
            rows = list(global_batch[part * len(global_batch) // parts : (part + 1) * len(global_batch) // parts])
            shares.append(rows or [~global_batch[0]])
        return shares


class Rows(Dataset[Any]):
    """Encoded rows by index; `~index` is the same row with its labels masked."""

    def __init__(self, encoded: Any, task: Task) -> None:
        self.encoded = encoded
        self.task = task

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        columns = self.encoded[[index if index >= 0 else ~index for index in indices]]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return [row if index >= 0 else self.task.masked(row) for index, row in zip(indices, rows, strict=True)]


class PackedRows(Dataset[Any]):
    """Sequences of several documents by index: each a list of encoded rows."""

    def __init__(self, rows: Rows, packs: Sequence[Sequence[int]]) -> None:
        self.rows = rows
        self.packs = packs

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Any:
        if index >= 0:
            return self.rows.__getitems__(list(self.packs[index]))
        return self.rows.__getitems__([~row for row in self.packs[~index]])


class GlobalBatches(Sampler[list[int]]):
    """Batch sampler: this rank's micro-batches of every global batch of the epoch.

    Args:
        lengths: Tokens of each row; rows of similar length come together in one global batch. Pass a constant length
            for a plain shuffle.
        division: Global batch, micro-batch, rank.
        seed: With the epoch, fixes the order.
    """

    def __init__(self, lengths: Lengths, division: Division, seed: int) -> None:
        self.lengths = torch.as_tensor(lengths, dtype=torch.int64)
        self.division = division
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; the Trainer calls it."""
        self.epoch = epoch

    def global_batches(self) -> Iterator[list[int]]:
        """Row numbers of each global batch of the epoch, in order; the last may be smaller."""
        size = self.division.batch_size
        for by_length, order in self._pools():
            yield from (by_length[place * size : (place + 1) * size].tolist() for place in order)

    def _pools(self) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """The rows of each pool, short ones first, and the order in which its batches, cut off one by one, come."""
        size = self.division.batch_size
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        for start in range(0, len(order), size * BATCHES_PER_POOL):
            pool = order[start : start + size * BATCHES_PER_POOL]
            full, rest = divmod(len(pool), size)
            # The short batch stays at the end of the epoch, where accumulation may be smaller.
            batches = [*torch.randperm(full, generator=generator).tolist(), *range(full, full + bool(rest))]
            yield pool[self.lengths[pool].argsort(stable=True)], batches

    def spread(self, count: int) -> list[list[int]]:
        """So many global batches of the epoch, from short rows to long ones, at equal distances."""
        size, found = self.division.batch_size, list[np.ndarray[Any, Any]]()
        for by_length, order in self._pools():
            ends = np.minimum((np.array(order) + 1) * size, len(by_length)) - 1
            found.append(self.lengths[by_length].numpy()[ends])
        by_longest = np.concatenate(found).argsort(kind="stable")
        places = [int(by_longest[(2 * place + 1) * len(by_longest) // (2 * count)]) for place in range(count)]
        # Only these are made: all batches of an epoch as lists are 40 bytes a row.
        first, chosen = 0, dict[int, list[int]]()
        for by_length, order in self._pools():
            for place in {place for place in places if first <= place < first + len(order)}:
                start = order[place - first] * size
                chosen[place] = by_length[start : start + size].tolist()
            first += len(order)
        return [chosen[place] for place in places]

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.global_batches():
            yield from self.division.share(batch)

    def __len__(self) -> int:
        full, rest = divmod(len(self.lengths), self.division.batch_size)
        return full * self.division.accumulation + (self.division.micro_batches(rest) if rest else 0)


class Endless(Protocol):
    """A source of encoded rows that never ends."""

    def rows(self, seed: int) -> Iterator[Encoded]:
        """Encoded rows, in the same order on every rank."""


class StreamedBatches(IterableDataset[Any]):
    """This rank's micro-batches of an endless stream; every rank reads the same rows and takes its share."""

    def __init__(self, stream: Endless, division: Division, seed: int) -> None:
        self.stream = stream
        self.division = division
        self.seed = seed

    def __iter__(self) -> Iterator[list[Any]]:
        source = self.stream.rows(self.seed)
        while True:
            batch = [next(source) for _ in range(self.division.batch_size)]
            for share in self.division.share(range(len(batch))):
                yield [batch[index] for index in share]


class _Loader(DataLoader[Any]):
    """A DataLoader that hands the epoch on to its batch sampler."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        if isinstance(self.batch_sampler, GlobalBatches):
            self.batch_sampler.set_epoch(epoch)


def train_loader(
    rows: Dataset[Any], batches: GlobalBatches | None, collator: Collator, *, pin: bool
) -> DataLoader[Any]:
    """Loader of collated micro-batches; already divided among ranks, so Accelerate must not divide them again.

    Args:
        rows: `Rows` or `PackedRows` with `batches`; `StreamedBatches` without.
        batches: The batch sampler.
        collator: Pads and stacks rows.
        pin: Whether to use page-locked memory.
    """
    # Its own generator: a DataLoader draws a seed at every start, and evaluation must not shift the training's RNG.
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"collate_fn": _Counting(collator), "pin_memory": pin, "generator": generator}
    if batches is None:
        return _Loader(rows, batch_size=None, **options)
    return _Loader(rows, batch_sampler=batches, **options)


@dataclass(frozen=True)
class _Counting:
    """Adds `tokens`, the number of real tokens, and `squares`, of each document's: a packed batch has no mask."""

    collator: Collator

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        documents = [document for row in rows for document in (row if isinstance(row, list) else [row])]
        lengths = [len(document["input_ids"]) for document in documents]
        counts = {"tokens": torch.tensor(sum(lengths)), "squares": torch.tensor(sum(n * n for n in lengths))}
        return {**self.collator(rows), **counts}


def eval_loader(
    rows: Rows, lengths: Lengths, division: Division, collator: Collator, tokens: int | None = None
) -> DataLoader[Any]:
    """Loader of a whole split, longest rows first; batches carry `row_ids`, -1 for rows that only fill a rank.

    Args:
        rows: The encoded split.
        lengths: Tokens of each row.
        division: `batch_size` rows of one forward pass over all ranks at most.
        collator: Pads and stacks rows.
        tokens: Most tokens of one rank's rows, padding included, but a row is never left out; None sets no bound.
    """
    batches = _EvalBatches(lengths, division, tokens)
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        _Numbered(rows), batch_sampler=batches, collate_fn=_NumberedCollator(collator), generator=generator
    )


class _EvalBatches(Sampler[list[int]]):
    """Batch sampler: this rank's rows of each batch of `by_length`."""

    def __init__(self, lengths: Lengths, division: Division, tokens: int | None) -> None:
        self.division = division
        self.batches = list(_by_length(lengths, division.micro_batch, tokens, division.world_size))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        ranks = self.division.world_size
        for batch in self.batches:
            indices: list[int] = batch.tolist()
            # Every rank gets equally many rows, so that results can be gathered.
            indices += [~indices[0]] * (-len(indices) % ranks)
            yield indices[self.division.rank :: ranks]


def by_length(lengths: Lengths, most: int, tokens: int | None = None) -> Iterator[list[int]]:
    """Row numbers of batches, longest rows first.

    Args:
        lengths: Tokens of each row.
        most: Most rows of a batch.
        tokens: Most tokens of a batch, padding included, but a row is never left out; None sets no bound.
    """
    yield from (batch.tolist() for batch in _by_length(lengths, most, tokens, ranks=1))


def _by_length(lengths: Lengths, most: int, tokens: int | None, ranks: int) -> Iterator[torch.Tensor]:
    """The same for several ranks that share a batch; `most` and `tokens` are those of each."""
    sizes = torch.as_tensor(lengths, dtype=torch.int64)
    order = sizes.argsort(descending=True, stable=True)
    start = 0
    while start < len(order):
        size = most
        if tokens is not None:
            size = max(1, min(size, tokens // max(1, int(sizes[order[start]]))))
        yield order[start : start + size * ranks]
        start += size * ranks


class _Numbered(Dataset[Any]):
    """Rows with their numbers, -1 for masked ones."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows

    def __getitem__(self, index: int) -> Any:
        return max(index, -1), self.rows[index]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [(max(index, -1), row) for index, row in zip(indices, self.rows.__getitems__(indices), strict=True)]


@dataclass(frozen=True)
class _NumberedCollator:
    collator: Collator

    def __call__(self, numbered: list[tuple[int, Any]]) -> dict[str, torch.Tensor]:
        ids, rows = zip(*numbered, strict=True)
        return {**self.collator(list(rows)), "row_ids": torch.tensor(ids)}
