"""Rows of a stream by their place in the global batch, so that a rank encodes only those of its own places.

Each of the B places of a global batch has a lane: of every B rows of the stream it gets one, pass after pass. A row
that is dropped is replaced by the next one of its lane. So every global batch is full, it is the same on any number of
ranks, and a run that goes on needs to know only how many rows each lane has used up: it reads these, and encodes none
of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

from hf_finetune.data.splitreport import SplitReport

if TYPE_CHECKING:
    from hf_finetune.errors import DataError
    from hf_finetune.tasks.base import Features

    Fate = tuple[Features | None, SplitReport]
    """An encoded row, None where it is dropped, and its counts."""

PATIENCE = 20
"""Passes in which not one row of a rank's lanes may be usable before it gives up."""


class Raw(NamedTuple):
    """A row as it was read."""

    row: dict[str, Any]
    number: int
    """Number of the pass, from 0."""


@dataclass(frozen=True)
class Taken:
    """Rows of a micro-batch."""

    rows: list[Features]
    """One for each place that was asked for."""
    used: dict[int, int]
    """By place: how many rows of its lane were used up for it, dropped ones included."""
    report: SplitReport
    """What became of these rows, as far as they belong to the first pass."""


class Lanes:
    """Lanes of a stream.

    Args:
        source: Raw rows, without end.
        encode: Encodes raw rows.
        nothing_left: Makes the error for a stream of which no row can be used.
        own: Places whose lanes are wanted.
        used: How many rows each lane, one for each place of the global batch, has used up before.
    """

    def __init__(
        self,
        source: Iterator[Raw],
        encode: Callable[[list[dict[str, Any]]], list[Fate]],
        nothing_left: Callable[[SplitReport], DataError],
        own: Iterable[int],
        used: Sequence[int],
    ) -> None:
        self._source = enumerate(source)
        self._encode = encode
        self._nothing_left = nothing_left
        self._waiting: dict[int, deque[Raw]] = {place: deque() for place in own}
        self._used = list(used)
        self._pass, self._rows, self._longest = 0, 0, 0
        """Number of the present pass, its rows so far, and rows of the longest pass that is over."""
        self._in_vain, self._lost = 0, SplitReport()
        """Rows since the last one that could be used, and what became of a pass of them."""

    def take(self, places: Sequence[int]) -> Taken:
        """The next row of each of these places.

        Raises:
            DataError: A row can't be read or encoded or must not be in the data, or none can be used.
        """
        rows: dict[int, Features] = {}
        used, counted = dict.fromkeys(places, 0), [SplitReport()]
        while missing := [place for place in places if place not in rows]:
            raw = [self._next(place) for place in missing]
            for place, (_, number), (row, counts) in zip(missing, raw, self._encode([r.row for r in raw]), strict=True):
                used[place] += 1
                if number == 0:
                    counted.append(counts)
                if row is not None:
                    rows[place], self._in_vain, self._lost = row, 0, SplitReport()
                    continue
                self._in_vain += 1
                if not self._longest or self._lost.rows < self._longest:
                    self._lost += counts
            if self._longest and self._in_vain >= PATIENCE * self._longest:
                raise self._nothing_left(self._lost)
        return Taken([rows[place] for place in places], used, SplitReport.total(counted))

    def _next(self, place: int) -> Raw:
        queue = self._waiting[place]
        while not queue:
            index, raw = next(self._source)
            if raw.number != self._pass:
                self._longest, self._pass, self._rows = max(self._longest, self._rows), raw.number, 0
            self._rows += 1
            depth, owner = self._lane_of(index)
            if owner in self._waiting and depth >= self._used[owner]:
                self._waiting[owner].append(raw)
        return queue.popleft()

    def _lane_of(self, index: int) -> tuple[int, int]:
        """How many rows the lane of a row of the stream got before, and the lane.

        The lanes take turns in no regular way: of rows that are alternately usable and not, none must get only the
        latter.
        """
        turn, place = divmod(index, len(self._used))
        return turn, (place + crc32(turn.to_bytes(8, "little"))) % len(self._used)
