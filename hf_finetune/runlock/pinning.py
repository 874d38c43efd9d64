"""What a recipe leaves open and its run has fixed: the commits of revisions, the date that a chat template prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune.runlock import lockfile
from hf_finetune.schema import yamlfile

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe
    from hf_finetune.runlock.lockfile import Lock


def pinned(recipe: Recipe, lock: Lock) -> Recipe:
    """A recipe with commits in place of the branches and tags that they were when the run was locked, and its date.

    Args:
        recipe: That of the run, or one that differs from it: what the lock does not name stays as it is.
        lock: Of the run.
    """
    model = recipe.model
    if lock.model.commit and (model.name, model.revision) == (lock.model.source, lock.model.asked):
        model = model.model_copy(update={"revision": lock.model.commit})
    data: dict[str, Any] = {}
    commits = {(one.source, one.asked): one.commit for one in lock.data.values() if one.commit}
    data["revision"] = commits.get((recipe.data.source, recipe.data.revision), recipe.data.revision)
    if recipe.data.mix is not None:
        data["mix"] = [
            part.model_copy(update={"revision": commits.get((part.source, part.revision), part.revision)})
            for part in recipe.data.mix
        ]
    task, day = recipe.task, _date(lock)
    if day is not None and getattr(task, "date", day) is None:
        task = task.model_copy(update={"date": day})
    return recipe.model_copy(update={"model": model, "data": recipe.data.model_copy(update=data), "task": task})


def day(file: Path) -> str | None:
    """The date that the chat template of a run prints, as YYYY-MM-DD; None where none is kept.

    Args:
        file: Its `run.lock.json`.
    """
    lock = lockfile.find(file)
    return None if lock is None else _date(lock)


def _date(lock: Lock) -> str | None:
    found: Any = yamlfile.parse(lock.recipe.whole, "run.lock.json").value
    date = found["task"].get("date")
    return None if date is None else str(date)


def as_trained(recipe: Recipe, file: Path) -> Recipe:
    """A recipe with the commits of the run that left a lock; as it is where there is none that can be read.

    Args:
        recipe: Of the run.
        file: Its `run.lock.json`.
    """
    lock = lockfile.find(file)
    return recipe if lock is None else pinned(recipe, lock)
