"""What can be said of a finished run without torch: whether it can be used, its recipe, the files that it names.

A recipe is read anew: its relative paths belong to the working directory of the run. `look` is what each verb that
takes a run begins with, so that a wrong path is answered in a moment.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hf_finetune.config import paths
from hf_finetune.config.blocks import Data, Source
from hf_finetune.config.paths import outside, refuse_outside
from hf_finetune.config.section import key_of
from hf_finetune.data import find
from hf_finetune.errors import CheckpointError, DataError, Findings, Problem, RecipeError
from hf_finetune.recipe import Recipe
from hf_finetune.run import folder as run_folder
from hf_finetune.run.folder import Kept, RunFolder


@dataclass(frozen=True)
class Opened:
    """A finished run whose folder was read."""

    folder: RunFolder
    kept: Kept | None
    """What `targets.json` holds; None in runs of a version that wrote none."""
    recipe: Recipe
    """As resolved, with the overrides of whoever opened it."""


@dataclass(frozen=True)
class Rows:
    """Labelled rows that a verb is to read."""

    files: tuple[str, ...] = ()
    """Given with `--data`."""
    split: str | None = None
    """A split of the recipe, where no files are given; None takes what is held out."""
    columns: tuple[str, ...] = ()
    """Needed besides those of the task."""


def look(place: str, overrides: Sequence[str] = (), *, others: Iterable[str] = (), rows: Rows | None = None) -> None:
    """Find what is wrong with the paths of a command line, all of it at once; takes a moment.

    Args:
        place: The run folder.
        overrides: See `read`.
        others: Run folders that it is compared with.
        rows: What is read besides.

    Raises:
        FinetuneError: A run, its base, or a file can't be used; see `read`.
    """
    findings = Findings()
    if rows is not None:
        with findings.collect():
            refuse_outside(("--data", file) for file in rows.files)
    opened = None
    with findings.collect():
        opened = read(place, overrides)
        base = opened.recipe.model
        paths.refuse_uncached(paths.resolve(base.name), base.revision)
    for other in others:
        with findings.collect():
            read(other)
    if rows is not None and findings.exit_code != RecipeError.exit_code:
        unreadable = _unreadable(rows, None if opened is None else opened.recipe)
        if unreadable:
            findings.add(DataError(unreadable))
    findings.raise_errors()


def read(place: str, overrides: Sequence[str] = ()) -> Opened:
    """Read the folder of a finished run.

    Args:
        place: The run folder.
        overrides: Each `key.path=value`; keys of which the trained model depends are refused.

    Raises:
        RecipeError: There is no run, it lies outside `HF_FINETUNE_ROOT`, or an override is wrong.
        CheckpointError: The run is not finished, or its adapter is missing.
    """
    if (why := outside(place)) is not None:
        raise RecipeError(Problem(why, file=place))
    folder = RunFolder(place)
    _refuse_unfinished(folder)
    _refuse_foreign(overrides)
    kept = run_folder.read_targets(folder.targets)
    return Opened(folder, kept, _recipe(folder, None if kept is None else kept.started_in, overrides))


def _unreadable(rows: Rows, recipe: Recipe | None) -> list[Problem]:
    """What the heads of the files tell; files alone where the recipe could not be read."""
    task: Any = None
    if recipe is not None:
        needed = [*recipe.task.columns(), *rows.columns]
        task = SimpleNamespace(columns=lambda: needed, optional_columns=recipe.task.optional_columns)
    if rows.files:
        data = SimpleNamespace(source=None, test=list(rows.files))
        found = find.problems(SimpleNamespace(task=task, data=data))
        return [replace(problem, key="--data") for problem in found]
    if recipe is None:
        return []
    split = rows.split or ("test" if recipe.data.test is not None else "validation")
    data = SimpleNamespace(source=recipe.data.source, **{split: getattr(recipe.data, split)})
    return find.problems(SimpleNamespace(task=task, data=data))


def _refuse_unfinished(folder: RunFolder) -> None:
    if not folder.path.is_dir() or not folder.recipe.is_file():
        what = "holds no run: there is no recipe.yaml in it" if folder.path.is_dir() else "is not there"
        raise RecipeError(Problem(f"{what}; give the run folder, `output` of the recipe", file=str(folder.path)))
    state, reason = folder.condition()
    if state == "running":
        raise CheckpointError(Problem("the run is not finished (running); wait for it", file=str(folder.path)))
    if state != "done":
        why = reason.partition("\n")[0]
        told = f"{state}: {why}" if why else state
        message = f"the run is not finished ({told}); the training command, given again, resumes it"
        raise CheckpointError(Problem(message, file=str(folder.path)))
    if not any((folder.adapter / name).is_file() for name in ("adapter_config.json", "config.json")):
        message = "the adapter is not there, though the run is finished; bring it back, or train anew with --restart"
        raise CheckpointError(Problem(message, file=str(folder.adapter)))


def _refuse_foreign(overrides: Sequence[str]) -> None:
    for word in overrides:
        key, _, value = word.partition("=")
        may = key_of(Recipe, key).finished
        if may == "never" or key in Recipe.model_fields or (may == "name" and value.startswith("[")):
            reason = "can't change once a model is trained; leave it out, or train anew" if key else "is no override"
            raise RecipeError(Problem(reason, file="command line", key=key))


def _recipe(folder: RunFolder, started_in: Path | None, overrides: Sequence[str]) -> Recipe:
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
