"""Loads the raw rows of every split: columns checked, sources mixed, validation cut off, limited; all by one seed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np

from hf_finetune.data.cells import Cell
from hf_finetune.errors import DataError, Problem
from hf_finetune.schema.filehead import missing_columns

if TYPE_CHECKING:
    from hf_finetune.data.faults import Wanted
    from hf_finetune.data.sources import Origin, Origins
    from hf_finetune.schema.blocks import Data

ROW = "__row__"
"""Column: number of the row in its source, from 1."""
PART = "__part__"
"""Column: number of the source among those that are mixed, from 0."""
BOOKKEEPING = (ROW, PART)

ORDER = ["train", "validation", "test"]
"""Of the splits in every report."""

WIDEST = {"int": "int64", "uint": "int64", "float": "float64", "string": "string", "large_string": "string"}
"""Types without their width -> what they become when sources are mixed."""


@dataclass(frozen=True)
class Split:
    """The raw rows of a split."""

    name: str
    """`train`, `validation` or `test`."""
    rows: datasets.Dataset
    """The task's columns, and those of `BOOKKEEPING`."""
    places: tuple[str, ...]
    """What messages call its sources."""
    unused: int = 0
    """Rows of mixed sources that are never drawn, because the first of them is used up."""

    def raw(self) -> datasets.Dataset:
        """The rows as they stand in the data."""
        return self.rows.remove_columns(list(BOOKKEEPING))

    def where(self, index: int) -> tuple[str, int]:
        """Source of a row, and its number there, from 1."""
        row = self.rows[index]
        return self.places[row[PART]], row[ROW]


@dataclass(frozen=True)
class Loaded:
    """What could be loaded, and what is wrong with the rest."""

    splits: dict[str, Split]
    problems: list[Problem]


def load(data: Data, origins: Origins, wanted: Wanted, seed: int, cache: str) -> Loaded:
    """Every split that the recipe has, but a streamed `train`.

    Args:
        data: `validation_share`, `limit` and `streaming` count.
        origins: Where the rows come from.
        wanted: What the task needs; other columns are left out.
        seed: Fixes what is cut off, mixed and drawn.
        cache: Folder for the files that local rows are mapped from.

    Returns:
        The splits, without those of which a source can't be read, lacks a column, has no row, or does not fit the
        others of the mix: these are the problems.
    """
    splits: dict[str, Split] = {}
    problems: list[Problem] = list(origins.problems)
    taken = [column for column in wanted.columns if column in BOOKKEEPING]
    if taken:
        return Loaded({}, [*problems, Problem(f"no column can be called {taken[0]!r}; rename it", key="task")])
    parts = []
    for origin in () if data.streaming else origins.train:
        with _collect(problems):
            parts.append(_load(origin, "train", wanted.trained(), cache))
    for name, held in (("validation", origins.validation), ("test", origins.test)):
        with _collect(problems):
            splits |= {} if held is None else {name: _load(held, name, wanted, cache)}
    with _collect(problems):
        if parts and len(parts) == len(data.mix or (0,)):
            splits["train"] = parts[0] if data.mix is None else _mix(parts, origins.weights, seed, Path(cache))
            if data.validation_share is not None:
                splits["train"], splits["validation"] = cut_off(splits["train"], data.validation_share, seed)
    if data.limit is not None:
        splits = {name: _limited(split, data.limit, seed) for name, split in splits.items()}
    return Loaded({name: splits[name] for name in ORDER if name in splits}, problems)


@contextmanager
def _collect(problems: list[Problem]) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        problems += error.problems


def check_columns(have: Sequence[str], need: Sequence[str], origin: Origin) -> None:
    """Compare what there is with what the task needs.

    Raises:
        DataError: One line for each column that is missing, with the nearest name or all there are.
    """
    missing = missing_columns(have, need, origin.place)
    if missing:
        raise DataError(replace(problem, key=origin.key) for problem in missing)


def cut_off(split: Split, share: float, seed: int) -> tuple[Split, Split]:
    """Divide rows into those that stay and a random share, both in their old order; at least one row each.

    Raises:
        DataError: There is only one row.
    """
    count = len(split.rows)
    if count < 2:
        message = "has 1 row; a share for validation needs at least 2; add rows or remove it"
        raise DataError(Problem(message, key="data.validation_share", file=split.places[0]))
    held_out = min(count - 1, max(1, round(count * share)))
    chosen = np.random.default_rng(seed).permutation(count)
    rest, taken = np.sort(chosen[held_out:]), np.sort(chosen[:held_out])
    return (
        replace(split, rows=split.rows.select(rest)),
        replace(split, name="validation", unused=0, rows=split.rows.select(taken)),
    )


def _load(origin: Origin, name: str, wanted: Wanted, cache: str) -> Split:
    rows = origin.load(cache, wanted)
    if len(rows) == 0:
        raise DataError(Problem(f"{name} split has 0 rows", key=origin.key, file=origin.place))
    check_columns(rows.column_names, wanted.columns, origin)
    return Split(name, _numbered(rows.select_columns(list(wanted.columns)), 0), (origin.place,))


def _numbered(rows: datasets.Dataset, part: int) -> datasets.Dataset:
    rows = rows.add_column(ROW, np.arange(1, len(rows) + 1))
    return rows.add_column(PART, np.full(len(rows), part))


def _limited(split: Split, limit: int, seed: int) -> Split:
    if len(split.rows) <= limit:
        return split
    chosen = np.random.default_rng(seed).permutation(len(split.rows))[:limit]
    return replace(split, rows=split.rows.select(np.sort(chosen)))


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
            raise DataError(
                Problem(f"its columns do not fit those of {places[0]}: {reason}", file=places[index])
            ) from error
        numbered.append(rows.shuffle(seed=seed + index, keep_in_memory=True))
    mixed = datasets.interleave_datasets(
        numbered, probabilities=list(weights), seed=seed, stopping_strategy="first_exhausted"
    )
    if len(mixed) == 0:
        raise DataError("data.mix draws 0 rows: the first source is used up at once; raise its weight or add rows")
    return Split("train", mixed, places, unused=sum(len(rows) for rows in numbered) - len(mixed))


def _common_features(all_features: Sequence[datasets.Features], places: Sequence[str]) -> datasets.Features:
    """The type of each column in the mix: equal ones, the widest number or text, or any JSON.

    Raises:
        DataError: Types differ in more than width, or label names differ.
    """
    first = all_features[0]
    common = {}
    for column in first:
        kinds = [features[column] for features in all_features]
        strange = next((index for index, kind in enumerate(kinds) if kind != kinds[0]), None)
        if column in BOOKKEEPING or strange is None:
            common[column] = kinds[0]
        elif (family := _family(kinds)) is not None:
            common[column] = family
        else:
            message = f"column {column!r} is {_said(kinds[strange])}, but {_said(kinds[0])} in {places[0]}"
            raise DataError(Problem(f"{message}; make them equal", file=places[strange]))
    return datasets.Features(common)


def _family(kinds: Sequence[Any]) -> Any:
    """The type that can hold all as they stand, if there is one: the widest of a family, or any JSON."""
    if any(isinstance(kind, Cell) for kind in kinds):
        words = any(_said(kind) in {"text", "labels"} for kind in kinds)
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


def _said(kind: Any) -> str:
    """A type in words."""
    if isinstance(kind, datasets.ClassLabel):
        return "labels"
    if isinstance(kind, datasets.Value):
        words = {"string": "text", "int64": "integers", "float64": "numbers", "bool": "true or false"}
        name = str(kind.dtype)
        return words.get(WIDEST.get(name.rstrip("0123456789"), name), name)
    return "no text"
