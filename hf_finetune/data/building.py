"""Reads and encodes every split for the cache; all that is wrong with any of them is told at once.

Rows that are unfit are left out, and the others encoded and counted all the same, so that the checks can judge them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_finetune.badrows import RowsError
from hf_finetune.data import splits
from hf_finetune.data.cache import Content
from hf_finetune.data.counting import Setting, gather
from hf_finetune.data.encoding import Encoder, Encoding, Overlong, encode, survey
from hf_finetune.data.facts import Facts, Known, without_unfit
from hf_finetune.data.placing import PlacedError, place, placed_in
from hf_finetune.data.splits import Split
from hf_finetune.data.workplace import Workplace
from hf_finetune.errors import DataError, Problem
from hf_finetune.tasks.base import Targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_finetune.data.reading import Reading
    from hf_finetune.recipe import Recipe

Array = np.ndarray[Any, Any]
NONE: Array = np.empty(0, dtype=np.int64)
TOGETHER = 10_000
"""Raw rows that are looked at at a time."""


class UnfitError(DataError):
    """Data are unfit.

    Args:
        problems: Everything that is.
        known: What was counted in the rest.
    """

    def __init__(self, problems: Iterable[Problem], known: Known) -> None:
        super().__init__(problems)
        self.known = known

    def __reduce__(self) -> tuple[type[UnfitError], tuple[Any, ...]]:
        """Stay picklable."""
        return type(self), (self.problems, self.known)


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
    return _Building(recipe, tokenizer, reading, place).content()


class _Building:
    """What was made of the splits so far, and what is wrong with them."""

    def __init__(self, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, reading: Reading, place: Workplace) -> None:
        self.recipe, self.tokenizer, self.reading, self.place = recipe, tokenizer, reading, place
        self.problems: dict[Problem, None] = {}
        self.splits: dict[str, Split] = {}
        """The rows that are encoded: all, or those that are fit."""
        self.encodings: dict[str, Encoding] = {}
        self.rows: dict[str, int] = {}
        """How many rows each split has, the unfit ones included."""
        self.mislabelled: set[tuple[str, str]] = set()
        """Where labels can't be read, and why: what was told when they were."""

    def content(self) -> Content:
        """Everything; see `build`."""
        data, reading = self.recipe.data, self.reading
        cache = str(self.place.scratch / "raw")
        with self.place.phase("reading data"):
            loaded = splits.load(data, reading.origins, reading.wanted, self.recipe.training.seed, cache)
        self.problems |= dict.fromkeys(loaded.problems)
        targets, unlabelled = self._targets(loaded.splits.get("train"))
        for name, split in loaded.splits.items():
            self.rows[name] = len(split.rows)
            self._encode(split, targets, unlabelled if name == "train" else NONE)
        setting = Setting(self.recipe.task, self.tokenizer, targets or Targets(), data.max_length)
        with self.place.phase("counting what is in the data"):
            facts = gather(self.splits, self.encodings, setting)
        if targets is not None and not self.problems and "train" in facts:
            with self._collect("train"):
                targets = self._of_kept(targets, facts["train"])
        if self.problems or targets is None:
            raise UnfitError(self.problems, self._known(facts))
        encoded = {name: one.rows() for name, one in self.encodings.items()}
        raw = {name: split.raw() for name, split in self.splits.items() if name != "train"}
        return Content(encoded, raw, targets, {name: one.report for name, one in self.encodings.items()}, facts)

    def _targets(self, train: Split | None) -> tuple[Targets | None, Array]:
        """What the training rows say about the labels, and those that say nothing readable, which are told."""
        if train is None:
            return self._streamed_targets(), NONE
        every = np.arange(len(train.rows))
        rows, part, targets = every, train, None
        while targets is None and len(rows):
            try:
                targets = self.recipe.task.targets(part.raw())
            except RowsError as error:
                found = placed_in(error, part)
                self._tell(found, "train")
                self.mislabelled |= set(found.found)
                rows = np.delete(rows, found.unfit)
                part = replace(train, rows=train.rows.select(rows))
            except DataError as error:
                problems = place(error, part).problems
                self._tell(DataError(without_unfit(one, len(every) - len(rows)) for one in problems), "train")
                break
        return targets, NONE if len(rows) == len(every) else np.setdiff1d(every, rows)

    def _streamed_targets(self) -> Targets | None:
        data, reading = self.recipe.data, self.reading
        # Of a mix that lacks a source nothing can be said.
        if data.streaming and len(reading.origins.train) == len(data.mix or (data.train,)):
            with self._collect("train"):
                opened = reading.open()
                try:
                    return self.recipe.task.targets(opened)
                except DataError as error:
                    raise DataError(replace(problem, file=reading.places) for problem in error.problems) from None
        return None

    def _encode(self, split: Split, targets: Targets | None, unlabelled: Array) -> None:
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
            self._tell(error, split.name)
        if isinstance(error, PlacedError):
            unfit = np.union1d(unfit, error.unfit)
        fit = np.setdiff1d(np.arange(len(split.rows)), unfit)
        if not len(fit):
            return
        if len(unfit):
            rest = replace(split, name=f"other {split.name}", rows=split.rows.select(fit))
            error = self._tried(rest, split.name, targets, overlong)
            if error is not None:
                self._tell(error, split.name)
        else:
            rest = split
        if error is not None and overlong == "error":
            self._tried(rest, split.name, targets, "drop")

    def _tried(self, split: Split, name: str, targets: Targets | None, overlong: Overlong) -> DataError | None:
        """Encode rows and keep them as the split of this name, or return what is wrong with them."""
        encoder = self._encoder(split, targets)
        try:
            self.encodings[name] = encode(split, encoder, overlong, self.place)
        except DataError as error:
            return error
        self.splits[name] = split
        return None

    def _encoder(self, split: Split, targets: Targets | None) -> Encoder:
        data = self.recipe.data
        return Encoder(self.recipe.task, self.tokenizer, targets or Targets(), data.max_length, split.places)

    def _of_kept(self, targets: Targets, facts: Facts) -> Targets:
        """The targets with the counts of the rows that are trained on, and the weights that follow from them."""
        if not targets.counts or not facts.labels:
            return targets
        kept = self.encodings["train"].report.kept
        return self.recipe.task.counted(targets, tuple(facts.labels[name] for name in targets.names), kept)

    def _known(self, facts: Mapping[str, Facts]) -> Known:
        reports, left_out = {}, {}
        for name, encoding in self.encodings.items():
            report = encoding.report
            left_out[name] = self.rows[name] - report.rows
            if self.recipe.data.overlong == "error":
                left_out[name] += report.dropped
            reports[name] = replace(report, rows=self.rows[name])
        return Known(facts, reports, self.reading.origins.places, left_out)

    @contextmanager
    def _collect(self, name: str) -> Iterator[None]:
        """Tell what the body raises about a split."""
        try:
            yield
        except DataError as error:
            self._tell(error, name)

    def _tell(self, error: DataError, name: str) -> None:
        """Keep the problems of a split, each with the recipe key that names its file."""
        origins = self.reading.origins
        held = {"validation": origins.validation, "test": origins.test}.get(name)
        keys = {origin.place: origin.key for origin in (origins.train if held is None else (held,))}
        for problem in error.problems:
            key = problem.key or keys.get(problem.file, f"data.{name}")
            self.problems[replace(problem, key=key)] = None
