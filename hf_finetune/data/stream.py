"""Training rows that are read, shuffled and encoded while training, pass after pass, for data that do not fit."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import datasets
import numpy as np

from hf_finetune.config.blocks import Data
from hf_finetune.data.cells import Cell, Wanted
from hf_finetune.data.encoding import INDEX, MARKS, Encoder
from hf_finetune.data.facts import SplitReport, nothing_left
from hf_finetune.data.sources import READING_ERRORS, Origins
from hf_finetune.data.splits import PART, ROW, PlacedError, check_columns
from hf_finetune.errors import DataError, FinetuneError, Problem
from hf_finetune.tasks.base import Features

if TYPE_CHECKING:
    Fate = tuple[Features | None, SplitReport]
    """An encoded row, None where it is dropped, and its counts."""


# Rows of a stream by their place in the global batch, so that a rank encodes only those of its own places.
#
# Each of the B places of a global batch has a lane: of every B rows of the stream it gets one, pass after pass. A row
# that is dropped is replaced by the next one of its lane. So every global batch is full, it is the same on any number
# of ranks, and a run that goes on needs to know only how many rows each lane has used up: it reads these, and encodes
# none of them.

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


LOOKED_AT = 1_000
"""Rows that are looked at before training."""
EXCERPT = 200
"""Characters of a raw row that a message shows: streamed rows are shuffled, so a number would not find them."""


@dataclass(frozen=True)
class Look:
    """The first rows of a stream."""

    report: SplitReport
    whole: bool
    """Whether the stream holds no others."""
    marks: tuple[int, ...] = ()
    """Of each that has text: `encoding.MARKS`."""


class Stream:
    """Encoded training rows without end.

    Rows without text or without a trained token are dropped and counted; where `data.checks` makes them an error, the
    first batch that holds one raises. Other checks need all rows, and so are not made here.

    Every rank reads the same rows in the same order: it follows from the seed and the number of the pass. Mixed
    sources are read from their beginning in each pass, until the first is used up. A rank encodes only those that it
    trains on; see `lanes`.
    """

    def __init__(self, reading: Reading, encoder: Encoder, data: Data) -> None:
        self.reading = reading
        self.encoder = replace(encoder, places=(reading.places,))
        self.overlong = data.overlong
        self.checks = data.checks
        self._report = SplitReport()

    def report(self) -> SplitReport:
        """What became of the rows in the first pass: of those that were trained on, or looked at if these are more."""
        return self._report

    def count(self, report: SplitReport) -> None:
        """Note what became of the rows in the first pass; a shorter look later does not take these counts away."""
        if report.rows >= self._report.rows:
            self._report = report

    def rows(self, seed: int) -> Iterator[Features]:
        """Encoded rows: the task's features, and their `size`.

        Args:
            seed: With the number of the pass, fixes the order.

        Raises:
            DataError: A row can't be read or encoded, is over-long and must not be, has no text or no trained token
                and `data.checks` forbids it, or a pass has no row to train on.
        """
        of_pass = SplitReport()
        for number, counts, encoded in self._encoded_batches(seed):
            if number == 0:
                of_pass += counts
                self.count(of_pass)
            yield from encoded

    def filler(self, seed: int) -> Features:
        """A row that counts as nothing, for a micro-batch without any."""
        row = next(row for _, _, encoded in self._encoded_batches(seed) for row in encoded)
        masked: Any = self.encoder.task.masked(dict(row))
        found: Features = masked
        return found

    def lanes(self, seed: int, own: Iterable[int], used: Sequence[int]) -> Lanes:
        """The same rows by their place in the global batch.

        Args:
            seed: As for `rows`.
            own: Places that are wanted.
            used: How many rows of each place, of all places of the batch, were used up before.
        """
        return Lanes(self._raw(seed), self._fates, self._nothing_left, own, used)

    def _nothing_left(self, report: SplitReport) -> DataError:
        return nothing_left(report, "train", self.reading.places)

    def _raw(self, seed: int) -> Iterator[Raw]:
        """Raw rows, pass after pass."""
        opened = self.reading.open()
        for number in itertools.count():
            is_empty = True
            for batch in self.reading.batches(opened, [seed, number]):
                for row in batch:
                    yield Raw(row, number)
                    is_empty = False
            if is_empty:
                raise self._nothing_left(SplitReport())

    def _encoded_batches(self, seed: int) -> Iterator[tuple[int, SplitReport, list[Features]]]:
        """Number of the pass, what became of some of its rows, and those that are trained on."""
        opened = self.reading.open()
        for number in itertools.count():
            of_pass = SplitReport()
            for batch in self.reading.batches(opened, [seed, number]):
                encoded, counts = self._encode(batch, of_pass.rows)
                of_pass += counts
                yield number, counts, encoded
            if of_pass.kept == 0:
                raise self._nothing_left(of_pass)

    def look(self, most: int = LOOKED_AT) -> Look:
        """Read and encode the first rows, in the order of the sources, as training would.

        Raises:
            DataError: Everything that training would refuse in these rows, or none can be used and there are no others.
        """
        rows: list[dict[str, Any]] = []
        problems: dict[Problem, None] = {}
        report, marks = SplitReport(), list[int]()
        with _collect(problems):
            for batch in self.reading.batches(self.reading.open(), None):
                rows += batch
                if len(rows) > most:
                    break
        with _collect(problems):
            if rows:
                encoded = self._encoded(rows[:most], 0)
                report = SplitReport.total(counts for _, counts in self._sorted(encoded, rows[:most]))
                marks = encoded.get(MARKS, [])
        if problems:
            raise DataError(problems)
        if report.kept == 0 and len(rows) <= most:
            raise self._nothing_left(report)
        return Look(report, len(rows) <= most, tuple(marks))

    def _encode(self, batch: list[dict[str, Any]], before: int) -> tuple[list[Features], SplitReport]:
        """The rows of a batch that are trained on, and what became of all of them."""
        fates = self._fates(batch, before)
        return [row for row, _ in fates if row is not None], SplitReport.total(counts for _, counts in fates)

    def _fates(self, batch: list[dict[str, Any]], before: int = 0) -> list[Fate]:
        """What becomes of each row of a batch: the encoded one, if it is trained on, and its counts."""
        return self._sorted(self._encoded(batch, before), batch)

    def _sorted(self, encoded: dict[str, list[Any]], batch: list[dict[str, Any]]) -> list[Fate]:
        """The same of a batch that is encoded."""
        spoken = encoded.get(INDEX, [])
        fates: list[Fate] = [(None, SplitReport(rows=1, empty=1))] * len(batch)
        refused: dict[str, Problem] = {}
        if len(spoken) < len(batch):
            row = batch[min(set(range(len(batch))) - set(spoken))]
            refused |= self._refusal("empty_text", "a row has no text, or a blank one", row)
        others = {"whole", "weight", INDEX, MARKS, ROW, PART}
        fields = [name for name in encoded if name not in others]
        for place, index in enumerate(spoken):
            whole, weight = encoded["whole"][place], encoded["weight"][place]
            over = whole > self.encoder.max_length
            if over and self.overlong == "error":
                refused.setdefault("overlong", self._overlong(whole, batch[index]))
            dropped = over and self.overlong == "drop"
            untrained = not dropped and weight == 0
            if untrained:
                what = "a row has nothing that is trained (within data.max_length)"
                refused = self._refusal("no_trained_token", what, batch[index]) | refused
            if dropped or untrained:
                counts = SplitReport(rows=1, dropped=int(dropped), untrained=int(untrained), longest=whole)
                fates[index] = None, counts
                continue
            found: Any = {name: encoded[name][place] for name in fields}
            fates[index] = (
                found,
                SplitReport(rows=1, kept=1, cut=int(over), tokens=found["size"], trained=weight, longest=whole),
            )
        if refused:
            raise DataError(refused.values())
        return fates

    def _encoded(self, batch: list[dict[str, Any]], before: int) -> dict[str, list[Any]]:
        """The columns of an encoded batch.

        Raises:
            DataError: Rows are unfit; what is refused of the others is told with them.
        """
        columns: dict[str, list[Any]] = {name: [row[name] for row in batch] for name in self.reading.wanted.columns}
        numbers = list(range(before + 1, before + len(batch) + 1))
        try:
            return self.encoder(columns | {ROW: numbers, PART: [0] * len(batch)})
        except PlacedError as error:
            problems = dict.fromkeys(_shown(error, batch, before))
            unfit = set(error.unfit)
        with _collect(problems):
            if rest := [row for index, row in enumerate(batch) if index not in unfit]:
                self._encode(rest, before)
        raise DataError(problems)

    def _refusal(self, check: str, what: str, row: dict[str, Any]) -> dict[str, Problem]:
        """The problem with a row by name of the check, if that calls it an error."""
        if getattr(self.checks, check) != "error":
            return {}
        message = f"{what}; remove it, or set data.checks.{check}: warn to drop such rows; the row: {_excerpt(row)}"
        return {check: Problem(message, file=self.reading.places)}

    def _overlong(self, length: int, row: dict[str, Any]) -> Problem:
        message = (
            f"a row has {length} tokens, more than {self.encoder.max_length}; raise data.max_length, or set "
            f"data.overlong to truncate or drop; the row: {_excerpt(row)}"
        )
        return Problem(message, file=self.reading.places)


@contextmanager
def _collect(problems: dict[Problem, None]) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        problems |= dict.fromkeys(error.problems)


def _shown(error: PlacedError, batch: list[dict[str, Any]], before: int) -> Iterator[Problem]:
    """The problems with the rows that they are about, instead of numbers that count shuffled rows."""
    for (place, what), (rows, count) in error.found.items():
        more = f" (and {count - 1} more like it)" if count > 1 else ""
        yield Problem(f"{what}; the row: {_excerpt(batch[rows[0] - before - 1])}{more}", file=place)


def _excerpt(row: dict[str, Any]) -> str:
    text = repr(row)
    return text if len(text) <= EXCERPT else text[:EXCERPT] + "..."


# Reads raw training rows from their sources while they are needed.

BATCH = 100
"""Raw rows that are encoded at once."""


@dataclass(frozen=True)
class Reading:
    """The sources of a stream, and the order of its rows."""

    origins: Origins
    wanted: Wanted
    buffer: int
    """Rows to shuffle from; the order of files is shuffled too."""
    limit: int | None
    """At most this many rows, the same in every pass."""
    seed: int
    """Fixes which rows the limit takes, and how sources are mixed."""

    @classmethod
    def of(cls, data: Data, origins: Origins, wanted: Wanted, seed: int) -> Reading:
        """From the recipe's data block."""
        return cls(origins, wanted, data.shuffle_buffer, data.limit, seed)

    @property
    def places(self) -> str:
        """Names of the sources in messages."""
        return ", ".join(origin.place for origin in self.origins.train)

    def open(self) -> datasets.IterableDataset:
        """The raw rows in the order of the sources, each beginning with its first row.

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
        try:
            parts = [part.cast(_common(parts, self.wanted)) for part in parts]
            return datasets.interleave_datasets(
                parts, probabilities=list(self.origins.weights), seed=self.seed, stopping_strategy="first_exhausted"
            )
        except (TypeError, ValueError) as error:
            raise DataError(Problem(f"can't be mixed: {error}", file=self.places)) from error

    def batches(self, opened: datasets.IterableDataset, order: list[int] | None) -> Iterator[list[dict[str, Any]]]:
        """One pass in `BATCH`es of raw rows.

        Args:
            opened: What `open` returned.
            order: Seed of the shuffling; null keeps the order of the sources.

        Raises:
            DataError: The data can't be read.
        """
        if self.limit is not None:
            opened = opened.shuffle(seed=self.seed, buffer_size=self.buffer).take(self.limit)
        if order is not None:
            opened = opened.shuffle(generator=np.random.default_rng(order), buffer_size=self.buffer)
        batch: list[dict[str, Any]] = []
        try:
            for row in opened:
                batch.append(row)
                if len(batch) == BATCH:
                    yield batch
                    batch = []
        except READING_ERRORS as error:
            raise self._explain(error) from error
        if batch:
            yield batch

    def _explain(self, error: Exception) -> Exception:
        """The most telling of what the sources say about an error."""
        explained = [origin.explain(error) for origin in self.origins.train]
        located = [e for e in explained if isinstance(e, FinetuneError) and e.problems[0].line is not None]
        return (located or explained)[0]


def _common(parts: list[datasets.IterableDataset], wanted: Wanted) -> datasets.Features:
    """Types that take the cells of every part as they stand; labels keep theirs where all parts have the same."""
    found = {}
    for column in wanted.columns:
        kinds = [None if part.features is None else part.features[column] for part in parts]
        alike = column in wanted.labels and kinds[0] is not None and all(kind == kinds[0] for kind in kinds)
        found[column] = kinds[0] if alike else Cell()
    return datasets.Features(found)
