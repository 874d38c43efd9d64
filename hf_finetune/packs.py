"""Which documents share a sequence, in arrays: what ten million documents need stays below a gigabyte."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Packs(Sequence[list[int]]):
    """The documents of each sequence, by number.

    Args:
        documents: Of all sequences, one after the other.
        starts: Where each sequence begins in them, and the end: one more than there are sequences.
    """

    documents: Array
    starts: Array

    def __len__(self) -> int:
        return len(self.starts) - 1

    @overload
    def __getitem__(self, index: int) -> list[int]: ...

    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...

    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[one] for one in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        documents: list[int] = self.documents[self.starts[index] : self.starts[index + 1]].tolist()
        return documents

    def sums(self, lengths: Array) -> Array:
        """Tokens of each sequence, from those of each document."""
        before = np.concatenate([[0], np.cumsum(lengths[self.documents], dtype=np.int64)])
        return np.diff(before[self.starts])


def pack(lengths: Sequence[int] | Array, capacity: int) -> Packs:
    """Put documents into as few sequences as a greedy rule finds: best-fit decreasing bin packing.

    Source: D. S. Johnson, "Near-optimal bin packing algorithms", 1973: at most 11/9 of the optimum plus a constant.
    Documents of one length are placed together: the first sequence that they fit best takes as many as it can, then the
    next one, which is where they would go one by one.

    Args:
        lengths: Tokens of each document, each at most `capacity`.
        capacity: Tokens of a sequence.

    Returns:
        Document numbers of each sequence: longest first, and in their order where they are equally long.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable").astype(np.int32 if len(sizes) < 2**31 else np.int64)
    ordered = sizes[order]
    places = np.empty_like(order)
    """The sequence of each document, in that order."""
    bounds = [*np.flatnonzero(np.diff(ordered, prepend=-1)).tolist(), len(ordered)]
    room, sequences = _Room(), 0
    for begin, end in itertools.pairwise(bounds):
        length, done = int(ordered[begin]), begin
        while done < end:
            free, open_ = room.least(length) or (capacity, None)
            each = max(1, free // length) if length else end - done
            wanted = -(-(end - done) // each)
            if open_ is None:
                open_ = np.arange(sequences, sequences + wanted, dtype=order.dtype)
                sequences += wanted
            elif len(open_) > wanted:
                room.put(free, open_[wanted:])
                open_ = open_[:wanted]
            taken = np.repeat(open_, each)[: end - done]
            places[done : done + len(taken)] = taken
            done += len(taken)
            last = len(taken) - each * (len(open_) - 1)
            room.put(free - each * length, open_[:-1] if last < each else open_)
            if last < each:
                room.put(free - last * length, open_[-1:])
    # Stable: the documents of a sequence stay in the order in which it took them.
    documents = order[np.argsort(places, kind="stable")]
    counts = np.bincount(places, minlength=sequences) if len(places) else np.empty(0, np.int64)
    return Packs(documents, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


class _Room:
    """Sequences that are not full, by the tokens that still fit."""

    def __init__(self) -> None:
        self._free: list[int] = []
        """Sorted."""
        self._open: dict[int, list[Array]] = {}

    def least(self, length: int) -> tuple[int, Array] | None:
        """Take out those with the least room of at least `length`: the room, and the sequences in their order."""
        place = bisect.bisect_left(self._free, length)
        if place == len(self._free):
            return None
        free = self._free.pop(place)
        parts = self._open.pop(free)
        return free, parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts), kind="stable")

    def put(self, free: int, sequences: Array) -> None:
        """Sequences, in their order, that have so much room left; those that are full are forgotten."""
        if free <= 0 or not len(sequences):
            return
        if free not in self._open:
            bisect.insort(self._free, free)
            self._open[free] = []
        self._open[free].append(sequences)
