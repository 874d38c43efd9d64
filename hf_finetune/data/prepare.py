"""From the recipe's data block to encoded rows: find, load, split, encode, cache."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import tokenizers
import transformers

import hf_finetune
from hf_finetune.config.paths import ROWS, cache_folder, outside
from hf_finetune.data import cache, checks, splits
from hf_finetune.data import sources as data_sources
from hf_finetune.data.cache import Content
from hf_finetune.data.checks import without_unfit
from hf_finetune.data.encoding import FAULT, INDEX, Encoder, Encoding, encode
from hf_finetune.data.facts import Facts, gather
from hf_finetune.data.loading import Wanted
from hf_finetune.data.readers import find
from hf_finetune.data.sources import LocalFiles, Origins
from hf_finetune.data.splits import Split, SplitReport
from hf_finetune.data.stream import Reading, Stream
from hf_finetune.device import Machine
from hf_finetune.errors import DataError, ModelError, Problem, RecipeError, RowsError, StorageError
from hf_finetune.log import hush, phase
from hf_finetune.recipe import Recipe
from hf_finetune.tasks._media import on_disk
from hf_finetune.tasks.base import State, Task, tokenizer_of

TOGETHER = 10_000  # raw rows that are looked at at a time


class UnfitError(DataError):
    """Data are unfit; with what `checks.findings` takes to judge the rows that are fit."""

    facts: Mapping[str, Facts]  # counted in the fit rows of each split; a split without any is absent
    counted: Mapping[str, SplitReport]  # of each split without the unfit rows; its `rows` include them
    places: Mapping[str, str]
    left_out: Mapping[str, int]  # unfit rows of each split


def build(recipe: Recipe, processor: Any, origins: Origins, scratch: Path) -> Content:
    """Read and encode every split; all that is wrong with any of them is reported at once.

    Unfit rows are left out, and the others encoded and counted all the same, so that the checks can judge them. The
    result is mapped from files in `scratch`.

    Raises:
        UnfitError: Something is wrong with a split; raised after all were tried.
    """
    data, task, seed = recipe.data, recipe.task, recipe.training.seed
    with phase("reading data"):
        loaded, problems = splits.load(data, origins, Wanted.by(task), seed, scratch / "raw")

    def note(found: Iterable[Problem], name: str) -> None:
        # Each with the recipe key that names its file.
        held = {"validation": origins.validation, "test": origins.test}.get(name)
        keys = {origin.place: origin.key for origin in (origins.train if held is None else (held,))}
        for problem in found:
            problems[replace(problem, key=problem.key or keys.get(problem.file, f"data.{name}"))] = None

    unlabelled: dict[str, list[int]] = {}
    if "train" in loaded:
        targets, unlabelled, wrong = _fit(task, loaded["train"], processor)
    else:
        targets, wrong = _fit_stream(recipe, origins, processor)
    note(wrong, "train")
    encoder = Encoder(task, processor, targets or State(), data.max_length, splits=data.overlong == "split")
    kept: dict[str, Split] = {}
    encodings: dict[str, Encoding] = {}
    for name, split in loaded.items():
        labelled = split
        if name == "train" and unlabelled:
            labelled, wrong = _without(split, unlabelled, replace(encoder, targets=State()))
            note(wrong, name)
        if len(labelled.rows):
            try:
                encoding, wrong = encode(labelled, encoder, data, scratch)
            except ModelError as error:  # the model takes no row at all: what is wrong with the data is told beside it
                if not problems:
                    raise
                raise DataError([*problems, *error.problems]) from error
            note(wrong, name)
            if encoding is not None:
                kept[name], encodings[name] = labelled, encoding
    with phase("counting what is in the data"):
        facts = gather(kept, encodings, encoder)
    reports = {name: encoding.report for name, encoding in encodings.items()}
    if targets is not None and targets.counts and not problems and "train" in facts and facts["train"].labels:
        try:
            # The counts of the rows that are trained on, and the weights that follow from them.
            counts = tuple(facts["train"].labels[name] for name in targets.names)
            targets = task.refit(targets, counts, reports["train"].kept)
        except DataError as error:
            note(error.problems, "train")
    if problems or targets is None:
        unfit = UnfitError(problems)
        unfit.facts, unfit.counted, unfit.places, unfit.left_out = facts, reports, origins.places, {}
        for name, report in reports.items():
            rows = len(loaded[name].rows) + loaded[name].unread
            too_long = report.dropped if data.overlong == "error" else 0
            unfit.left_out[name] = rows - report.rows + len(encodings[name].faulty) + too_long
            reports[name] = replace(report, rows=rows)
        raise unfit
    encoded = {name: one.rows() for name, one in encodings.items()}
    raw = {name: split.raw() for name, split in kept.items() if name != "train"}
    return Content(encoded, raw, targets, reports, facts)


def _fit(task: Task, train: Split, processor: Any) -> tuple[State | None, dict[str, list[int]], list[Problem]]:
    """The labels of the training rows, as far as they can be read; the other rows by reason; and the problems."""
    # Rows whose labels can't be read are taken out, until the rest can be: a task may find several faults in turn.
    every = rows = np.arange(len(train.rows))
    unlabelled: dict[str, list[int]] = {}
    state, others = None, list[Problem]()
    while len(rows) and state is None and not others:
        part = train if len(rows) == len(every) else replace(train, rows=train.rows.select(rows))
        try:
            state = task.fit(part.raw(), processor)
        except RowsError as error:
            for what, struck in error.found.items():
                unlabelled.setdefault(what, []).extend(rows[struck].tolist())
            rows = np.setdiff1d(every, list(chain.from_iterable(unlabelled.values())))
        except DataError as error:
            where, lost = ", ".join(part.places), len(every) - len(rows)
            # What names a key of the recipe is about the recipe, not about a row.
            found = (p if p.file or p.key else replace(p, file=where) for p in error.problems)
            others = [without_unfit(problem, lost) for problem in found]
    # What the rest of the rows lacks may stand in those that can't be read, and that is told.
    told = [problem for problem in others if problem.key or not train.unread]
    return state, unlabelled, train.problems(unlabelled) + told


def _fit_stream(recipe: Recipe, origins: Origins, processor: Any) -> tuple[State | None, list[Problem]]:
    """Return the labels of streamed training rows, or the problems with them."""
    data = recipe.data
    # Of a mix that lacks a source nothing can be said.
    if not data.streaming or len(origins.train) < len(data.mix or (data.train,)):
        return None, []
    reading = Reading(data, origins, Wanted.by(recipe.task), recipe.training.seed)
    try:
        opened = reading.open()
    except DataError as error:
        return None, list(error.problems)
    try:
        return recipe.task.fit(opened, processor), []
    except DataError as error:
        return None, [replace(problem, file=reading.places) for problem in error.problems]


def _without(train: Split, unlabelled: Mapping[str, Sequence[int]], encoder: Encoder) -> tuple[Split, list[Problem]]:
    """Return the rows whose labels can be read, and those without text; and what else is wrong with the others.

    The encoder must know no labels, so that unknown ones are not reported once more.
    """
    numbers = sorted(set(chain.from_iterable(unlabelled.values())))
    chosen = train.rows.select(numbers)
    columns = encoder(chosen[:TOGETHER], numbers[:TOGETHER])
    found: dict[str, list[int]] = {}
    for row, reasons in zip(columns[INDEX], columns[FAULT], strict=True):
        for what in (reasons or "").split("\n"):
            if what and what not in unlabelled:
                found.setdefault(what, []).append(row)
    batches = replace(train, rows=chosen).raw().iter(batch_size=TOGETHER)
    blank = np.concatenate([encoder.task.blank(rows) for rows in batches])
    # Rows without text are not encoded anyway, and counted.
    fit = np.setdiff1d(np.arange(len(train.rows)), np.array(numbers)[~blank])
    return replace(train, rows=train.rows.select(fit)), train.problems(found)


@dataclass(frozen=True)
class Prepared:
    """The data of a run.

    Encoded rows have the task's features, and their `size`.
    """

    train: datasets.Dataset | Stream  # encoded rows; with `row` as below, unless they are streamed
    validation: datasets.Dataset | None
    """Encoded rows in the order of the split; `row` is the number of the raw row in `raw_validation`, from 0."""
    test: datasets.Dataset | None
    raw_validation: datasets.Dataset | None  # raw rows, only the task's columns
    raw_test: datasets.Dataset | None
    targets: State
    counted: Mapping[str, SplitReport]  # by split, as far as it was loaded
    facts: Mapping[str, Facts]  # by split; `checks.findings` judges them
    places: Mapping[str, str]  # names of the splits in messages
    fingerprint: str  # SHA-256, as hex, over everything that determines the rows: data, tokenizer, task and settings

    @property
    def reports(self) -> dict[str, SplitReport]:
        """One a split; of a stream, for the rows that this process read in the first pass."""
        if not isinstance(self.train, Stream) or self.train.report.rows == 0:
            return dict(self.counted)
        return {"train": self.train.report, **self.counted}


def prepare(recipe: Recipe, tokenizer: Any, machine: Machine) -> Prepared:
    """Load and encode the data of a run, or map them from the cache.

    The first rank of each node works, the others wait for it.

    Raises:
        DataError: The data are missing, unreadable, empty, or do not fit the recipe: every problem of every split. What
            `data.checks` finds is not raised here, for that see `data.checks.findings`. On the rank that works it is an
            `UnfitError`, which carries what these checks need.
        StorageError: The cache can't be written.
    """
    hush()
    data, task, seed = recipe.data, recipe.task, recipe.training.seed
    origins = data_sources.locate(data)
    if origins.problems:
        if machine.is_node_main:
            # Nothing can come of them, but there may be more to say.
            with tempfile.TemporaryDirectory(prefix="hf_finetune-") as scratch:
                build(recipe, tokenizer, origins, Path(scratch))
        raise DataError(origins.problems)
    stamps = origins.stamps()
    fingerprint = _fingerprint(recipe, tokenizer, origins)

    def build_unchanged(scratch: Path) -> Content:
        content = build(recipe, tokenizer, origins, scratch)
        origins.check_unchanged(stamps)
        return content

    # Other versions may encode the same rows otherwise. Not in the fingerprint: a run may go on with other versions.
    libraries_used = (hf_finetune, datasets, tokenizers, transformers)
    versions = [str(READING), *(library.__version__ for library in libraries_used)]
    entry = cache.Entry(cache_folder(data.cache), _sha256([fingerprint, versions, *_referenced(task, origins)]))
    content = entry.get(build_unchanged, builds=machine.is_node_main)
    if data.streaming:
        encoder = Encoder(task, tokenizer, content.targets, data.max_length, splits=data.overlong == "split")
        train: Any = Stream(Reading(data, origins, Wanted.by(task), seed), encoder)
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


def _referenced(task: Task, origins: Origins) -> list[str]:
    """Return a hash of name, size and time of every file that rows name: the cache holds their content, too.

    Not part of the fingerprint, which must be the same on a machine where the same files are younger.
    """
    if not (columns := tuple(task.file_columns())):
        return []
    digest, seen = hashlib.sha256(), set[Path]()
    for origin in origins:
        if not origin.stamps():  # of the Hub, whose commit says it all
            continue
        with suppress(DataError, StorageError):  # reported once the rows are read
            # Streamed, as the rows themselves are read only where the cache has no entry.
            for row in origin.stream(Wanted(columns, columns, files=columns)):
                for cell in (row[column] for column in columns):
                    path = cell.get("path") if isinstance(cell, dict) else cell
                    if not isinstance(path, str) or outside(path, ROWS) is not None:
                        continue
                    if (place := on_disk(path)) not in seen and place.is_file():
                        seen.add(place)
                        state = place.stat()
                        digest.update(f"{place} {state.st_size} {state.st_mtime_ns}\n".encode())
    return [digest.hexdigest()]


def _fingerprint(recipe: Recipe, tokenizer: Any, origins: Origins) -> str:
    data = recipe.data
    evaluated = {"validation": origins.validation, "test": origins.test}
    state = recipe.task.model_dump(mode="json")
    seeded = data.validation_share or data.limit or data.mix
    return _sha256(
        {
            "train": [origin.identity(whole=not data.streaming) for origin in origins.train],
            "weights": origins.weights,
            **{name: origin.identity(whole=True) for name, origin in evaluated.items() if origin is not None},
            "validation_share": data.validation_share,
            "limit": data.limit,
            # Without them the seed changes only the order, which is not part of the data.
            "seed": recipe.training.seed if seeded else None,
            "max_length": data.max_length,
            "overlong": data.overlong,
            # The order of streamed rows is the library's business, and follows from how they are read.
            "stream": [data.shuffle_buffer, datasets.__version__, READING] if data.streaming else None,
            # Without younger keys that change nothing.
            "task": {key: value for key, value in state.items() if not (key in YOUNGER and value == YOUNGER[key])},
            "tokenizer": _tokenizer_state(tokenizer),
        }
    )


YOUNGER: Mapping[str, Any] = {
    "escape_special_tokens": False,
    "date": None,
    "chat_template": None,
    "template_options": {},
    "reasoning": "train",
    "split_turns": False,
}
"""Keys of tasks that version 0.1.0 did not have, with what it did: a run that it began can go on."""


def _tokenizer_state(processor: Any) -> Any:
    """Return everything about a processor that shows in features, in a form that JSON takes."""
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


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


GIVEN = "--data"  # the key that messages name where files are given on the command line
NAME = "evaluated"  # the name of these rows in messages


@dataclass(frozen=True)
class OneSplit:
    """Rows ready for evaluation."""

    origins: Origins
    split: Split  # the raw rows, all of them
    encoding: Encoding
    warnings: tuple[Problem, ...]

    @property
    def sources(self) -> list[dict[str, Any]]:
        """The sources of the rows, with their identity, for a record of the evaluation."""
        return [{"source": origin.place, "sha256": origin.identity(whole=True)} for origin in self.origins]

    @property
    def key(self) -> list[str]:
        """The same whatever the files are called."""
        return [source["sha256"] for source in self.sources]


@contextmanager
def opened(
    recipe: Recipe,
    processor: Any,
    targets: State,
    *,
    split: str | None,
    files: Sequence[str] = (),
    columns: Sequence[str] = (),
) -> Iterator[OneSplit]:
    """Read and encode rows for a model whose labels are known; inside, they can be used.

    They are those of a split of the recipe, `train`, `validation` or `test`, or of files instead; `columns` are wanted
    beside the task's.

    Raises:
        DataError: Rows are missing or unfit, or `data.checks` finds something that is an error.
        RecipeError: The recipe has no such split.
        StorageError: There is no place for temporary files.
    """
    with cache.scratch(cache_folder(recipe.data.cache), ".one-") as folder:
        with phase("reading data"):
            origins, rows = _selected(recipe, split, files, columns, Path(folder, "raw"))
        encoder = Encoder(
            recipe.task, processor, targets, recipe.data.max_length, splits=recipe.data.overlong == "split"
        )
        encoding, problems = encode(rows, encoder, recipe.data, Path(folder))
        if encoding is None or problems:
            raise DataError(problems)
        facts = gather({NAME: rows}, {NAME: encoding}, encoder)
        found = checks.findings(recipe, facts, {NAME: encoding.report}, {NAME: ", ".join(rows.places)})
        # No recipe has a key `data.evaluated`.
        judged = [(level, replace(problem, key="")) for level, problem in found]
        if errors := [problem for level, problem in judged if level == "error"]:
            raise DataError(errors)
        yield OneSplit(origins, rows, encoding, tuple(problem for _, problem in judged))


def _selected(
    recipe: Recipe, split: str | None, files: Sequence[str], columns: Sequence[str], folder: Path
) -> tuple[Origins, Split]:
    """Return the sources of the rows that `opened` is asked for, and no others, and the rows."""
    data = recipe.data
    # Streamed rows are read whole here.
    changes: dict[str, Any] = {"streaming": False}
    if files:
        found, wrong = find(files, None, GIVEN)
        if wrong:
            raise DataError(wrong)
        origins = Origins((), (1.0,), LocalFiles(GIVEN, tuple(found), data.cache), None)
        # The limit draws from the recipe's splits, never from files that are given.
        changes |= {"limit": None, "validation_share": None}
    else:
        there = {"train": True, "validation": data.has_validation, "test": data.test is not None}
        if not there.get(split or ""):
            had = ", ".join(name for name, has in there.items() if has)
            raise RecipeError(f"the run has no split {split!r}; it has {had}, or give --data FILE")
        kept = {str(split)}
        if split == "train" or (split == "validation" and data.validation_share is not None):
            kept = {"train", "mix", "validation_share"}
        changes |= dict.fromkeys({"train", "mix", "validation", "validation_share", "test"} - kept)
        origins = data_sources.locate(data.model_copy(update=changes))
        if origins.problems:
            raise DataError(origins.problems)
    wanted = Wanted.by(recipe.task)
    more = tuple(column for column in dict.fromkeys(columns) if column not in wanted.columns)
    wanted = replace(wanted, columns=wanted.columns + more, texts=wanted.texts + more, declared=True)
    block = data.model_copy(update=changes)
    loaded, problems = splits.load(block, origins, wanted, recipe.training.seed, folder)
    if problems:
        raise DataError(problems)
    return origins, replace(loaded[split or "validation"], name=NAME)
