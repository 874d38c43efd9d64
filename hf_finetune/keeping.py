"""Which checkpoint a run goes on from, and what it must have in common with it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING

from accelerate import PartialState

from hf_finetune import checkpoints, patience, sharding, zero
from hf_finetune.checkpoints import Facts, Manifest
from hf_finetune.errors import CheckpointError, Problem
from hf_finetune.model import pretrained, weights
from hf_finetune.pace import Pace
from hf_finetune.resumable import Keeper
from hf_finetune.runstate import Progress

if TYPE_CHECKING:
    from pathlib import Path

    from hf_finetune.hardware import Machine
    from hf_finetune.job import Job
    from hf_finetune.preemption import StopRequest
    from hf_finetune.runfolder import RunFolder, Status
    from hf_finetune.tracking import Observers

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")
"""Another version of these may change the bits of the next step."""
MUST_BE_EQUAL = {"data": ("data.train", "the data"), "model": ("model.name", "the weights of the model")}
"""Fact -> the key to blame, and what it is called."""


def keeper(job: Job, folder: RunFolder, stop: StopRequest, tell: Callable[[str], None]) -> Keeper:
    """The folder of checkpoints, and the one to go on from.

    Args:
        job: The run.
        folder: Its folder.
        stop: How the ranks agree to stop.
        tell: Says something on rank 0.

    Raises:
        CheckpointError: There are checkpoints, but none is whole, or they are of other data, another model or
            other sharding.
        StorageError: The folder can't be written.
    """
    ranks = checkpoints.join(job.machine.local_rank, patience.wait())
    store = checkpoints.Store(folder.checkpoints, ranks, job.recipe.saving.keep)
    made_from, found = facts(job), store.resume_point()
    for name, reason in found.skipped:
        tell(f"warning: {name} is not used: {reason}")
    if found.manifest is not None and found.path is not None:
        check(found.path, found.manifest, made_from, job.machine, tell)
        _refuse_shorter(found.manifest.step, job)
    return Keeper(
        store=store,
        facts=made_from,
        stop=stop,
        journals=(folder.metrics, folder.samples),
        resume_from=found.path,
        pace=Pace(job.recipe.saving, tell),
    )


def go_on(keeper: Keeper, observers: Observers, status: Status, tell: Callable[[str], None]) -> None:
    """Cut the journals where the checkpoint ends, and say where that is.

    Args:
        keeper: Knows the checkpoint.
        observers: Everyone who writes.
        status: Learns of the checkpoint, and of each later one.
        tell: Says something on rank 0.
    """

    def committed(step: int) -> None:
        status.at(step, f"{keeper.store.folder.name}/{keeper.store.path(step).name}")

    keeper.committed = committed
    if keeper.resume_from is None:
        if observers.folder.metrics.exists():
            status.at(0, None)
            tell("no checkpoint was written before the earlier run ended: starting again at step 0")
        PartialState().wait_for_everyone()  # until every rank has looked
        observers.keep({}, 0)
        return
    progress = Progress.read(keeper.resume_from)
    committed(progress.step)
    observers.keep(progress.lines, progress.step)
    tell(f"resuming from {keeper.resume_from} at step {progress.step}")


def facts(job: Job) -> Facts:
    """What this run's checkpoints are made from."""
    return Facts(
        recipe=hashlib.sha256(job.recipe.dump().encode()).hexdigest(),
        data=job.prepared.fingerprint,
        model=weights.identity(job.recipe.model, pretrained.commit(job.recipe.model)),
        versions={name: version(name) for name in PACKAGES},
    )


def check(path: Path, manifest: Manifest, wanted: Facts, machine: Machine, tell: Callable[[str], None]) -> None:
    """Refuse a checkpoint that is of other data, another model, or weights that were spread otherwise.

    Raises:
        CheckpointError: It is.
    """
    zero.check_checkpoint(path, manifest.world_size, machine)
    _compare(wanted, manifest, machine.world_size, tell)
    sharding.refuse_other_format(path, machine)


def _refuse_shorter(done: int, job: Job) -> None:
    """Refuse a recipe whose length was changed to less than what is trained already.

    Raises:
        CheckpointError: Its steps can't be taken back.
    """
    total, training = job.length.total_steps, job.recipe.training
    if done > total:
        message = (
            f"{done} steps are trained already, and this recipe has {total}; give more, or --restart to start anew"
        )
        raise CheckpointError(Problem(message, key="training.steps" if training.steps else "training.epochs"))


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
