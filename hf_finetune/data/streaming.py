"""Training rows that are read, shuffled and encoded while training, pass after pass, for data that do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from hf_finetune.data.diagnosis import READING_ERRORS
from hf_finetune.data.encoding import INDEX, Encoder
from hf_finetune.data.placing import PlacedError
from hf_finetune.data.splitreport import SplitReport, nothing_left
from hf_finetune.data.splits import PART, ROW, check_columns
from hf_finetune.errors import DataError, FinetuneError, Problem

if TYPE_CHECKING:
    from hf_finetune.data.faults import Wanted
    from hf_finetune.data.sources import Origins
    from hf_finetune.schema.blocks import Data
    from hf_finetune.tasks import Encoded

BATCH = 100
"""Raw rows that are encoded at once."""
EXCERPT = 200
"""Characters of a raw row that a message shows: streamed rows are shuffled, so a number would not find them."""


@dataclass(frozen=True)
class Reading:
    """What is read, and in which order."""

    origins: Origins
    wanted: Wanted
    """What the task needs."""
    buffer: int
    """Rows to shuffle from; the order of files is shuffled too."""
    limit: int | None
    """At most this many rows, the same in every pass."""
    seed: int
    """Fixes which rows the limit takes, and how sources are mixed."""

    @classmethod
    def of(cls, data: Data, origins: Origins, wanted: Wanted, seed: int) -> Reading:
        """What the recipe's data block asks for."""
        return cls(origins, wanted, data.shuffle_buffer, data.limit, seed)

    @property
    def places(self) -> str:
        """What messages call the sources."""
        return ", ".join(origin.place for origin in self.origins.train)

    def open(self) -> datasets.IterableDataset:
        """The raw rows in the order of the sources, each beginning with its first row.

        Raises:
            DataError: A source is missing or empty, lacks a column, or does not fit the others.
        """
        parts = []
        for origin in self.origins.train:
            try:
                part = origin.stream(self.wanted.texts)
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
            return datasets.interleave_datasets(
                parts, probabilities=list(self.origins.weights), seed=self.seed, stopping_strategy="first_exhausted"
            )
        except (TypeError, ValueError) as error:
            raise DataError(Problem(f"can't be mixed: {error}", file=self.places)) from error

    def batches(self, opened: datasets.IterableDataset, order: list[int]) -> Iterator[list[dict[str, Any]]]:
        """One pass in `BATCH`es of raw rows.

        Args:
            opened: What `open` returned.
            order: Seed of the shuffling.

        Raises:
            DataError: The data can't be read.
        """
        if self.limit is not None:
            opened = opened.shuffle(seed=self.seed, buffer_size=self.buffer).take(self.limit)
        shuffled = opened.shuffle(generator=np.random.default_rng(order), buffer_size=self.buffer)
        batch: list[dict[str, Any]] = []
        try:
            for row in shuffled:
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


class Stream:
    """Encoded training rows without end.

    Rows without text or without a trained token are dropped and counted; where `data.checks` makes them an error, the
    first that is met raises. Other checks need all rows, and so are not made here.

    Every rank reads the same rows in the same order: it follows from the seed and the number of the pass. Mixed
    sources are read from their beginning in each pass, until the first is used up.
    """

    def __init__(self, reading: Reading, encoder: Encoder, data: Data) -> None:
        self.reading = reading
        self.encoder = replace(encoder, places=(reading.places,))
        self.overlong = data.overlong
        self.checks = data.checks
        self._report = SplitReport()

    def report(self) -> SplitReport:
        """What became of the rows in the first pass of the iterator that has read most of them in this process.

        A second one, which only takes a sample, does not take away the counts of the first.
        """
        return self._report

    def rows(self, seed: int) -> Iterator[Encoded]:
        """Encoded rows: `input_ids`, `labels`, `length` (after cutting), perhaps `token_type_ids`.

        Args:
            seed: With the number of the pass, fixes the order.

        Raises:
            DataError: A row can't be read or encoded, is over-long and must not be, has no text or no trained token
                and `data.checks` forbids it, or a pass has no row to train on.
        """
        opened = self.reading.open()
        number = 0
        while True:
            of_pass = SplitReport()
            for batch in self.reading.batches(opened, [seed, number]):
                encoded, counts = self._encode(batch, of_pass.rows)
                of_pass += counts
                if number == 0 and of_pass.rows >= self._report.rows:
                    self._report = of_pass
                yield from encoded
            if of_pass.kept == 0:
                raise nothing_left(of_pass, "train", self.reading.places)
            number += 1

    def _encode(self, batch: list[dict[str, Any]], before: int) -> tuple[list[Encoded], SplitReport]:
        """The rows of a batch that are trained on, and what became of all of them."""
        names = self.reading.wanted.columns
        columns: dict[str, list[Any]] = {column: [row[column] for row in batch] for column in names}
        numbers = list(range(before + 1, before + len(batch) + 1))
        try:
            encoded = self.encoder(columns | {ROW: numbers, PART: [0] * len(batch)})
        except PlacedError as error:
            raise DataError(_shown(error, batch, before)) from None
        spoken = encoded.get(INDEX, [])
        counts = SplitReport(rows=len(batch), empty=len(batch) - len(spoken))
        if counts.empty:
            row = next(batch[index] for index in range(len(batch)) if index not in spoken)
            self._refuse("empty_text", "a row has no text, or a blank one", row)
        kept: list[Encoded] = []
        fields = [name for name in ("input_ids", "token_type_ids", "labels", "length") if name in encoded]
        for place, index in enumerate(spoken):
            whole, trained = encoded["whole"][place], encoded["trained"][place]
            over = whole > self.encoder.max_length
            if over and self.overlong == "error":
                raise self._overlong(whole, batch[index])
            dropped = over and self.overlong == "drop"
            untrained = not dropped and trained == 0
            counts += SplitReport(dropped=int(dropped), untrained=int(untrained), longest=whole)
            if untrained:
                what = "a row has nothing that is trained (within data.max_length)"
                self._refuse("no_trained_token", what, batch[index])
            if dropped or untrained:
                continue
            encoded_row: Any = {name: encoded[name][place] for name in fields}
            counts += SplitReport(kept=1, cut=int(over), tokens=encoded_row["length"], trained=trained)
            kept.append(encoded_row)
        return kept, counts

    def _refuse(self, check: str, what: str, row: dict[str, Any]) -> None:
        """Raise for a row that a check calls an error."""
        if getattr(self.checks, check) == "error":
            message = f"{what}; remove it, or set data.checks.{check}: warn to drop such rows; the row: {_excerpt(row)}"
            raise DataError(Problem(message, file=self.reading.places))

    def _overlong(self, length: int, row: dict[str, Any]) -> DataError:
        message = (
            f"a row has {length} tokens, more than {self.encoder.max_length}; raise data.max_length, or set "
            f"data.overlong to truncate or drop; the row: {_excerpt(row)}"
        )
        return DataError(Problem(message, file=self.reading.places))


def _shown(error: PlacedError, batch: list[dict[str, Any]], before: int) -> Iterator[Problem]:
    """The problems with the rows that they are about, instead of numbers that count shuffled rows."""
    for (place, what), (rows, count) in error.found.items():
        more = f" (and {count - 1} more like it)" if count > 1 else ""
        yield Problem(f"{what}; the row: {_excerpt(batch[rows[0] - before - 1])}{more}", file=place)


def _excerpt(row: dict[str, Any]) -> str:
    text = repr(row)
    return text if len(text) <= EXCERPT else text[:EXCERPT] + "..."
