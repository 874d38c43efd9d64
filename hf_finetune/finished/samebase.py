"""Whether the base of a finished run is still the one that it was trained on: an adapter fits no other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_finetune import runlock
from hf_finetune.errors import CheckpointError, Problem
from hf_finetune.model import pretrained
from hf_finetune.runlock import inputs
from hf_finetune.terminal import warn

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe
    from hf_finetune.runfolder import RunFolder
    from hf_finetune.runlock.lockfile import File, Input

KEY = "model.name"
SHOWN = 3
"""Names of files in a message, at most."""


def locked(folder: RunFolder) -> Input | None:
    """The base that a run was trained on; None where its lock can't be read.

    Args:
        folder: The run.
    """
    lock = runlock.find(folder.run_lock)
    return None if lock is None else lock.model


def check(recipe: Recipe, folder: RunFolder) -> None:
    """Compare the base with the run's lock: local files by content, wherever they lie; the Hub's by name and commit.

    Args:
        recipe: Names the base as it is now; its config is cached where it is the Hub's.
        folder: The run.

    Raises:
        CheckpointError: It is another one.
    """
    was = locked(folder)
    if was is None:
        warn("run.lock.json is not there, or can't be read: whether the base is still the same could not be compared")
        return
    now = inputs.of_model(recipe, pretrained.commit(recipe.model))
    if bool(was.source) != bool(now.source):
        kinds = [f"{one.source} on the Hub" if one.source else "a local folder" for one in (was, now)]
        warn(f"the run was trained on {kinds[0]}, and this is {kinds[1]}: whether it is the same could not be compared")
    elif was.source and was.commit and now.source == was.source and not now.commit:
        warn(f"the commit of {now.source} is not known: whether it is still {was.commit[:12]} could not be compared")
    elif (what := _on_hub(was, now) if was.source else _files(was.files, now.files)) is not None:
        raise CheckpointError(Problem(f"the base is not the one that the run was trained on: {what}", key=KEY))


def _on_hub(was: Input, now: Input) -> str | None:
    """What differs between two bases of the Hub; None where nothing that is known does."""
    if was.source != now.source:
        return f"it was {was.source}, is {now.source}; leave model.name out"
    if was.commit and was.commit != now.commit:
        return f"its commit was {was.commit[:12]}, is {str(now.commit)[:12]}; leave model.revision out"
    return None


def _files(was: list[File], now: list[File]) -> str | None:
    """What differs between two folders; None where they hold the same, whatever the files' names."""
    if sorted(file.sha256 for file in was) == sorted(file.sha256 for file in now):
        return None
    before, after = {file.name: file.sha256 for file in was}, {file.name: file.sha256 for file in now}
    differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    shown = ", ".join(f"{name} {_fate(name, before, after)}" for name in differing[:SHOWN])
    more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    return f"{shown}{more}; put it back, or give model.name= the folder with the same files"


def _fate(name: str, before: dict[str, str], after: dict[str, str]) -> str:
    return "is gone" if name not in after else "is new" if name not in before else "changed"
