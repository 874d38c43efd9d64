"""From the recipe's data block to encoded rows: find, load, split, encode, cache."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import tokenizers
import transformers

import hf_finetune
from hf_finetune import quiet
from hf_finetune.data import building, cache, sources
from hf_finetune.data.building import UnfitError
from hf_finetune.data.cells import Wanted
from hf_finetune.data.encoding import Encoder
from hf_finetune.data.facts import Facts, Tally
from hf_finetune.data.reading import Reading
from hf_finetune.data.sources import Origins
from hf_finetune.data.splitreport import SplitReport
from hf_finetune.data.streaming import Stream
from hf_finetune.data.workplace import Workplace
from hf_finetune.errors import DataError
from hf_finetune.tasks.base import State, tokenizer_of
from hf_finetune.terminal import Phases, unseen

if TYPE_CHECKING:
    from hf_finetune.hardware import Machine
    from hf_finetune.recipe import Recipe

__all__ = ["Facts", "Prepared", "SplitReport", "Stream", "Tally", "UnfitError", "prepare"]


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
    quiet.hush()
    data, task, seed = recipe.data, recipe.task, recipe.training.seed
    origins = sources.locate(data)
    reading = Reading.of(data, origins, Wanted.by(task), seed)
    if origins.problems:
        if machine.is_node_main:
            # Nothing can come of them, but there may be more to say.
            with tempfile.TemporaryDirectory(prefix="hf_finetune-") as scratch:
                building.build(recipe, tokenizer, reading, Workplace(Path(scratch), data.workers, phase))
        raise DataError(origins.problems)
    stamps = origins.stamps()
    fingerprint = _fingerprint(recipe, tokenizer, origins)

    def build(scratch: Path) -> cache.Content:
        content = building.build(recipe, tokenizer, reading, Workplace(scratch, data.workers, phase))
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
