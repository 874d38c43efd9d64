"""Read a finished run without torch: can it be used, what is its recipe, where are the files that it names?

`look` is what each verb that takes a run begins with, so that a wrong path is answered in a moment.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hf_finetune.config import paths
from hf_finetune.config.blocks import Data, Source
from hf_finetune.config.paths import outside, refuse_outside
from hf_finetune.config.section import key_of
from hf_finetune.config.suggestions import meant
from hf_finetune.data import readers
from hf_finetune.errors import CheckpointError, DataError, Findings, Problem, RecipeError, StorageError
from hf_finetune.recipe import Recipe
from hf_finetune.run import folder as run_folder
from hf_finetune.run.folder import RunFolder
from hf_finetune.run.store import MANIFEST, TRAINED

# Stands for the split that `evaluate` takes by itself.
HELD_OUT = "held-out"


def look(
    place: str,
    overrides: Sequence[str] = (),
    *,
    others: Iterable[str] = (),
    files: Sequence[str] = (),
    split: str | None = None,
    columns: Sequence[str] = (),
) -> None:
    """Find everything that is wrong with the paths of a command line; takes a moment.

    Args:
        place: See `read`.
        overrides: See `read`.
        others: What it is compared with: run folders, `base`, or yardsticks of the task.
        files: Labelled rows, given with `--data`.
        split: Split of the recipe to look at where no files are given, perhaps `HELD_OUT`; None looks at none.
        columns: Columns that the rows need besides those of the task.

    Raises:
        FinetuneError: A run, its base, or a file can't be used; see `read`.
    """
    findings = Findings()
    with findings.collect():
        refuse_outside(("--data", file) for file in files)
    recipe = None
    with findings.collect():
        recipe = read(place, overrides)
        paths.refuse_uncached(paths.resolve(recipe.model.name), recipe.model.revision)
    inherent = {"base", *(() if recipe is None else recipe.task.yardsticks)}
    for other in others:
        with findings.collect():
            if other not in inherent:
                read(other)
    # A path that is refused is not looked at; without a recipe the columns of files are not known.
    if (files or (split and recipe)) and findings.exit_code != RecipeError.exit_code:
        task = None
        if recipe is not None:
            needed = [*recipe.task.columns(), *columns]
            task = SimpleNamespace(columns=lambda: needed, optional_columns=recipe.task.optional_columns)
        if files or recipe is None:
            data = SimpleNamespace(source=None, test=list(files))
        else:
            name = ("test" if recipe.data.test is not None else "validation") if split == HELD_OUT else str(split)
            data = SimpleNamespace(source=recipe.data.source, **{name: getattr(recipe.data, name)})
        found = readers.problems(SimpleNamespace(task=task, data=data))
        if found:
            findings.add(DataError([replace(problem, key="--data") for problem in found] if files else found))
    findings.raise_errors()


def split(place: str) -> tuple[RunFolder, Path | None]:
    """Tell the run folder, and the checkpoint in it if one is named."""
    path = Path(place)
    if re.fullmatch(r"checkpoint-\d+", path.name):
        folder = RunFolder(str(path.parent.parent))
        if path.parent == folder.checkpoints:
            return folder, path
    return RunFolder(place), None


def refuse_output(name: str, *, restart: bool) -> None:
    """Refuse an output of `predict` that exists, or whose folder does not."""
    if Path(name).exists() and not restart:
        raise RecipeError(Problem("exists already; name another file, or give --restart to replace it", file=name))
    if not Path(name).parent.is_dir():
        raise StorageError(Problem(f"there is no folder {str(Path(name).parent)!r}; make it first", file=name))


def read(place: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe of a finished run, as resolved, with overrides.

    Args:
        place: The run folder, or a checkpoint in it: `RUN/checkpoints/checkpoint-20`.
        overrides: Each `key.path=value`; keys that the trained model depends on are refused.

    Raises:
        RecipeError: There is no run, it lies outside `HF_FINETUNE_ROOT`, or an override is wrong.
        CheckpointError: The run is not finished, its adapter is missing, or it has not kept this checkpoint.
    """
    if (why := outside(place)) is not None:
        raise RecipeError(Problem(why, file=place))
    folder, checkpoint = split(place)
    if not folder.path.is_dir() or not folder.recipe.is_file():
        is_there, hint = folder.path.is_dir(), "; give the run folder, `output` of the recipe"
        what = "holds no run: there is no recipe.yaml in it" if is_there else "does not exist"
        hint = hint if is_there else meant(place, holding=folder.recipe.name) or hint
        raise RecipeError(Problem(f"{what}{hint}", file=str(folder.path)))
    state, reason = folder.condition()
    if state != "done":
        reason = reason.partition("\n")[0]
        how = "wait for it" if state == "running" else "run the training command again to resume it"
        what = f"{state}: {reason}" if reason and state != "running" else state
        raise CheckpointError(Problem(f"the run is not finished ({what}); {how}", file=str(folder.path)))
    if not any((folder.adapter / name).is_file() for name in ("adapter_config.json", "config.json")):
        message = "the adapter is missing, though the run is finished; restore it, or train anew with --restart"
        raise CheckpointError(Problem(message, file=str(folder.adapter)))
    if checkpoint is not None and not all((checkpoint / name).is_file() for name in (MANIFEST, TRAINED)):
        kept = sorted(path.parent.name for path in folder.checkpoints.glob(f"checkpoint-*/{TRAINED}"))
        message = f"the run has not kept this checkpoint in one piece; it has {', '.join(kept) or 'none'}"
        raise CheckpointError(Problem(message, file=str(checkpoint)))
    # A whole block has keys that the model depends on; a list of label columns in place of one is another problem.
    for word in overrides:
        key, is_override, value = word.partition("=")
        if not is_override:
            message = f"{word!r} is no override (key.path=value); texts are read from a pipe, or a file (--input)"
            raise RecipeError(Problem(message, file="command line"))
        may = key_of(Recipe, key).finished
        if may == "never" or key in Recipe.model_fields or (may == "name" and value.startswith("[")):
            reason = "can't change once a model is trained; leave it out, or train anew" if key else "is no override"
            raise RecipeError(Problem(reason, file="command line", key=key))
    targets = run_folder.read_targets(folder.targets)
    # Relative paths of the stored recipe belong to the working directory of the run, those of overrides to this one.
    moved = _moved(Recipe.load(str(folder.recipe)), folder, None if targets is None else targets[1])
    words = [f"{key}={json.dumps(value)}" for key, value in moved]
    return Recipe.load(str(folder.recipe), [*words, *overrides])


def _moved(recipe: Recipe, folder: RunFolder, started_in: Path | None) -> Iterator[tuple[str, str | list[str]]]:
    """Yield keys with relative paths, and where these lead from the working directory of the run (None: not known)."""
    if (place := _base(recipe.model.name, folder, started_in)) is not None:
        yield "model.name", place
    if started_in is None or started_in == Path.cwd():
        return

    def moved(name: str) -> str:
        if not _is_relative(name):
            return name
        exact = started_in / name
        # Brackets in the folder's own name are no pattern.
        return str(exact) if exact.is_file() else str(Path(glob.escape(str(started_in)), name))

    blocks: list[tuple[str, Data | Source, tuple[str, ...]]] = [("data", recipe.data, ("train", "validation", "test"))]
    blocks += [(f"data.mix.{number}", part, ("train",)) for number, part in enumerate(recipe.data.mix or ())]
    for key, block, splits in blocks:
        if block.source is not None:
            if _is_relative(block.source) and (started_in / block.source).is_dir():
                yield f"{key}.source", str(started_in / block.source)
            continue
        for split in splits:
            names: Any = getattr(block, split, None)
            if names is not None:
                yield f"{key}.{split}", [moved(name) for name in names] if isinstance(names, list) else moved(names)


def _base(name: str, folder: RunFolder, started_in: Path | None) -> str | None:
    """The place of a local base that is not where its name says: where the run was started, else where PEFT looks."""
    if name.startswith("package:") or not _is_relative(name):
        return None
    if started_in is not None and (started_in / name).exists():
        return str(started_in / name)
    if Path(name).exists():
        return None
    try:
        config = json.loads((folder.adapter / "adapter_config.json").read_text(encoding="utf-8"))
        place = Path(config["base_model_name_or_path"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(place) if place.is_absolute() and place.is_dir() else None


def _is_relative(name: str) -> bool:
    return not Path(name).is_absolute() and not name.startswith("~")
