"""Raw rows of every split: columns checked, sources mixed, validation cut off, limited, all by one seed; and counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_finetune.config.blocks import Data
from hf_finetune.data.loading import Cell, UnreadError, Wanted
from hf_finetune.data.readers import missing_columns
from hf_finetune.data.sources import Origin, Origins
from hf_finetune.errors import DataError, Problem, numbers
from hf_finetune.tasks.base import Task

ROW = "__row__"  # Column: number of the row in its source, from 1
PART = "__part__"  # Column: number of the source among those that are mixed, from 0
BOOKKEEPING = (ROW, PART)
MOST_PROBLEMS = 20  # problems with rows of one split that are reported one by one
WIDEST = {"int": "int64", "uint": "int64", "float": "float64", "string": "string", "large_string": "string"}
"""Types without their width -> what they become when sources are mixed."""


@dataclass(frozen=True)
class SplitReport:
    """Counts of a split; rows = kept + dropped + untrained + empty, where no row is split into several."""

    rows: int = 0  # raw rows
    kept: int = 0  # rows that are trained on or evaluated
    cut: int = 0  # kept rows that were over-long and truncated
    dropped: int = 0  # rows that were dropped because they were over-long
    untrained: int = 0  # rows that were dropped because nothing of them counts in the loss
    tokens: int = 0  # tokens of the kept rows, after cutting
    trained: int = 0  # items of the kept rows that the loss counts: rows, or tokens
    longest: int = 0  # tokens of the longest row, before cutting
    unused: int = 0  # rows of mixed sources that are never drawn, not among `rows`; unknown for a stream, and then 0
    empty: int = 0  # rows that were dropped because they hold no text
    split: int = 0  # rows that were over-long, of which each part is a row

    @classmethod
    def total(cls, reports: Iterable[SplitReport]) -> SplitReport:
        """Return the report of all of them together."""
        columns = zip(*(counts_of(report) for report in reports), strict=True)
        found = {
            name: max(values) if name == "longest" else sum(values)
            for name, values in zip(NAMES, columns, strict=False)
        }
        return cls(**found)


NAMES = tuple(field.name for field in fields(SplitReport))
counts_of = attrgetter(*NAMES)  # the counts of a report, in the order of `NAMES`


def nothing_left(report: SplitReport, name: str, where: str, task: Task) -> Problem:
    """Return the problem of a split of which no row can be used."""
    fates = {
        "are too long and dropped; raise data.max_length, or set data.overlong: truncate": report.dropped,
        task.teaches_nothing: report.untrained,
        "have no text; fill it in": report.empty,
    }
    counted = ", ".join(f"{count:,} {fate.partition('; ')[0]}" for fate, count in fates.items() if count)
    remedies = "; ".join(fate.partition("; ")[2] for fate, count in fates.items() if count)
    longest = f" (longest {report.longest:,} tokens)" if report.longest else ""
    message = f"none of the {report.rows:,} {name} rows can be used: {counted}{longest}; {remedies}"
    return Problem(message, file=where)


@dataclass(frozen=True)
class Split:
    """The raw rows of a split."""

    name: str  # `train`, `validation` or `test`
    rows: datasets.Dataset  # the task's columns, and those of `BOOKKEEPING`
    places: tuple[str, ...]  # names of its sources in messages
    unused: int = 0  # rows of mixed sources that are never drawn, because the first of them is used up
    unread: int = 0  # rows that can't be read, which are among the problems

    def raw(self) -> datasets.Dataset:
        """Return the rows as they stand in the data."""
        return self.rows.remove_columns(list(BOOKKEEPING))

    def problems(self, found: Mapping[str, Sequence[int]]) -> list[Problem]:
        """Return one problem a source and reason; `found` has the rows, counted from 0, by what is wrong."""
        placed: dict[tuple[str, str], list[int]] = {}
        for what, indices in found.items():
            rows = self.rows.select(indices)
            for part, number in zip(rows[PART], rows[ROW], strict=True):
                placed.setdefault((self.places[part], what), []).append(number)
        listed = [
            Problem(f"row {numbers(sorted(rows))}: {what}", file=place)
            for (place, what), rows in list(placed.items())[:MOST_PROBLEMS]
        ]
        if left := list(placed.items())[MOST_PROBLEMS:]:
            count = sum(len(rows) for _, rows in left)
            listed.append(Problem(f"{len(left):,} more problems of {count:,} more rows", file=left[0][0][0]))
        return listed

    def where(self, index: int) -> tuple[str, int]:
        """Return the source of a row, and its number there, from 1."""
        row = self.rows[index]
        return self.places[row[PART]], row[ROW]


def load(
    data: Data, origins: Origins, wanted: Wanted, seed: int, folder: Path
) -> tuple[dict[str, Split], dict[Problem, None]]:
    """Return every split that the recipe has, but a streamed `train`, mapped from files in the folder.

    The seed fixes what is cut off, mixed and drawn.

    Returns:
        The splits, without rows that can't be read, and without those of which a source can't be read, lacks a column,
        has no row, or does not fit the others of the mix; and these problems.
    """
    splits: dict[str, Split] = {}
    problems = dict.fromkeys(origins.problems)
    # They are added to every row, and would overwrite the data's.
    taken = [column for column in wanted.columns if column in BOOKKEEPING]
    if taken:
        return {}, {**problems, Problem(f"no column can be called {taken[0]!r}; rename it", key="task"): None}
    parts = []
    for origin in () if data.streaming else origins.train:
        with collect(problems):
            # What is drawn from a mix depends on each of its rows.
            others = problems if data.mix is None else None
            parts.append(_load(origin, "train", replace(wanted, held_out=False), folder, others))
    with collect(problems):
        if parts and len(parts) == len(data.mix or (0,)):
            splits["train"] = parts[0] if data.mix is None else _mix(parts, origins.weights, seed, folder)
            if data.validation_share is not None:
                splits["train"], splits["validation"] = _cut_off(splits["train"], data.validation_share, seed)
    for name, held in (("validation", origins.validation), ("test", origins.test)):
        with collect(problems):
            splits |= {} if held is None else {name: _load(held, name, wanted, folder, problems)}
    for name, split in splits.items():
        if data.limit is not None and len(split.rows) > data.limit:
            # In the order of the data: neighbours in the file are read together.
            chosen = np.random.default_rng(seed).permutation(len(split.rows))[: data.limit]
            splits[name] = replace(split, rows=split.rows.select(np.sort(chosen)))
    return splits, problems


@contextmanager
def collect(problems: dict[Problem, None]) -> Iterator[None]:
    """Keep what a `DataError` of the body says."""
    try:
        yield
    except DataError as error:
        problems |= dict.fromkeys(error.problems)


def check_columns(have: Sequence[str], need: Sequence[str], origin: Origin) -> None:
    """Compare what there is with what the task needs.

    Raises:
        DataError: One line for each column that is missing, with the nearest name or all there are.
    """
    missing = missing_columns(have, need, origin.place)
    if missing:
        raise DataError(replace(problem, key=origin.key) for problem in missing)


def _load(origin: Origin, name: str, wanted: Wanted, folder: Path, problems: dict[Problem, None] | None) -> Split:
    numbered, unread = None, 0
    try:
        rows = origin.load(folder, wanted)
    except UnreadError as error:
        if problems is None:
            raise
        # The other rows may have faults as well, and all are to be known at once.
        problems |= {replace(problem, key=problem.key or origin.key): None for problem in error.problems}
        rows, numbered, unread = error.rows, error.numbers, error.unread
    if len(rows) == 0:
        raise DataError(Problem(f"{name} split has 0 rows", key=origin.key, file=origin.place))
    check_columns(rows.column_names, wanted.columns, origin)
    every = np.arange(1, len(rows) + 1) if numbered is None else numbered
    rows = rows.select_columns(list(wanted.columns)).add_column(ROW, every)
    if wanted.one_row_by is not None:
        rows = _one_row_by(rows, wanted.one_row_by)
    parts = np.zeros(len(rows), dtype=np.int64)
    return Split(name, rows.add_column(PART, parts), (origin.place,), unread=unread)


def _one_row_by(rows: datasets.Dataset, key: str) -> datasets.Dataset:
    """Make one row of all with the same cell in a column, with the number of the first, and lists in other columns."""
    others = [column for column in rows.column_names if column not in (key, ROW)]
    # One thread: only then are groups in the order of their first rows.
    table = rows.with_format("arrow")[:].group_by(key, use_threads=False)
    grouped = table.aggregate([*((column, "list") for column in others), (ROW, "min")])
    names = {f"{column}_list": column for column in others} | {f"{ROW}_min": ROW}
    kinds = {column: datasets.List(rows.features[column]) for column in others}
    features = datasets.Features(kinds | {name: rows.features[name] for name in (key, ROW)})
    named = grouped.rename_columns([names.get(name, name) for name in grouped.column_names])
    return datasets.Dataset(named.select(list(features)).cast(features.arrow_schema), fingerprint=rows._fingerprint)


def _cut_off(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Divide rows into those that stay and a random share, both in their old order; at least one row each."""
    count = len(split.rows)
    if count < 2:
        message = "has 1 row; a share for validation needs at least 2; add rows or remove it"
        raise DataError(Problem(message, key="data.validation_share", file=split.places[0]))
    held_out = min(count - 1, max(1, round(count * share)))
    chosen = np.random.default_rng(seed).permutation(count)
    rest, taken = np.sort(chosen[held_out:]), np.sort(chosen[:held_out])
    return (
        replace(split, rows=split.rows.select(rest)),
        replace(split, name="validation", unused=0, unread=0, rows=split.rows.select(taken)),
    )


def _mix(parts: Sequence[Split], weights: Sequence[float], seed: int, folder: Path) -> Split:
    """Draw from the shuffled parts by weight until the first is used up; rows that are cast lie in a file."""
    places = tuple(part.places[0] for part in parts)
    features = _common_features([part.rows.features for part in parts], places)
    numbered = []
    for index, part in enumerate(parts):
        rows = part.rows.remove_columns(PART).add_column(PART, np.full(len(part.rows), index))
        try:
            if rows.features != features:
                folder.mkdir(parents=True, exist_ok=True)
                rows = rows.cast(features, load_from_cache_file=False, cache_file_name=str(folder / f"{index}.arrow"))
        except (TypeError, ValueError, NotImplementedError) as error:
            reason = str(error).partition("\n")[0]
            message = f"its columns do not fit those of {places[0]}: {reason}"
            raise DataError(Problem(message, file=places[index])) from error
        # In memory is only the order of the rows, which `datasets` would write to a file of its cache.
        numbered.append(rows.shuffle(seed=seed + index, keep_in_memory=True))
    mixed = datasets.interleave_datasets(
        numbered, probabilities=list(weights), seed=seed, stopping_strategy="first_exhausted"
    )
    if len(mixed) == 0:
        raise DataError("data.mix draws 0 rows: the first source is used up at once; raise its weight or add rows")
    return Split("train", mixed, places, unused=sum(len(rows) for rows in numbered) - len(mixed))


def _common_features(all_features: Sequence[datasets.Features], places: Sequence[str]) -> datasets.Features:
    """Return the type of each column in the mix: equal ones, the widest number or text, or any JSON.

    Raises:
        DataError: Types differ in more than width, or label names differ.
    """
    common = {}
    for column in all_features[0]:
        kinds = [features[column] for features in all_features]
        strange = next((index for index, kind in enumerate(kinds) if kind != kinds[0]), None)
        common[column] = kinds[0]
        if column not in BOOKKEEPING and strange is not None:
            common[column] = _family(kinds)
            if common[column] is None:
                message = f"column {column!r} is {_in_words(kinds[strange])}, but {_in_words(kinds[0])} in {places[0]}"
                raise DataError(Problem(f"{message}; make them equal", file=places[strange]))
    return datasets.Features(common)


def _family(kinds: Sequence[Any]) -> Any:
    """Return the type that can hold all as they stand, if there is one: the widest of a family, or any JSON."""
    if any(isinstance(kind, Cell) for kind in kinds):
        words = any(_in_words(kind) in {"text", "labels"} for kind in kinds)
        return None if words else Cell()
    if not any(isinstance(kind, datasets.Value | datasets.ClassLabel) for kind in kinds):
        return kinds[0]
    if not all(type(kind) is datasets.Value for kind in kinds):
        return None
    families = {WIDEST.get(kind.dtype.rstrip("0123456789")) for kind in kinds}
    if families == {"int64", "float64"}:
        return Cell()  # 3 beside 5.5 stays 3
    family = families.pop() if len(families) == 1 else None
    return None if family is None else datasets.Value(family)


def _in_words(kind: Any) -> str:
    if isinstance(kind, datasets.ClassLabel):
        return "labels"
    if isinstance(kind, datasets.Value):
        words = {"string": "text", "int64": "integers", "float64": "numbers", "bool": "true or false"}
        name = str(kind.dtype)
        return words.get(WIDEST.get(name.rstrip("0123456789"), name), name)
    return "no text"
