"""The checkpoint that a run resumes from, and a finished run that is made longer."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import PartialState

from hf_finetune import device
from hf_finetune.data.job import Job
from hf_finetune.device import Machine
from hf_finetune.errors import CheckpointError, Problem, StorageError
from hf_finetune.log import say
from hf_finetune.models import pretrained, sharded
from hf_finetune.run import ranks as run_ranks
from hf_finetune.run import store as run_store
from hf_finetune.run.files import discard, sync_file, sync_folder, write_atomically
from hf_finetune.run.folder import RANKS, RunFolder
from hf_finetune.run.journal import keep_lines
from hf_finetune.run.status import Status
from hf_finetune.run.store import Facts, Manifest, verify
from hf_finetune.tracking import records
from hf_finetune.training.callbacks import Pace, StopRequest
from hf_finetune.training.resume import Checkpointing, Progress

if TYPE_CHECKING:
    from hf_finetune.tracking.tracker import Tracker

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")
"""Another version of these may change the bits of the next step."""
MUST_BE_EQUAL = {"data": ("data.train", "the data"), "model": ("model.name", "the weights of the model")}
"""Fact -> the key to blame, and what it is called."""


def checkpointing(job: Job, folder: RunFolder, stop: StopRequest, tell: Callable[[str], None]) -> Checkpointing:
    """Open the folder of checkpoints, and find the one to resume from.

    Args:
        job: The run.
        folder: Its folder.
        stop: How the ranks agree to stop.
        tell: Says something on rank 0.

    Raises:
        CheckpointError: There are checkpoints, but none is whole, or they are of other data, another model or
            other sharding, or of more steps than this recipe has.
        StorageError: The folder can't be written.
    """
    ranks = run_ranks.join(job.machine.local_rank, device.wait_timeout())
    store = run_store.Store(folder.checkpoints, ranks, job.recipe.saving.keep)
    made_from, found = facts(job), store.resume_point()
    for name, reason in found.skipped:
        tell(f"warning: {name} is not used: {reason}")
    if found.manifest is not None and found.path is not None:
        check(found.path, found.manifest, made_from, job.machine, tell)
        done, total, training = found.manifest.step, job.length.total_steps, job.recipe.training
        if done > total:
            how = "give more, or --restart to start anew"
            message = f"{done} steps are trained already, and this recipe has {total}; {how}"
            raise CheckpointError(Problem(message, key="training.steps" if training.steps else "training.epochs"))
    return Checkpointing(
        store=store,
        facts=made_from,
        stop=stop,
        journals=(folder.metrics, folder.samples),
        resume_from=found.path,
        pace=Pace(job.recipe.saving, tell),
    )


def resume(checkpointing: Checkpointing, tracker: Tracker, status: Status, tell: Callable[[str], None]) -> None:
    """Cut the journals where the checkpoint ends, and say where that is.

    Args:
        checkpointing: Knows the checkpoint.
        tracker: Writes the journals.
        status: Learns of the checkpoint, and of each later one.
        tell: Says something on rank 0.
    """

    def committed(step: int) -> None:
        status.reached(step, f"{checkpointing.store.folder.name}/{checkpointing.store.path(step).name}")

    checkpointing.committed = committed
    if checkpointing.resume_from is None:
        if tracker.folder.metrics.exists():
            status.reached(0, None)
            tell("no checkpoint was written before the earlier run ended: starting again at step 0")
        PartialState().wait_for_everyone()  # until every rank has looked
        tracker.start({}, 0)
        return
    progress = Progress.read(checkpointing.resume_from)
    committed(progress.step)
    tracker.start(progress.lines, progress.step)
    tell(f"resuming from {checkpointing.resume_from} at step {progress.step}")


def facts(job: Job) -> Facts:
    """Describe the sources of this run's checkpoints."""
    return Facts(
        recipe=hashlib.sha256(job.recipe.dump().encode()).hexdigest(),
        data=job.prepared.fingerprint,
        model=pretrained.identity(job.recipe.model, pretrained.commit(job.recipe.model)),
        versions={name: version(name) for name in PACKAGES},
    )


def check(path: Path, manifest: Manifest, wanted: Facts, machine: Machine, tell: Callable[[str], None]) -> None:
    """Refuse a checkpoint that is of other data, another model, or weights that were spread otherwise.

    Raises:
        CheckpointError: It is.
    """
    sharded.check_checkpoint(path, manifest.world_size, machine)
    _compare(wanted, manifest, machine.world_size, tell)
    sharded.refuse_other_format(path, machine)


def _compare(wanted: Facts, manifest: Manifest, world_size: int, tell: Callable[[str], None]) -> None:
    """Compare a checkpoint with the run that is to go on from it.

    Raises:
        CheckpointError: Data or model are not those that it was made from.
    """
    changed = [name for name in MUST_BE_EQUAL if getattr(wanted, name) != getattr(manifest.facts, name)]
    if changed:
        how = "changed since the run began; put back what it was, or give --restart to start anew"
        problems = [Problem(f"{MUST_BE_EQUAL[name][1]} {how}", key=MUST_BE_EQUAL[name][0]) for name in changed]
        raise CheckpointError(problems)
    if manifest.world_size != world_size:
        was = f"{manifest.world_size} ranks, now {world_size}: the same rows in the same order, other random numbers"
        tell(f"note: the run was on {was}")
    for name, now in wanted.versions.items():
        if (before := manifest.facts.versions.get(name)) != now:
            tell(f"note: {name} is {now}, the checkpoint was written with {before}: the next steps may differ in bits")


# A finished run made longer: it is kept aside, whole, and what goes on from its last state takes its folder.
#
#     runs/x              the finished run; nothing in it changes
#     runs/.x.extended    the recipe, the checkpoints, and the journals up to the last one: an unfinished run
#     runs/x.old-1        first rename: the finished run
#     runs/x              second rename: the unfinished one
#
# So a folder always holds what belongs to one run. A kill before the first rename leaves the finished run; one between
# the two is made good by the next start; after the second there is a run that was killed at its checkpoint.

INSTEAD = "give --restart to train anew (this run is moved aside), or name another output"


def begin(folder: RunFolder, job: Job) -> None:
    """Put the finished run aside and its successor into its place; rank 0 does it, and no other rank is in the folder.

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
    check(last, manifest, facts(job), job.machine, lambda text: None)
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
    Status(new / folder.status.name).write_resumable(progress.step, f"{folder.checkpoints.name}/{last.name}")
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
