"""A finished run made longer: it is kept aside, whole, and what goes on from its last state takes its folder.

    runs/x              the finished run; nothing in it changes
    runs/.x.extended    the recipe, the checkpoints, and the journals up to the last one: an unfinished run
    runs/x.old-1        first rename: the finished run
    runs/x              second rename: the unfinished one

So a folder always holds what belongs to one run. A kill before the first rename leaves the finished run; one between
the two is made good by the next start; after the second there is a run that was killed at its checkpoint.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from hf_finetune import keeping, records
from hf_finetune.checkpoints import verify
from hf_finetune.durable import discard, sync_file, sync_folder
from hf_finetune.errors import CheckpointError, Problem, StorageError
from hf_finetune.runfolder import RANKS, Status, write_atomically
from hf_finetune.runstate import Progress
from hf_finetune.terminal import say
from hf_finetune.tracking.journal import keep_lines

if TYPE_CHECKING:
    from hf_finetune.job import Job
    from hf_finetune.runfolder import RunFolder

INSTEAD = "give --restart to train anew (this run is moved aside), or name another output"


def begin(folder: RunFolder, job: Job) -> None:
    """Put the finished run aside and what is to go on into its place; rank 0 does it, nobody else is in the folder.

    Args:
        folder: Held, with the finished run.
        job: The run that is to go on.

    Raises:
        CheckpointError: The last state is damaged or of other data, or there is nothing left to train.
        StorageError: The disk does not take it.
    """
    last = folder.last_state(folder.previous() or {"state": "failed"})
    try:
        manifest = verify(last)
    except CheckpointError as error:
        message = f"{last} is damaged ({error}), so that the run can't be extended; {INSTEAD}"
        raise CheckpointError(Problem(message, key="output")) from error
    keeping.check(last, manifest, keeping.facts(job), job.machine, lambda text: None)
    total = job.length.total_steps
    if total <= manifest.step:
        key = "training.epochs" if job.recipe.training.epochs else "training.steps"
        message = (
            f"{folder.path} holds the results of {manifest.step} steps, and this recipe has {total}: nothing is left "
            f"to train; give more epochs or steps, undo the change, or {INSTEAD}"
        )
        raise CheckpointError(Problem(message, key=key))
    try:
        _fill(folder, last, job.recipe.dump())
        aside = _swap(folder)
    except OSError as error:
        message = f"{folder.path} can't be moved aside to be extended: {error.strerror or error}; name another output"
        raise StorageError(Problem(message, key="output")) from error
    say(f"the finished run is kept in {aside}; {folder.path} goes on from step {manifest.step}")


def _fill(folder: RunFolder, last: Path, recipe_yaml: str) -> None:
    """Make the successor: what a run would be that was killed right after its last checkpoint."""
    new, progress = folder.successor, Progress.read(last)
    discard(new)
    new.mkdir()
    folder.hold(new)
    # Of RANKS it needs what it has: there the ranks of this very launch show that they live.
    for name, copy in (
        (folder.checkpoints.name, _link),
        (folder.observations.name, _link),
        (RANKS, shutil.copyfile),
    ):
        if (folder.real / name).is_dir():
            ignored = shutil.ignore_patterns(".*")
            shutil.copytree(folder.real / name, new / name, ignore=ignored, copy_function=copy)
    records.forget_after(new / folder.observations.name, progress.step)
    for journal in (folder.metrics, folder.samples, folder.run_lock):
        if journal.is_file():
            shutil.copyfile(journal, new / journal.name)
    for journal in (folder.metrics, folder.samples):
        keep_lines(new / journal.name, progress.lines.get(journal.name, 0))
    write_atomically(new / folder.recipe.name, recipe_yaml)
    Status(new / folder.status.name).note(progress.step, f"{folder.checkpoints.name}/{last.name}")
    for path in [*new.rglob("*"), new]:
        if path.is_dir():
            sync_folder(path)
        else:
            sync_file(path)


def _swap(folder: RunFolder) -> Path:
    """Rename both; returns where the finished run is now."""
    aside = folder.free_name()
    folder.real.rename(aside)
    folder.successor.rename(folder.real)
    sync_folder(folder.real.parent)
    return folder.path.with_name(aside.name)


def _link(source: str, target: str) -> None:
    """A second name for a file that never changes, or a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
