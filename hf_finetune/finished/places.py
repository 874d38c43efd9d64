"""The recipe in a run folder, read anew: its relative paths belong to the working directory of the run."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_finetune.recipe import Recipe

if TYPE_CHECKING:
    from hf_finetune.runfolder import RunFolder
    from hf_finetune.schema.blocks import Data, Source


def read(folder: RunFolder, started_in: Path | None, overrides: Sequence[str]) -> Recipe:
    """The resolved recipe of a run, with overrides.

    Args:
        folder: The run.
        started_in: Its working directory; None where nobody knows.
        overrides: Each `key.path=value`; their relative paths belong to this process's working directory.

    Raises:
        RecipeError: The file or an override is wrong.
    """
    stored = Recipe.load(str(folder.recipe))
    moved = [f"{key}={json.dumps(value)}" for key, value in _moved(stored, folder, started_in)]
    return Recipe.load(str(folder.recipe), [*moved, *overrides])


def _moved(recipe: Recipe, folder: RunFolder, started_in: Path | None) -> Iterator[tuple[str, str | list[str]]]:
    """Keys with relative paths that lead to something, from where the run was started."""
    if (place := _model(recipe.model.name, folder, started_in)) is not None:
        yield "model.name", place
    if started_in is None or started_in == Path.cwd():
        return
    blocks: list[tuple[str, Data | Source, tuple[str, ...]]] = [("data", recipe.data, ("train", "validation", "test"))]
    blocks += [(f"data.mix.{number}", part, ("train",)) for number, part in enumerate(recipe.data.mix or ())]
    for key, block, splits in blocks:
        if block.source is not None:
            if _is_relative(block.source) and (started_in / block.source).is_dir():
                yield f"{key}.source", str(started_in / block.source)
            continue
        for split in splits:
            names = getattr(block, split, None)
            if names is not None:
                yield f"{key}.{split}", _files(names, started_in)


def _model(name: str, folder: RunFolder, started_in: Path | None) -> str | None:
    """A local base that is not where its name says: from where the run was started, else where PEFT would look."""
    if name.startswith("package:") or not _is_relative(name):
        return None
    if started_in is not None and (started_in / name).is_dir():
        return str(started_in / name)
    if Path(name).is_dir():
        return None
    try:
        config = json.loads((folder.adapter / "adapter_config.json").read_text(encoding="utf-8"))
        place = Path(config["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(place) if place.is_absolute() and place.is_dir() else None


def _files(names: str | list[str], started_in: Path) -> str | list[str]:
    if isinstance(names, list):
        return [_file(name, started_in) for name in names]
    return _file(names, started_in)


def _file(name: str, started_in: Path) -> str:
    """A name or a glob from where the run was started; brackets of the folder's own name are no pattern."""
    if not _is_relative(name):
        return name
    exact = started_in / name
    return str(exact) if exact.is_file() else str(Path(glob.escape(str(started_in)), name))


def _is_relative(name: str) -> bool:
    return not Path(name).is_absolute() and not name.startswith("~")
