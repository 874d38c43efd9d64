"""Names and paths of a recipe that are wrong on this machine, whatever the data and the models hold.

No rules of the recipe: the recipe of a finished run must load on another machine too. Nothing is opened.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hf_finetune.errors import Problem
from hf_finetune.schema.blocks import Data, Source
from hf_finetune.schema.expectations import shown
from hf_finetune.schema.modelfolder import PACKAGE
from hf_finetune.schema.roots import outside

NO_COMMIT = "is no commit, which require_pinned asks for; give its 40 digits"
UNPINNED = "is missing, and require_pinned asks for a commit; give its 40 digits"
LONGEST_PART = 255
"""Bytes of a file name on every common file system."""

_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_HUB_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_PACKAGE = re.compile(r"package:[A-Za-z_]\w*(?:/[^/\0]+)*/?", re.ASCII)
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.ASCII | re.DOTALL)
_HUB_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+).*", re.ASCII)
_SPLIT = ("train", "validation", "test")


def is_commit(revision: str) -> bool:
    """Whether a revision is a full commit hash, which always means the same content."""
    return _COMMIT.fullmatch(revision) is not None


def problems(recipe: Any) -> list[Problem]:
    """What is wrong with the names and paths of a recipe, without file and line; all of kind `RecipeError`.

    Args:
        recipe: A `Recipe`, or what could be read of one (`Reading.partial`): fields that are absent are passed over.
    """
    checks: tuple[Callable[[Any], Iterator[Problem]], ...] = (_model, _adapter, _data, _cache, _output)
    found: list[Problem] = []
    for check in checks:
        try:
            for problem in check(recipe):
                found.append(problem)
        except AttributeError:
            # The field is wrong or missing, which is a finding of its own.
            continue
    return found


def model_name(name: str) -> str | None:
    """Why a model name is malformed, or None; a folder that is not there is left to whoever opens it."""
    if (refusal := _unwritable(name)) is not None:
        return refusal
    if name.startswith(PACKAGE):
        fits = _PACKAGE.fullmatch(name) and ".." not in name.split("/")
        return None if fits else f"{shown(name)} is no package path; write package:NAME/PATH, a folder inside a package"
    if is_local(name) or _is_hub_id(name):
        return None
    return _address(name) or _no_hub_id(name)


def is_local(name: str) -> bool:
    """Whether a model name or a data source means a folder, which need not be there."""
    return name.startswith(("/", "./", "~")) or _is_folder(name)


def _address(name: str) -> str | None:
    if hub := _HUB_URL.fullmatch(name):
        return f"{shown(name)} is an address; write the Hub id, {hub[1]}"
    if _URL.match(name):
        return f"{shown(name)} is an address; give a Hub id (owner/name) or a local folder"
    return None


def _no_hub_id(name: str) -> str:
    ways = "give a Hub id (owner/name), a local folder or package:NAME/PATH"
    if ".." in name.split("/"):
        return f"there is no folder {shown(name)}; {ways}"
    if name.count("/") > 1:
        return f"there is no folder {shown(name)}, and a Hub id has just one slash; {ways}"
    reason = "a Hub id has letters, digits, '-', '_' and '.', no '--', no '..', and starts with a letter or digit"
    return f"there is no folder {shown(name)}, and it is no Hub id: {reason}; {ways}"


def output(path: str) -> str | None:
    """Why a path can't be a run folder, or None; whether it can be written is left to whoever writes."""
    if (refusal := _unwritable(path)) is not None:
        return refusal
    refusal = _no_folder_name(path) or _no_run_folder(path)
    if refusal is None and (why := outside(path)) is not None:
        return f"{shown(path)} {why}"
    return refusal


def _no_folder_name(path: str) -> str | None:
    if not path.strip():
        return "is blank; name the folder of this run, e.g. runs/my_run"
    if path.startswith("~"):
        return f"{shown(path)}: ~ is not expanded; write the path out"
    if _URL.match(path):
        return f"{shown(path)} is an address; a run folder is local, e.g. runs/my_run"
    if ".." in Path(path).parts:
        return f"{shown(path)} holds '..'; write the path without .."
    if any(len(part.encode()) > LONGEST_PART for part in Path(path).parts):
        return f"has a part of more than {LONGEST_PART} bytes, which no file system takes; shorten it"
    return None


def _no_run_folder(path: str) -> str | None:
    places = {"the root of the file system": "/", "the home folder": "~", "the working directory": "."}
    for what, place in places.items():
        try:
            same = Path(path).resolve() == Path(place).expanduser().resolve()
        except (OSError, RuntimeError):  # a loop of symlinks; no home
            continue
        if same:
            return f"{shown(path)} is {what}; name a folder of its own for this run, e.g. runs/my_run"
    return None


def _model(recipe: Any) -> Iterator[Problem]:
    name = recipe.model.name
    if (refusal := model_name(name)) is not None:
        yield Problem(refusal, key="model.name")
        return
    if name.startswith(PACKAGE):
        return
    if is_local(name):
        if (refusal := outside(name)) is not None:
            yield Problem(f"{shown(name)} {refusal}", key="model.name")
    elif recipe.require_pinned and recipe.model.revision is None:
        yield Problem(UNPINNED, key="model.revision")


def _adapter(recipe: Any) -> Iterator[Problem]:
    folder = getattr(recipe.adapter, "continue_from", None)
    if folder is not None and (refusal := _unwritable(folder) or outside(folder)) is not None:
        yield Problem(f"{shown(folder)} {refusal}", key="adapter.from")


def _cache(recipe: Any) -> Iterator[Problem]:
    folder = recipe.data.cache
    if folder is not None and (refusal := _unwritable(folder) or outside(folder)) is not None:
        yield Problem(f"{shown(folder)} {refusal}", key="data.cache")


def _output(recipe: Any) -> Iterator[Problem]:
    if (refusal := output(recipe.output)) is not None:
        yield Problem(refusal, key="output")


def _data(recipe: Any) -> Iterator[Problem]:
    data = recipe.data
    yield from _source(data, "data", pinned=recipe.require_pinned)
    for name in _SPLIT:
        yield from _files(getattr(data, name, None), data, f"data.{name}")
    for index, part in enumerate(data.mix or ()):
        yield from _source(part, f"data.mix.{index}", pinned=recipe.require_pinned)
        yield from _files(part.train, part, f"data.mix.{index}.train")


def _source(where: Data | Source, block: str, *, pinned: bool) -> Iterator[Problem]:
    name = where.source
    if name is None:
        return
    key = f"{block}.source"
    if (refusal := _unwritable(name) or _address(name)) is not None:
        yield Problem(refusal, key=key)
    elif is_local(name):
        if (refusal := outside(name)) is not None:
            yield Problem(f"{shown(name)} {refusal}", key=key)
    elif pinned and where.revision is None:
        yield Problem(UNPINNED, key=f"{block}.revision")


def _files(names: str | list[str] | None, where: Data | Source, key: str) -> Iterator[Problem]:
    """Local files and globs; a symlink counts as what it leads to."""
    source = where.source
    if names is None or (source is not None and not _is_folder(source)):
        return
    for name in [names] if isinstance(names, str) else names:
        if (refusal := _unwritable(name)) is not None:
            yield Problem(refusal, key=key)
        elif _URL.match(name):
            yield Problem(f"{shown(name)} is an address, nothing is downloaded from there; give a file", key=key)
        else:
            refused = [f"{shown(file)} {why}" for file in _matches(source, name) if (why := outside(file)) is not None]
            yield from (Problem(why, key=key) for why in refused[:1])


def _matches(folder: str | None, pattern: str) -> list[str]:
    """The files that a name or a glob means; itself where there are none."""
    path = Path(folder or "", pattern)
    try:
        path = path.expanduser()
    except RuntimeError:  # no such user
        return [str(path)]
    return glob.glob(str(path), recursive=True) or [str(path)]  # noqa: PTH207 - a pattern may be absolute


def _unwritable(text: str) -> str | None:
    """Characters that no path and no name has."""
    odd = next((char for char in text if not char.isprintable()), None)
    if odd is None:
        return None
    return f"{shown(text)} holds the character U+{ord(odd):04X}, which no name or path should have; remove it"


def _is_folder(name: str) -> bool:
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a NUL
        return False


def _is_hub_id(name: str) -> bool:
    """The rules of `huggingface_hub.utils.validate_repo_id`."""
    fits = _HUB_ID.fullmatch(name) is not None and len(name) <= 96
    return fits and not any(bad in name for bad in ("--", "..")) and name[-1] not in "-." and not name.endswith(".git")
