"""From the recipe's data block to encoded rows: find, load, split, encode, cache."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

import hf_finetune
from hf_finetune.data import cache, checks, splits
from hf_finetune.data import sources as data_sources
from hf_finetune.data.cache import Content
from hf_finetune.data.cells import Wanted
from hf_finetune.data.counting import Setting, gather
from hf_finetune.data.encoding import Encoder, Encoding, Overlong, encode, survey
from hf_finetune.data.facts import Facts, SplitReport, without_unfit
from hf_finetune.data.sources import Origins
from hf_finetune.data.splits import PlacedError, Split, Workplace, placed_in
from hf_finetune.data.stream import Reading, Stream
from hf_finetune.device import Machine
from hf_finetune.errors import DataError, Problem, RecipeError, RowsError
from hf_finetune.log import libraries
from hf_finetune.log.lines import Phases, unseen
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import State, tokenizer_of

# Reads and encodes every split for the cache; all that is wrong with any of them is told at once.
#
# Rows that are unfit are left out, and the others encoded and counted all the same, so that the checks can judge them.

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


def build_building(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, reading: Reading, place: Workplace) -> Content:
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


@dataclass(frozen=True)
class Prepared:
    """The data of a run.

    Encoded rows have the task's features, and their `size`.
    """

    train: datasets.Dataset | Stream
    """Encoded rows; with `row` as below, unless they are streamed."""
    validation: datasets.Dataset | None
    """Encoded rows in the order of the split; `row` is the number of the raw row in `raw_validation`, from 0."""
    test: datasets.Dataset | None
    """Like `validation`."""
    raw_validation: datasets.Dataset | None
    """Raw rows, only the task's columns."""
    raw_test: datasets.Dataset | None
    """Like `raw_validation`."""
    targets: State
    counted: Mapping[str, SplitReport]
    """By split, as far as it was loaded."""
    facts: Mapping[str, Facts]
    """By split; `checks.findings` judges them."""
    places: Mapping[str, str]
    """Names of the splits in messages."""
    fingerprint: str
    """SHA-256, as hex, over everything that determines the rows: data, tokenizer, task and settings."""

    @property
    def reports(self) -> dict[str, SplitReport]:
        """One a split; of a stream, for the rows that this process read in the first pass."""
        if not isinstance(self.train, Stream) or self.train.report().rows == 0:
            return dict(self.counted)
        return {"train": self.train.report(), **self.counted}


def prepare(recipe: Recipe, tokenizer: Any, machine: Machine, phase: Phases = unseen) -> Prepared:
    """Load and encode the data of a run, or map them from the cache.

    The first rank of each node works, the others wait for it.

    Args:
        recipe: Its task, data block and seed count.
        tokenizer: The model's.
        machine: Tells which rank this is.
        phase: Is told how far it is.

    Raises:
        DataError: The data are missing, unreadable, empty, or do not fit the recipe: every problem of every split. What
            `data.checks` finds is not raised here, for that see `checks.findings`. On the rank that works it is an
            `UnfitError`, which carries what these checks need.
        StorageError: The cache can't be written.
    """
    libraries.hush()
    data, task, seed = recipe.data, recipe.task, recipe.training.seed
    origins = data_sources.locate(data)
    reading = Reading.of(data, origins, Wanted.by(task), seed)
    if origins.problems:
        if machine.is_node_main:
            # Nothing can come of them, but there may be more to say.
            with tempfile.TemporaryDirectory(prefix="hf_finetune-") as scratch:
                build_building(recipe, tokenizer, reading, Workplace(Path(scratch), data.workers, phase))
        raise DataError(origins.problems)
    stamps = origins.stamps()
    fingerprint = _fingerprint(recipe, tokenizer, origins)

    def build(scratch: Path) -> cache.Content:
        content = build_building(recipe, tokenizer, reading, Workplace(scratch, data.workers, phase))
        origins.check_unchanged(stamps)
        return content

    entry = cache.Entry(cache.root(data.cache), _sha256([fingerprint, _versions()]))
    content = entry.get(build, builds=machine.is_node_main)
    if data.streaming:
        encoder = Encoder(task, tokenizer, content.targets, data.max_length, ())
        train: Any = Stream(reading, encoder, data)
    else:
        train = content.encoded["train"]
    return Prepared(
        train=train,
        validation=content.encoded.get("validation"),
        test=content.encoded.get("test"),
        raw_validation=content.raw.get("validation"),
        raw_test=content.raw.get("test"),
        targets=content.targets,
        counted=content.reports,
        facts=content.facts,
        places=origins.places,
        fingerprint=fingerprint,
    )


def _fingerprint(recipe: Recipe, tokenizer: Any, origins: Origins) -> str:
    data = recipe.data
    evaluated = {"validation": origins.validation, "test": origins.test}
    seeded = data.validation_share or data.limit or data.mix
    return _sha256(
        {
            "train": [origin.identity(whole=not data.streaming) for origin in origins.train],
            "weights": origins.weights,
            **{name: origin.identity(whole=True) for name, origin in evaluated.items() if origin is not None},
            "validation_share": data.validation_share,
            "limit": data.limit,
            "seed": recipe.training.seed if seeded else None,
            "max_length": data.max_length,
            "overlong": data.overlong,
            # The order of streamed rows is the library's business, and follows from how they are read.
            "stream": [data.shuffle_buffer, datasets.__version__, READING] if data.streaming else None,
            "task": _task_state(recipe),
            "tokenizer": _tokenizer_state(tokenizer),
        }
    )


YOUNGER: Mapping[str, Any] = {"escape_special_tokens": False, "date": None}
"""Keys of tasks that version 0.1.0 did not have, with what it did: a run that it began can go on."""


def _task_state(recipe: Recipe) -> dict[str, Any]:
    """The task, without younger keys that change nothing."""
    state = recipe.task.model_dump(mode="json")
    return {key: value for key, value in state.items() if not (key in YOUNGER and value == YOUNGER[key])}


def _tokenizer_state(processor: Any) -> Any:
    """Everything about a processor that shows in features, in a form that JSON takes."""
    tokenizer: Any = tokenizer_of(processor)
    if tokenizer is None:
        return [type(processor).__name__, json.loads(processor.to_json_string())]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    # What the last call set, not what the tokenizer is.
    for transient in ("truncation", "padding") if backend is not None else ():
        state.pop(transient, None)
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    sides = [tokenizer.padding_side, tokenizer.truncation_side]
    return [type(tokenizer).__name__, state, special, tokenizer.chat_template, sides]


READING = 2
"""Raised where the same files are read as other rows, so that nothing of a cache is taken that was read otherwise."""


def _versions() -> list[str]:
    return [
        str(READING),
        hf_finetune.__version__,
        datasets.__version__,
        tokenizers.__version__,
        transformers.__version__,
    ]


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


# One split alone, encoded for a model whose labels are known: rows that are evaluated after training.

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
        found = data_sources.local_files(wish.files, None, GIVEN, recipe.data.cache)
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
    origins = data_sources.locate(block)
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
