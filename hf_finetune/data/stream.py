"""Training rows that are read, shuffled and encoded while training, pass after pass, for data that do not fit."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from zlib import crc32

import datasets
import numpy as np

from hf_finetune.config.blocks import Data
from hf_finetune.data.encoding import COUNTS, FAULT, INDEX, MARKS, Encoder
from hf_finetune.data.loading import Cell, Wanted
from hf_finetune.data.sources import READING_ERRORS, Origins
from hf_finetune.data.splits import PART, ROW, SplitReport, check_columns, collect, nothing_left
from hf_finetune.errors import DataError, FinetuneError, Problem
from hf_finetune.tasks.base import Features

Fate = tuple[Features | None, SplitReport]  # an encoded row, None where it is dropped, and its counts
VAIN_PASSES = 20  # passes in which not one row of a rank's lanes may be usable before it gives up


class Raw(NamedTuple):
    """A row as it was read."""

    row: dict[str, Any]
    number: int  # number of the pass, from 0


class Taken(NamedTuple):
    """Rows of a micro-batch."""

    rows: list[Features]  # one for each place that was asked for
    used: dict[int, int]  # by place: how many rows of its lane were used up for it, dropped ones included
    report: SplitReport  # counts of these rows, as far as they belong to the first pass


class Lanes:
    """Rows of a stream by their place in the global batch, so that a rank encodes only those of its own places.

    Each of the B places of a global batch has a lane: of every B rows of the stream it gets one, pass after pass. A row
    that is dropped is replaced by the next one of its lane. So every global batch is full, it is the same on any number
    of ranks, and a run that goes on needs to know only how many rows each lane has used up: it reads these, and encodes
    none of them.

    Only the lanes of the places `own` are kept. `used` has the number of rows that each lane, of all places of the
    global batch, has used up before; `nothing_left` makes the error for a stream of which no row can be used.
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
        """Return the next row of each of these places.

        Raises:
            DataError: A row can't be read or encoded or must not be in the data, or none can be used.
        """
        rows: dict[int, Features] = {}
        used, counted = dict.fromkeys(places, 0), [SplitReport()]
        # A row that is dropped leaves its place open, for the next row of the same lane.
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
                    self._lost = SplitReport.total([self._lost, counts])
            if self._longest and self._in_vain >= VAIN_PASSES * self._longest:
                raise self._nothing_left(self._lost)
        return Taken([rows[place] for place in places], used, SplitReport.total(counted))

    def _next(self, place: int) -> Raw:
        queue = self._waiting[place]
        while not queue:
            index, raw = next(self._source)
            if raw.number != self._pass:
                self._longest, self._pass, self._rows = max(self._longest, self._rows), raw.number, 0
            self._rows += 1
            # The lanes take turns in no regular way: of rows that are alternately usable and not, none must get only
            # the latter. In each turn every lane gets one row, so `turn` is how many it got before.
            turn, owner = divmod(index, len(self._used))
            owner = (owner + crc32(turn.to_bytes(8, "little"))) % len(self._used)
            if owner in self._waiting and turn >= self._used[owner]:
                self._waiting[owner].append(raw)
        return queue.popleft()


BATCH = 100  # raw rows that are encoded at once
LOOKED_AT = 1_000  # rows that are looked at before training


@dataclass(frozen=True)
class Reading:
    """The raw rows of a stream, and their order."""

    data: Data
    origins: Origins
    wanted: Wanted
    seed: int  # fixes the rows that `data.limit` takes, and the mix of the sources

    @property
    def places(self) -> str:
        """Names of the sources in messages."""
        return ", ".join(origin.place for origin in self.origins.train)

    def open(self) -> datasets.IterableDataset:
        """Return the raw rows in the order of the sources, each beginning with its first row.

        Raises:
            DataError: A source is missing or empty, lacks a column, or does not fit the others.
        """
        parts = []
        for origin in self.origins.train:
            try:
                part = origin.stream(self.wanted)
                first = next(iter(part), None)
            except READING_ERRORS as error:
                raise origin.explain(error) from error
            if first is None:
                raise DataError(Problem("train split has 0 rows", key=origin.key, file=origin.place))
            check_columns(list(first), self.wanted.columns, origin)
            parts.append(part.select_columns(list(self.wanted.columns)))
        if len(parts) == 1:
            return parts[0]
        # `interleave_datasets` wants equal types, and would find them by reading ahead.
        common = {}
        for column in self.wanted.columns:
            # Types that take the cells of every part as they stand; labels keep theirs where all parts have the same.
            kinds = [None if part.features is None else part.features[column] for part in parts]
            alike = column in self.wanted.labels and kinds[0] is not None and all(kind == kinds[0] for kind in kinds)
            common[column] = kinds[0] if alike else Cell()
        try:
            return datasets.interleave_datasets(
                [part.cast(datasets.Features(common)) for part in parts],
                probabilities=list(self.origins.weights),
                seed=self.seed,
                stopping_strategy="first_exhausted",
            )
        except (TypeError, ValueError) as error:
            raise DataError(Problem(f"can't be mixed: {error}", file=self.places)) from error

    def batches(self, opened: datasets.IterableDataset, order: list[int] | None) -> Iterator[list[dict[str, Any]]]:
        """Yield one pass over what `open` returned, in `BATCH`es of raw rows.

        `order` is the seed of the shuffling; None keeps the order of the sources.

        Raises:
            DataError: The data can't be read.
        """
        # Shuffling a stream draws from a buffer, and shuffles the order of the files too.
        buffer = self.data.shuffle_buffer
        if self.data.limit is not None:
            # By the seed alone, so that every pass has the same rows.
            opened = opened.shuffle(seed=self.seed, buffer_size=buffer).take(self.data.limit)
        if order is not None:
            opened = opened.shuffle(generator=np.random.default_rng(order), buffer_size=buffer)
        rows = iter(opened)
        while True:
            batch: list[dict[str, Any]] = []
            try:
                # Not `list`, which would lose the rows before a bad one.
                batch.extend(itertools.islice(rows, BATCH))
            except READING_ERRORS as error:
                explained = [origin.explain(error) for origin in self.origins.train]
                # The most telling: that of the source whose row it is.
                located = [e for e in explained if isinstance(e, FinetuneError) and e.problems[0].line is not None]
                raise (located or explained)[0] from error
            if not batch:
                return
            yield batch


class Look(NamedTuple):
    """The first rows of a stream."""

    report: SplitReport
    whole: bool  # the stream holds no others
    marks: tuple[int, ...] = ()  # of each that has text: `encoding.MARKS`


class Stream:
    """Encoded training rows without end.

    Rows without text or without a trained token are dropped and counted; where `data.checks` makes them an error, the
    first batch that holds one raises. Other checks need all rows, and so are not made here.

    Every rank reads the same rows in the same order: it follows from the seed and the number of the pass. Mixed
    sources are read from their beginning in each pass, until the first is used up. A rank encodes only those that it
    trains on; see `Lanes`.
    """

    def __init__(self, reading: Reading, encoder: Encoder) -> None:
        self.reading, self.encoder, self.checks = reading, encoder, reading.data.checks
        self.report = SplitReport()
        """The rows of the first pass that were trained on; whoever trains counts them."""

    def rows(self, seed: int) -> Iterator[Features]:
        """Yield encoded rows in the order of `lanes`, to be looked at; raise as `Lanes.take`."""
        lanes = self.lanes(seed, [0], [0])
        while True:
            yield from lanes.take([0]).rows

    def filler(self, seed: int) -> Features:
        """Return a row that counts as nothing, for a micro-batch without any."""
        masked: Features = self.encoder.task.masked(dict(next(self.rows(seed))))
        return masked

    def lanes(self, seed: int, own: Iterable[int], used: Sequence[int]) -> Lanes:
        """Return encoded rows, the task's features and their `size`, by their place in the global batch; see `Lanes`.

        The seed and the number of the pass fix their order.
        """

        def raw() -> Iterator[Raw]:
            opened = self.reading.open()
            for number in itertools.count():
                batch: list[dict[str, Any]] = []
                for batch in self.reading.batches(opened, [seed, number]):
                    yield from (Raw(row, number) for row in batch)
                if not batch:  # or it would go on for ever
                    raise self._nothing_left(SplitReport())

        return Lanes(raw(), lambda batch: self._judged(self._encoded(batch), batch), self._nothing_left, own, used)

    def look(self, most: int = LOOKED_AT) -> Look:
        """Read and encode the first rows, in the order of the sources, as training would.

        Raises:
            DataError: Everything that training would refuse in these rows, or none can be used and there are no others.
        """
        rows: list[dict[str, Any]] = []
        problems: dict[Problem, None] = {}
        report, marks = SplitReport(), list[int]()
        with collect(problems):
            for batch in self.reading.batches(self.reading.open(), None):
                rows += batch
                # One row beyond tells that there are others.
                if len(rows) > most:
                    break
        with collect(problems):
            encoded = self._encoded(rows[:most])
            report = SplitReport.total(counts for _, counts in self._judged(encoded, rows[:most]))
            marks = encoded[MARKS]
        if problems:
            raise DataError(problems)
        if report.kept == 0 and len(rows) <= most:
            raise self._nothing_left(report)
        return Look(report, len(rows) <= most, tuple(marks))

    def _nothing_left(self, report: SplitReport) -> DataError:
        return DataError(nothing_left(report, "train", self.reading.places, self.encoder.task))

    def _encoded(self, batch: list[dict[str, Any]]) -> dict[str, list[Any]]:
        columns: dict[str, list[Any]] = {name: [row[name] for row in batch] for name in self.reading.wanted.columns}
        return self.encoder(columns | {ROW: [0] * len(batch), PART: [0] * len(batch)})

    def _judged(self, encoded: dict[str, list[Any]], batch: list[dict[str, Any]]) -> list[Fate]:
        """Return each row of a batch, if it is trained on, and its counts.

        Raises:
            DataError: Rows can't be encoded, or must not be in the data.
        """
        refused: dict[str, tuple[str, list[int]]] = {}

        def refuse(index: int, reason: str, what: str) -> None:
            refused.setdefault(reason, (what, []))[1].append(index)

        def check(index: int, name: str, what: str) -> None:
            if getattr(self.checks, name) == "error":
                refuse(index, name, f"{what}; remove it, or set data.checks.{name}: warn to drop such rows")

        for index, reasons in zip(encoded[INDEX], encoded[FAULT], strict=True):
            for what in reasons.split("\n") if reasons else ():
                refuse(index, what, what)
        for index in sorted(set(range(len(batch))) - set(encoded[INDEX])):
            check(index, "empty_text", "a row has no text, or a blank one")
        fates: list[Fate] = [(None, SplitReport(rows=1, empty=1))] * len(batch)
        names = [name for name in encoded if name not in {*COUNTS, INDEX, MARKS, FAULT, ROW, PART}]
        most, overlong = self.encoder.max_length, self.reading.data.overlong
        for place, index in enumerate(encoded[INDEX]):
            size, whole, weight = (encoded[name][place] for name in COUNTS)
            over = whole > size
            if over and overlong == "error":
                remedy = "raise data.max_length, or set data.overlong to truncate or drop"
                refuse(index, "overlong", f"a row has {whole} tokens, more than {most}; {remedy}")
            dropped = over and overlong == "drop"
            untrained = not dropped and weight == 0
            if untrained and encoded[FAULT][place] is None:
                check(index, "no_trained_token", "a row has nothing that is trained (within data.max_length)")
            counts = SplitReport(rows=1, dropped=int(dropped), untrained=int(untrained), longest=whole)
            row = None
            if not (dropped or untrained):
                row = {name: encoded[name][place] for name in names} | {"size": size}
                counts = SplitReport(rows=1, kept=1, cut=int(over), tokens=size, trained=weight, longest=whole)
            fates[index] = row, counts
        problems = []
        for what, rows in refused.values():
            # Streamed rows are shuffled, so that a number would not find the row; its text does.
            text = repr(batch[rows[0]])
            excerpt = text if len(text) <= 200 else text[:200] + "..."
            more = f" (and {len(rows) - 1} more like it)" if len(rows) > 1 else ""
            problems.append(Problem(f"{what}; the row: {excerpt}{more}", file=self.reading.places))
        if problems:
            raise DataError(problems)
        return fates
