"""Reads raw training rows from their sources while they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np

from hf_finetune.data.cells import Cell, Wanted
from hf_finetune.data.sources import READING_ERRORS, Origins
from hf_finetune.data.splits import check_columns
from hf_finetune.errors import DataError, FinetuneError, Problem
from hf_finetune.schema.blocks import Data

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
