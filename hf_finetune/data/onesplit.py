"""One split alone, encoded for a model whose labels are known: rows that are evaluated after training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune.data import cache, checks, sources, splits
from hf_finetune.data.cells import Wanted
from hf_finetune.data.counting import Setting, gather
from hf_finetune.data.encoding import Encoder, Encoding, encode
from hf_finetune.data.sources import Origins
from hf_finetune.data.splits import Split
from hf_finetune.data.workplace import Workplace
from hf_finetune.errors import DataError, Problem, RecipeError
from hf_finetune.terminal import Phases, unseen

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe
    from hf_finetune.tasks.base import State

GIVEN = "--data"
"""The key that messages name where files are given on the command line."""
NAME = "evaluated"
"""What messages call the rows."""


@dataclass(frozen=True)
class Wish:
    """Which rows."""

    split: str | None = None
    """train, validation or test of the recipe."""
    files: tuple[str, ...] = ()
    """Files instead."""
    columns: tuple[str, ...] = ()
    """Further columns that are wanted beside the task's."""


@dataclass(frozen=True)
class OneSplit:
    """Rows ready for evaluation."""

    origins: Origins
    split: Split
    """The raw rows, all of them."""
    encoding: Encoding
    warnings: tuple[Problem, ...]

    @property
    def sources(self) -> list[dict[str, Any]]:
        """What the rows were read from, with what identifies it, for a record of the evaluation."""
        return [{"source": origin.place, "sha256": origin.identity(whole=True)} for origin in self.origins]

    @property
    def key(self) -> list[str]:
        """The same whatever the files are called."""
        return [source["sha256"] for source in self.sources]


@contextmanager
def opened(recipe: Recipe, processor: Any, targets: State, wish: Wish, phase: Phases = unseen) -> Iterator[OneSplit]:
    """Read and encode rows; inside, they can be used.

    Args:
        recipe: Its task and data block.
        processor: The model's.
        targets: What the training rows said about the labels.
        wish: Which rows.
        phase: Is told how far it is.

    Raises:
        DataError: Rows are missing or unfit, or `data.checks` finds something that is an error.
        RecipeError: The recipe has no such split.
        StorageError: There is no place for temporary files.
    """
    with cache.scratch(cache.root(recipe.data.cache), ".one-") as folder:
        place = Workplace(Path(folder), recipe.data.workers, phase)
        origins = _origins(recipe, wish)
        with phase("reading data"):
            split = _load(recipe, origins, wish, str(Path(folder) / "raw"))
        encoder = Encoder(recipe.task, processor, targets, recipe.data.max_length, split.places)
        encoding = encode(split, encoder, recipe.data.overlong, place)
        yield OneSplit(origins, split, encoding, _checked(recipe, processor, targets, split, encoding))


def _origins(recipe: Recipe, wish: Wish) -> Origins:
    """Where the wanted rows come from, and no others."""
    if wish.files:
        found = sources.local_files(wish.files, None, GIVEN, recipe.data.cache)
        return Origins((), (1.0,), found, None)
    data, alone = recipe.data, {"train": None, "mix": None, "validation": None, "validation_share": None, "test": None}
    there = {"train": True, "validation": data.has_validation, "test": data.test is not None}
    if not there.get(wish.split or "", False):
        had = ", ".join(name for name, has in there.items() if has)
        raise RecipeError(f"the run has no split {wish.split!r}; it has {had}, or give --data FILE")
    if wish.split == "train" or (wish.split == "validation" and data.validation_share is not None):
        kept: tuple[str, ...] = ("train", "mix", "validation_share")
    else:
        kept = (str(wish.split),)
    block = data.model_copy(update={name: value for name, value in alone.items() if name not in kept})
    origins = sources.locate(block)
    if origins.problems:
        raise DataError(origins.problems)
    return origins


def _load(recipe: Recipe, origins: Origins, wish: Wish, folder: str) -> Split:
    wanted = Wanted.by(recipe.task)
    more = tuple(column for column in dict.fromkeys(wish.columns) if column not in wanted.columns)
    wanted = Wanted(wanted.columns + more, wanted.texts + more, wanted.optional)
    # The limit draws from the recipe's splits, never from files that are given; streamed rows are read whole here.
    changes: dict[str, Any] = {"streaming": False} | ({"limit": None, "validation_share": None} if wish.files else {})
    block = recipe.data.model_copy(update=changes)
    loaded, problems = splits.load(block, origins, wanted, recipe.training.seed, folder)
    if problems:
        raise DataError(problems)
    return replace(loaded[wish.split or "validation"], name=NAME)


def _checked(recipe: Recipe, processor: Any, targets: State, split: Split, encoding: Encoding) -> tuple[Problem, ...]:
    """Warnings of `data.checks`.

    Raises:
        DataError: Its errors.
    """
    setting = Setting(recipe.task, processor, targets, recipe.data.max_length)
    facts = gather({NAME: split}, {NAME: encoding}, setting)
    found = checks.findings(recipe, facts, {NAME: encoding.report}, {NAME: ", ".join(split.places)})
    told = [(level, replace(problem, key="")) for level, problem in found]
    if errors := [problem for level, problem in told if level == "error"]:
        raise DataError(errors)
    return tuple(problem for _, problem in told)
