"""Global batches, their division among ranks and micro-batches, and the packing of documents.

The global batches of an epoch follow from the seed alone. Ranks and micro-batches only divide them, so the same recipe
is the same optimisation on any number of devices.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info
from torch.utils.data._utils import worker as workers

from hf_finetune.data.splits import NAMES, SplitReport, counts_of
from hf_finetune.data.stream import Stream
from hf_finetune.errors import FinetuneError
from hf_finetune.tasks.base import IGNORE, Batch, Features, Task

Collator = Callable[[list[Any]], Batch]
STREAMED, FAILED = "streamed", "failed"
COUNTED = ("rows", "tokens", "slots", "squares")
"""Rows of a micro-batch, their tokens, these with padding, and the sum of each document's tokens squared."""
_PR_SET_PDEATHSIG = 1
Array = np.ndarray[Any, Any]
Lengths = Sequence[int] | Array | torch.Tensor  # tokens of each row

BATCHES_PER_POOL = 50
"""Length grouping sorts pools of so many global batches, so that an epoch stays random at any larger scale."""


def lengths_of(encoded: Any) -> Array:
    """Size of each encoded row, (rows,) int64; read column by column: `encoded["size"]` alone goes row by row."""
    return np.asarray(encoded.with_format("numpy")["size"][:], dtype=np.int64)


@dataclass(frozen=True)
class Division:
    """The division of a global batch among ranks and micro-batches."""

    batch_size: int
    micro_batch: int  # most rows of one forward pass on one rank
    rank: int = 0
    world_size: int = 1

    @property
    def accumulation(self) -> int:
        """Micro-batches that each rank runs for one full global batch."""
        return self.micro_batches(self.batch_size)

    def micro_batches(self, rows: int) -> int:
        """Return micro-batches that each rank runs for a global batch of so many rows; equal on all ranks."""
        return -(-rows // (self.world_size * self.micro_batch))

    def share(self, global_batch: Sequence[int]) -> list[list[int]]:
        """Return the micro-batches of this rank; sizes differ by one row at most.

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
    """Features rows by index; `~index` is the same row with its labels masked."""

    def __init__(self, encoded: Any, task: Task, passes: GlobalBatches | None = None) -> None:
        self.encoded = encoded
        self.task = task
        self.passes = passes if task.draws else None  # tells the pass that is on, of training rows
        self.partner = task.partner(len(encoded))

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        # The loader calls it with a whole batch: one read of the Arrow file instead of one a row.
        numbers = [index if index >= 0 else ~index for index in indices]
        rows = self._read(numbers)
        if self.partner:
            others = self._read([(number + self.partner) % len(self) for number in numbers])
            rows = [{**row, "partner": other} for row, other in zip(rows, others, strict=True)]
        if self.passes is not None:
            rows = [self.task.drawn(row, self.passes.seed, self.passes.epoch) for row in rows]
        return [row if index >= 0 else self.task.masked(row) for index, row in zip(indices, rows, strict=True)]

    def _read(self, numbers: list[int]) -> list[dict[str, Any]]:
        columns = self.encoded[numbers]
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


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

    Rows of similar length come together in one global batch; a constant length gives a plain shuffle. The seed and the
    number of the epoch fix the order.

    Args:
        lengths: Of the rows.
        division: Of a global batch.
        seed: Of the order.
        apart: Of each row, a number: rows with the same one come into one global batch only where there are too few
            others. Lengths then decide nothing.
    """

    def __init__(self, lengths: Lengths, division: Division, seed: int, apart: Lengths | None = None) -> None:
        self.lengths = torch.as_tensor(lengths, dtype=torch.int64)
        self.apart = None if apart is None else torch.as_tensor(apart, dtype=torch.int64)
        self.division = division
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass; the Trainer calls it."""
        self.epoch = epoch

    def global_batches(self) -> Iterator[list[int]]:
        """Yield row numbers of each global batch of the epoch, in order; the last may be smaller."""
        size = self.division.batch_size
        for by_length, order in self._pools():
            yield from (by_length[place * size : (place + 1) * size].tolist() for place in order)

    def _pools(self) -> Iterator[tuple[torch.Tensor, list[int]]]:
        """The rows of each pool, short ones first, and the order in which its batches, cut off one by one, come."""
        size = self.division.batch_size
        # A prime above any number of epochs: no two pairs of seed and epoch share an order.
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator)
        for start in range(0, len(order), size * BATCHES_PER_POOL):
            pool = order[start : start + size * BATCHES_PER_POOL]
            full, rest = divmod(len(pool), size)
            # The short batch stays at the end of the epoch, where accumulation may be smaller.
            batches = [*torch.randperm(full, generator=generator).tolist(), *range(full, full + bool(rest))]
            yield pool[self._ordered(pool)], batches

    def _ordered(self, pool: torch.Tensor) -> torch.Tensor:
        """Places of a shuffled pool's rows: short ones first, or each number once, then each once more, and so on."""
        if self.apart is None:
            return self.lengths[pool].argsort(stable=True)
        kinds = torch.from_numpy(np.unique(self.apart[pool].numpy(), return_inverse=True)[1])
        by_kind = kinds.argsort(stable=True)
        counts = kinds.bincount()
        turn = torch.empty_like(kinds)
        turn[by_kind] = torch.arange(len(kinds)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        # Numbers come in the order of their first rows, in every turn: so equal ones are as far apart as can be.
        first = torch.empty_like(counts)
        first[kinds[turn == 0]] = torch.arange(len(counts))
        return (turn * len(counts) + first[kinds]).argsort(stable=True)

    def spread(self, count: int) -> list[list[int]]:
        """So many global batches of the epoch, from short rows to long ones, at equal distances."""
        size, found = self.division.batch_size, list[Array]()
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


# The rows of a micro-batch of a stream, and what was used up for it, (B + counts,) int64: the number of rows of each
# lane of the global batch, then the counts of `SplitReport`.
Streamed = tuple[list[Any], torch.Tensor]


@dataclass(eq=False)
class StreamedBatches(IterableDataset[Any]):
    """This rank's micro-batches of an endless stream, encoded by this rank alone; see `Lanes`."""

    stream: Stream
    division: Division
    seed: int
    asked_workers: int = 0  # processes that may encode, besides this one
    done: int = 0
    """Global batches that were trained on before: their micro-batches are None, and nothing is encoded for them."""
    used: tuple[int, ...] = ()  # rows that each lane has used up for these; empty at the beginning

    @property
    def workers(self) -> int:
        """Processes that encode: each has the same micro-batches in every global batch, and so lanes of its own."""
        accumulation = self.division.accumulation
        return max(count for count in range(self.asked_workers + 1) if count == 0 or accumulation % count == 0)

    def __iter__(self) -> Iterator[Streamed | FinetuneError | None]:
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        # `datasets` would read only a share of the files here; what this process encodes is chosen by lanes.
        workers._worker_info = None
        shares = self.division.share(range(self.division.batch_size))[first::step]
        # The Trainer skips as many batches as it has trained on, whatever they are.
        yield from itertools.repeat(None, self.done * len(shares))
        size, filler = self.division.batch_size, list[Features]()
        own = {place for share in shares for place in share if place >= 0}
        try:
            lanes = self.stream.lanes(self.seed, own, self.used or [self.done] * size)
            for share in itertools.cycle(shares):
                rows, used, report = lanes.take([place for place in share if place >= 0])
                if not rows:  # every rank must take part in every backward pass
                    rows = filler = filler or [self.stream.filler(self.seed)]
                yield rows, torch.tensor([*(used.get(place, 0) for place in range(size)), *counts_of(report)])
        except FinetuneError as error:
            if worker is None:
                raise
            yield error  # raised here, it would reach the trainer as another error


def merged(counts: torch.Tensor) -> torch.Tensor:
    """Add the counts of several `Streamed` together, (C,) from (N, C): sums, and of the longest row the maximum."""
    # The counts of `SplitReport` are the last columns.
    whole, column = counts.sum(0), counts.shape[1] - len(NAMES) + NAMES.index("longest")
    whole[column] = counts[:, column].max()
    return whole


def report(counts: torch.Tensor) -> SplitReport:
    """Return the report of what `counts` counts."""
    return SplitReport(*counts[-len(NAMES) :].to(torch.int64).tolist())


class _Loader(DataLoader[Any]):
    """A DataLoader that hands the epoch on to its batch sampler."""

    # The Trainer calls it of loaders that have it; torch's own has not, and Accelerate's is not in between.
    def set_epoch(self, epoch: int) -> None:
        """Choose the order of the next pass."""
        if isinstance(self.batch_sampler, GlobalBatches):
            self.batch_sampler.set_epoch(epoch)


def train_loader(
    rows: Dataset[Any], batches: GlobalBatches | None, collator: Collator, *, pin: bool
) -> DataLoader[Any]:
    """Return a loader of collated micro-batches; already divided among ranks, so Accelerate must not divide them again.

    Rows are `Rows` or `PackedRows` with `batches`, or `StreamedBatches` without; `pin` takes page-locked memory.
    """
    # Its own generator: a DataLoader draws a seed at every start, and evaluation must not shift the training's RNG.
    generator = torch.Generator().manual_seed(0)
    collate = partial(_counted, collator)
    options: dict[str, Any] = {"collate_fn": collate, "pin_memory": pin, "generator": generator}
    if isinstance(rows, StreamedBatches):
        if rows.workers:
            # Set before the processes are forked, or the tokenizers in them warn that they turn it off.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
            options |= {"num_workers": rows.workers, "worker_init_fn": _end_with_parent}
        return _Loader(rows, batch_size=None, **options)
    if isinstance(rows, Rows):
        rows = Rows(rows.encoded, rows.task, batches)
    return _Loader(rows, batch_sampler=batches, **options)


def _end_with_parent(worker: int) -> None:
    """Have a process of the loader killed with its parent: it holds the lock of the run folder, too."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _counted(collator: Collator, found: list[Any] | Streamed | FinetuneError | None) -> dict[str, Any]:
    """Collate, and add what throughput is measured by, `COUNTED`: the batch alone does not tell what is padding.

    Of a stream, add what was used up, `STREAMED`, or why there is no batch, `FAILED`.
    """
    if found is None:
        return {}
    if isinstance(found, FinetuneError):
        return {FAILED: found}
    rows, used = found if isinstance(found, tuple) else (found, None)
    # Documents that share a sequence attend to themselves alone, so squares are summed over documents.
    sizes = [[document["size"] for document in (row if isinstance(row, list) else [row])] for row in rows]
    flat = list(itertools.chain.from_iterable(sizes))
    counts = (len(rows), sum(flat), len(rows) * max(map(sum, sizes)), sum(size * size for size in flat))
    batch = {**collator(rows), **{name: torch.tensor(n) for name, n in zip(COUNTED, counts, strict=True)}}
    return batch if used is None else {**batch, STREAMED: used}


def eval_loader(
    rows: Rows, lengths: Lengths, division: Division, collator: Collator, tokens: int | None = None
) -> DataLoader[Any]:
    """Return a loader of a whole split, longest rows first; batches carry `row_ids`, -1 for rows that only fill a rank.

    A forward pass has `division.batch_size` rows over all ranks at most; `tokens` as for `by_length`.
    """
    found = by_length(lengths, division.micro_batch, tokens, division.world_size)
    batches = [torch.tensor(batch) for batch in found]  # lists would be 40 bytes a row
    generator = torch.Generator().manual_seed(0)  # as in `train_loader`
    whole = _EvalBatches(rows, batches, division, collator)
    return DataLoader(whole, batch_size=None, sampler=range(len(batches)), generator=generator)


def predicted(
    batches: Iterable[dict[str, Any]], predict: Callable[[Batch], dict[str, torch.Tensor]], shown: Any = None
) -> dict[str, Array]:
    """Return the predictions of a whole split, in its order, from batches with `row_ids`; `shown.done` counts rows."""
    ids: list[int] = []
    found: list[dict[str, torch.Tensor]] = []
    for batch in batches:
        rows = batch.pop("row_ids").tolist()
        found.append({name: values.cpu() for name, values in predict(batch).items()})
        ids += rows
        if shown is not None:
            shown.done += len(rows)
    order = np.argsort(np.asarray(ids), kind="stable")

    def joined(parts: list[torch.Tensor]) -> Array:
        if parts[0].ndim > 1:
            # Each batch is as wide as its longest row.
            width = max(part.shape[1] for part in parts)
            pads = [[0, 0] * (part.ndim - 2) + [0, width - part.shape[1]] for part in parts]
            parts = [torch.nn.functional.pad(part, pad, value=IGNORE) for part, pad in zip(parts, pads, strict=True)]
        values: Array = torch.cat(parts).numpy()[order]
        return values

    return {name: joined([part[name] for part in found]) for name in found[0]}


class _EvalBatches(Dataset[Any]):
    """This rank's part of each batch, collated; without a length, which the Trainer would take for that of the rows."""

    def __init__(self, rows: Rows, batches: list[torch.Tensor], division: Division, collator: Collator) -> None:
        self.rows, self.batches, self.division, self.collator = rows, batches, division, collator

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        ranks, numbers = self.division.world_size, self.batches[place].tolist()
        # Every rank gets equally many rows, so that results can be gathered.
        numbers += [~numbers[0]] * (-len(numbers) % ranks)
        own = numbers[self.division.rank :: ranks]
        return {**self.collator(self.rows.__getitems__(own)), "row_ids": torch.tensor(own).clamp(min=-1)}


def by_length(lengths: Lengths, most: int, tokens: int | None = None, ranks: int = 1) -> Iterator[list[int]]:
    """Yield row numbers of batches, longest rows first: `most` rows at most for each rank that shares a batch.

    `tokens` bounds the tokens of one rank's rows, padding included, but a row is never left out; None sets no bound.
    """
    # Longest first, so that a batch that does not fit into memory fails at once.
    sizes = torch.as_tensor(lengths, dtype=torch.int64)
    order = sizes.argsort(descending=True, stable=True)
    start = 0
    while start < len(order):
        size = rows_of(int(sizes[order[start]]), most, tokens)
        yield order[start : start + size * ranks].tolist()
        start += size * ranks


def rows_of(longest: int, most: int, tokens: int | None) -> int:
    """Return the rows of a batch on one rank whose longest has so many tokens; the bounds are those of `by_length`."""
    return most if tokens is None else max(1, min(most, tokens // max(1, longest)))
