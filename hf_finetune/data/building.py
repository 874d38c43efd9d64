"""Reads and encodes every split for the cache; all that is wrong with any of them is told at once.

Rows that are unfit are left out, and the others encoded and counted all the same, so that the checks can judge them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hf_finetune.badrows import RowsError
from hf_finetune.data import splits
from hf_finetune.data.cache import Content
from hf_finetune.data.counting import Setting, gather
from hf_finetune.data.encoding import Encoder, Encoding, Overlong, encode, survey
from hf_finetune.data.facts import Facts, without_unfit
from hf_finetune.data.placing import PlacedError, placed_in
from hf_finetune.data.reading import Reading
from hf_finetune.data.splitreport import SplitReport
from hf_finetune.data.splits import Split
from hf_finetune.data.workplace import Workplace
from hf_finetune.errors import DataError, Problem
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import State

Array = np.ndarray[Any, Any]
NONE: Array = np.empty(0, dtype=np.int64)
TOGETHER = 10_000
"""Raw rows that are looked at at a time."""


class UnfitError(DataError):
    """Data are unfit.

    Args:
        problems: Everything that is.
        facts: Counted in the fit rows of each split; a split without any is absent.
        counted: The report of each split without those rows; its `rows` include them.
        places: Names of the splits in messages.
        left_out: Unfit rows of each split.
    """

    def __init__(
        self,
        problems: Iterable[Problem],
        facts: Mapping[str, Facts],
        counted: Mapping[str, SplitReport],
        places: Mapping[str, str],
        left_out: Mapping[str, int],
    ) -> None:
        super().__init__(problems)
        self.facts, self.counted, self.places, self.left_out = facts, counted, places, left_out

    def __reduce__(self) -> tuple[type[UnfitError], tuple[Any, ...]]:
        """Stay picklable."""
        return type(self), (self.problems, self.facts, self.counted, self.places, self.left_out)


def build(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, reading: Reading, place: Workplace) -> Content:
    """Read and encode every split.

    Args:
        recipe: Its task and data block.
        tokenizer: The model's.
        reading: What is read.
        place: Where and by whom it is encoded.

    Raises:
        UnfitError: Something is wrong with a split; raised after all were tried.
    """
    building = _Building(recipe, tokenizer, reading, place)
    data, origins = recipe.data, reading.origins
    with place.phase("reading data"):
        seed, folder = recipe.training.seed, str(place.scratch / "raw")
        loaded, building.problems = splits.load(data, origins, reading.wanted, seed, folder)
    targets, unlabelled = building.targets(loaded.get("train"))
    for name, split in loaded.items():
        building.encode(split, targets, unlabelled if name == "train" else NONE)
    kept, encodings = building.splits, building.encodings
    with place.phase("counting what is in the data"):
        facts = gather(kept, encodings, Setting(recipe.task, tokenizer, targets or State(), data.max_length))
    reports = {name: encoding.report for name, encoding in encodings.items()}
    if targets is not None and targets.counts and not building.problems and "train" in facts and facts["train"].labels:
        try:
            # The counts of the rows that are trained on, and the weights that follow from them.
            counts = tuple(facts["train"].labels[name] for name in targets.names)
            targets = recipe.task.refit(targets, counts, reports["train"].kept)
        except DataError as error:
            building.note(error, "train")
    if building.problems or targets is None:
        left_out = {name: len(loaded[name].rows) - report.rows for name, report in reports.items()}
        if data.overlong == "error":
            left_out = {name: count + reports[name].dropped for name, count in left_out.items()}
        counted = {name: replace(report, rows=len(loaded[name].rows)) for name, report in reports.items()}
        raise UnfitError(building.problems, facts, counted, origins.places, left_out)
    encoded = {name: one.rows() for name, one in encodings.items()}
    raw = {name: split.raw() for name, split in kept.items() if name != "train"}
    return Content(encoded, raw, targets, reports, facts)


class _Building:
    """The splits as far as they are encoded, and their problems."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, reading: Reading, place: Workplace) -> None:
        self.recipe, self.tokenizer, self.reading, self.place = recipe, tokenizer, reading, place
        self.problems: dict[Problem, None] = {}
        self.splits: dict[str, Split] = {}
        """The rows that are encoded: all, or those that are fit."""
        self.encodings: dict[str, Encoding] = {}
        self.mislabelled: set[tuple[str, str]] = set()
        """Source and problem of labels that can't be read."""

    def targets(self, train: Split | None) -> tuple[State | None, Array]:
        """The labels of the training rows, and the rows whose labels can't be read, which are noted."""
        if train is None:
            return self._streamed_targets(), NONE
        every = np.arange(len(train.rows))
        rows, part, targets = every, train, None
        while targets is None and len(rows):
            try:
                targets = self.recipe.task.fit(part.raw())
            except RowsError as error:
                found = placed_in(error, part)
                self.note(found, "train")
                self.mislabelled |= set(found.found)
                rows = np.delete(rows, found.unfit)
                part = replace(train, rows=train.rows.select(rows))
            except DataError as error:
                where, lost = ", ".join(part.places), len(every) - len(rows)
                # What names a key of the recipe is about the recipe, not about a row.
                told = (p if p.file or p.key else replace(p, file=where) for p in error.problems)
                self.note(DataError(without_unfit(problem, lost) for problem in told), "train")
                break
        return targets, np.setdiff1d(every, rows)

    def _streamed_targets(self) -> State | None:
        data, reading = self.recipe.data, self.reading
        # Of a mix that lacks a source nothing can be said.
        if data.streaming and len(reading.origins.train) == len(data.mix or (data.train,)):
            try:
                opened = reading.open()
            except DataError as error:
                self.note(error, "train")
                return None
            try:
                return self.recipe.task.fit(opened)
            except DataError as error:
                self.note(DataError(replace(problem, file=reading.places) for problem in error.problems), "train")
        return None

    def encode(self, split: Split, targets: State | None, unlabelled: Array) -> None:
        """Encode a split; where rows are unfit, tell them and encode the others."""
        overlong, unfit = self.recipe.data.overlong, unlabelled
        error: DataError | None = None
        if len(unlabelled):
            # These rows may have other faults too. Without names, unknown labels are not told once more.
            error = survey(split, self._encoder(split, None), self.place)
            error = error and error.without(self.mislabelled)
            chosen = split.raw().select(unlabelled).iter(batch_size=TOGETHER)
            blank = np.concatenate([self.recipe.task.blank(rows) for rows in chosen])
            unfit = unlabelled[~blank]  # rows without text are not encoded anyway, and counted
        else:
            error = self._tried(split, split.name, targets, overlong)
            if error is None:
                return
        if error is not None:
            self.note(error, split.name)
        if isinstance(error, PlacedError):
            unfit = np.union1d(unfit, error.unfit)
        fit = np.setdiff1d(np.arange(len(split.rows)), unfit)
        if not len(fit):
            return
        rest = split
        if len(unfit):
            rest = replace(split, name=f"other {split.name}", rows=split.rows.select(fit))
            error = self._tried(rest, split.name, targets, overlong)
            if error is not None:
                self.note(error, split.name)
        if error is not None and overlong == "error":
            self._tried(rest, split.name, targets, "drop")

    def _tried(self, split: Split, name: str, targets: State | None, overlong: Overlong) -> DataError | None:
        """Encode rows and keep them as the split of this name, or return what is wrong with them."""
        try:
            self.encodings[name] = encode(split, self._encoder(split, targets), overlong, self.place)
        except DataError as error:
            return error
        self.splits[name] = split
        return None

    def _encoder(self, split: Split, targets: State | None) -> Encoder:
        data = self.recipe.data
        return Encoder(self.recipe.task, self.tokenizer, targets or State(), data.max_length, split.places)

    def note(self, error: DataError, name: str) -> None:
        """Keep the problems of a split, each with the recipe key that names its file."""
        origins = self.reading.origins
        held = {"validation": origins.validation, "test": origins.test}.get(name)
        keys = {origin.place: origin.key for origin in (origins.train if held is None else (held,))}
        for problem in error.problems:
            key = problem.key or keys.get(problem.file, f"data.{name}")
            self.problems[replace(problem, key=key)] = None
