"""Training rows that are read, shuffled and encoded while training, pass after pass, for data that do not fit."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_finetune.data.encoding import INDEX, MARKS, Encoder
from hf_finetune.data.lanes import Lanes, Raw
from hf_finetune.data.placing import PlacedError
from hf_finetune.data.splitreport import SplitReport, nothing_left
from hf_finetune.data.splits import PART, ROW
from hf_finetune.errors import DataError, Problem

if TYPE_CHECKING:
    from hf_finetune.data.lanes import Fate
    from hf_finetune.data.reading import Reading
    from hf_finetune.schema.blocks import Data
    from hf_finetune.tasks.base import Features

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
