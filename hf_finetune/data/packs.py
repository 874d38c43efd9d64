"""Documents that share a sequence: which ones, so that few places stay empty."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


class Packs(Sequence[list[int]]):
    """The documents of each sequence, by number, in arrays: ten million documents need less than a gigabyte.

    Args:
        documents: Of all sequences, one after the other.
        starts: Where each sequence begins in them, and the end: one more than there are sequences.
    """

    def __init__(self, documents: Array, starts: Array) -> None:
        self.documents, self.starts = documents, starts

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> list[int]:  # type: ignore[override]  # nobody takes slices
        if not 0 <= index < len(self):
            raise IndexError(index)
        documents: list[int] = self.documents[self.starts[index] : self.starts[index + 1]].tolist()
        return documents

    def sums(self, lengths: Array) -> Array:
        """Return the tokens of each sequence, from those of each document."""
        before = np.concatenate([[0], np.cumsum(lengths[self.documents], dtype=np.int64)])
        return np.diff(before[self.starts])


def pack(lengths: Sequence[int] | Array, capacity: int) -> Packs:
    """Put documents into as few sequences as a greedy rule finds: best-fit decreasing bin packing.

    Source: D. S. Johnson, "Near-optimal bin packing algorithms", 1973: at most 11/9 of the optimum plus a constant.

    Args:
        lengths: Tokens of each document, each at most `capacity`.
        capacity: Tokens of a sequence.

    Returns:
        Document numbers of each sequence: longest first, and in their order where they are equally long.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    order = np.argsort(-sizes, kind="stable").astype(np.int32 if len(sizes) < 2**31 else np.int64)
    ordered = sizes[order]
    places = np.empty_like(order)  # the sequence of each document, in that order
    bounds = [*np.flatnonzero(np.diff(ordered, prepend=-1)).tolist(), len(ordered)]
    rooms: list[int] = []  # tokens that still fit into some sequence, sorted, and below these sequences
    opened: dict[int, list[Array]] = {}
    sequences = 0

    def put(room: int, some: Array) -> None:
        # Sequences that are full are forgotten.
        if room > 0 and len(some):
            if room not in opened:
                bisect.insort(rooms, room)
            opened.setdefault(room, []).append(some)

    # Documents of one length are placed together: the first sequence that they fit best takes as many as it can, then
    # the next one, which is where they would go one by one.
    for begin, end in itertools.pairwise(bounds):
        length, done = int(ordered[begin]), begin
        while done < end:
            best = bisect.bisect_left(rooms, length)
            room = rooms.pop(best) if best < len(rooms) else capacity
            each = max(1, room // length) if length else end - done
            wanted = -(-(end - done) // each)
            if room in opened:
                parts = opened.pop(room)
                takers = parts[0] if len(parts) == 1 else np.sort(np.concatenate(parts), kind="stable")
                put(room, takers[wanted:])
                takers = takers[:wanted]
            else:
                takers = np.arange(sequences, sequences + wanted, dtype=order.dtype)
                sequences += wanted
            taken = np.repeat(takers, each)[: end - done]
            places[done : done + len(taken)] = taken
            done += len(taken)
            last = len(taken) - each * (len(takers) - 1)
            put(room - each * length, takers[:-1])
            put(room - last * length, takers[-1:])
    # Stable: the documents of a sequence stay in the order in which it took them.
    documents = order[np.argsort(places, kind="stable")]
    counts = np.bincount(places, minlength=sequences) if len(places) else np.empty(0, np.int64)
    return Packs(documents, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))
