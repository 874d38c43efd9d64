"""Everything that a run reads, with what tells it from other things: a commit on the Hub, or hashes of local files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hf_finetune import digests
from hf_finetune.adaptation import peftio
from hf_finetune.data import cache, sources
from hf_finetune.data.sources import HubSplit
from hf_finetune.runlock.lockfile import File, Input
from hf_finetune.schema.modelfolder import resolve
from hf_finetune.schema.paths import is_commit

if TYPE_CHECKING:
    from hf_finetune.data.sources import Origin
    from hf_finetune.recipe import Recipe

SUFFIXES = {".safetensors", ".model", ".jinja"}
NAMES = {
    "adapter_config.json", "added_tokens.json", "config.json", "generation_config.json", "merges.txt",
    "model.safetensors.index.json", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "vocab.json",
    "vocab.txt",
}  # fmt: skip
"""What is read of a model's or an adapter's folder, besides files of `SUFFIXES`: weights, configs, tokenizer."""


def of_model(recipe: Recipe, commit: str | None = None) -> Input:
    """The base model.

    Args:
        recipe: Names it.
        commit: What the Hub's answer was, where it was asked; else the revision counts if it is a commit.
    """
    place = Path(resolve(recipe.model.name))
    if place.is_absolute():
        return Input(files=_of_folder(place, recipe))
    asked = recipe.model.revision
    return Input(source=recipe.model.name, asked=asked, commit=commit or _pinned(asked))


def of_adapter(recipe: Recipe) -> Input | None:
    """The adapter that is trained further; None for a new one.

    Raises:
        RecipeError: It is not there.
    """
    place = getattr(recipe.adapter, "continue_from", None)
    return None if place is None else Input(files=_of_folder(Path(peftio.find(place, "adapter.from")), recipe))


def of_data(recipe: Recipe, *, asks: bool = False) -> dict[str, Input]:
    """The sources of every split that can be found, by recipe key.

    Args:
        recipe: Names them.
        asks: Ask the Hub, or its cache, for the commits of data sets whose revision is none.
    """
    streams = recipe.data.streaming
    return {
        origin.key: _of_split(origin, asks=asks, whole=not (streams and ".train" in origin.key))
        for origin in sources.locate(recipe.data)
    }


def _of_split(origin: Origin, *, asks: bool, whole: bool) -> Input:
    if isinstance(origin, HubSplit):
        commit = _pinned(origin.commit) if asks else _pinned(origin.revision)
        where = Input(source=origin.source, subset=origin.subset, split=origin.split)
        return where.model_copy(update={"asked": origin.revision, "commit": commit})
    return Input(files=list(_hashed(origin.files, [digest.hex() for digest in origin.digests(whole=whole)])))


def _pinned(revision: str | None) -> str | None:
    return revision if revision is not None and is_commit(revision) else None


def _of_folder(folder: Path, recipe: Recipe) -> list[File]:
    read = (file for file in folder.iterdir() if file.suffix in SUFFIXES or file.name in NAMES)
    files = sorted(str(file) for file in read if file.is_file())
    with ThreadPoolExecutor() as threads:  # hashing lets go of the interpreter
        found = threads.map(partial(digests.sha256, root=cache.root(recipe.data.cache)), files)
        return list(_hashed(files, [digest.hex() for digest in found]))


def _hashed(files: Sequence[str], hashes: Iterable[str]) -> Iterable[File]:
    """Files by their names below the folder that holds all of them."""
    top = os.path.commonpath([str(Path(file).absolute().parent) for file in files]) if files else ""
    for file, sha256 in zip(files, hashes, strict=True):
        name = Path(file).absolute().relative_to(top).as_posix()
        yield File(name=name, size=Path(file).stat().st_size, sha256=sha256)
