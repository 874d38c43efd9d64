"""Bit-exact resume: the content of a checkpoint, the one to resume from, and a finished run that is extended."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from hf_finetune.adapters.base import Adapter
from hf_finetune.data.job import Job
from hf_finetune.device import Machine
from hf_finetune.errors import CheckpointError, Problem, StorageError
from hf_finetune.log import say
from hf_finetune.models import pretrained, sharded
from hf_finetune.run.files import discard, sync_folder, sync_tree, write_atomically
from hf_finetune.run.folder import RANKS, RunFolder
from hf_finetune.run.journal import keep_lines
from hf_finetune.run.ranks import Ranks
from hf_finetune.run.status import Status
from hf_finetune.run.store import TRAINED, Facts, Manifest, Store, verify
from hf_finetune.tracking import records
from hf_finetune.tracking.tracker import Tracker
from hf_finetune.training import locking
from hf_finetune.training.callbacks import Pace, StopRequest

# Another version of these may change the bits of the next step.
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets")
INSTEAD = "give --restart to train anew (this run is moved aside), or name another output"

# The content of a checkpoint: everything that the next step depends on, bit for bit as the last step left it.
#
#     trained.safetensors     trained weights, by their names in the adapted model, and further state of the adapter
#     optimizer.pt scheduler.pt scaler.pt
#     trainer_state.json      the Trainer's own counters and history
#     progress.json           state that the Trainer forgets: lines written, patience used up, ...
#     rng_state_<rank>.pt     random number generators (python, numpy, torch, CUDA) and unlogged loss of every rank
#
# Not PEFT's format: that would convert some initialisations, and round. torch files are read with `weights_only` alone.

OPTIMIZER, SCHEDULER, SCALER = "optimizer.pt", "scheduler.pt", "scaler.pt"
PROGRESS = "progress.json"
_EXTRA = "adapter state: "


@dataclass(frozen=True)
class Progress:
    """State that the Trainer does not keep."""

    step: int
    world_size: int
    total_loss: float
    last_logged: int
    last_evaluated: int
    patience_used: int
    """Evaluations without improvement, where early stopping counts them."""
    skipped: int = 0
    """Steps that were left out because they were not finite."""
    overflowed: int = 0
    """Steps that the loss scaler of fp16 left out."""
    overflows_in_a_row: int = 0
    lines: dict[str, int] = field(default_factory=dict)
    """Lines of each journal at this moment, by file name."""
    throughput: dict[str, float] = field(default_factory=dict)
    """Rows, tokens, slots and seconds of the run so far."""
    stream: list[int] = field(default_factory=list)
    """Of streamed rows: how many each lane has used up, and what became of them; see `data.batches.Streamed`."""

    def write(self, folder: Path) -> None:
        """Write `progress.json`."""
        (folder / PROGRESS).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Progress:
        """Read `progress.json`."""
        return cls(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))


def save_trained(adapted: nn.Module, adapter: Adapter, folder: Path) -> None:
    """Write the trained weights and the adapter's own state; one rank does it."""
    tensors = {name: value.detach().contiguous().cpu() for name, value in _learned(adapted).items()}
    tensors |= {f"{_EXTRA}{name}": value.contiguous().cpu() for name, value in adapter.state(adapted).items()}
    # Tied weights are one parameter under one name; a clone keeps safetensors from seeing views of one storage.
    save_file({name: value.clone() for name, value in tensors.items()}, folder / TRAINED)


def load_trained(adapted: nn.Module, adapter: Adapter, folder: Path) -> None:
    """Put the trained weights of a checkpoint into the model, bit for bit.

    Raises:
        CheckpointError: The checkpoint holds other weights than this model trains.
    """
    tensors = load_file(folder / TRAINED)
    extra = {name.removeprefix(_EXTRA): tensors.pop(name) for name in list(tensors) if name.startswith(_EXTRA)}
    own = _learned(adapted)
    odd = sorted(own.keys() ^ tensors.keys()) or [name for name, p in own.items() if p.shape != tensors[name].shape]
    if odd:
        message = f"holds other weights than this run trains, e.g. {odd[0]}; give --restart to start anew"
        raise CheckpointError(Problem(message, file=str(folder)))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    adapter.load_state(adapted, extra)


def _learned(adapted: nn.Module) -> dict[str, torch.Tensor]:
    """Return what training changes: trained weights, and running statistics of normalisation that is trained."""
    found: dict[str, torch.Tensor] = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    for place, module in adapted.named_modules():
        if isinstance(module, _NormBase) and any(p.requires_grad for p in module.parameters()):
            found |= {f"{place}.{name}": buffer for name, buffer in module.named_buffers(recurse=False)}
    return found


# Settings of each group of weights, which the recipe may change; the rest is state.
HYPERPARAMETERS = ("weight_decay", "betas", "initial_lr")


def load_optimizer(optimizer: Any, scheduler: Any, load: Callable[[], object]) -> None:
    """Bring the optimiser and the schedule back, with the hyperparameters of the present recipe.

    Where these are what they were, the learning rate comes out as the same bits: it is the same product.

    Args:
        optimizer: New, as the recipe wants it.
        scheduler: The same.
        load: Brings back the state of both, with the hyperparameters that were.
    """
    wanted = [{key: group[key] for key in HYPERPARAMETERS if key in group} for group in optimizer.param_groups]
    rates = list(scheduler.base_lrs)
    load()
    scheduler.base_lrs = rates
    for group, own, rate, shape in zip(optimizer.param_groups, wanted, rates, scheduler.lr_lambdas, strict=True):
        group.update(own)
        group["lr"] = rate * shape(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def save_rank(folder: Path, rank: int, unlogged_loss: float) -> None:
    """Write the state of one rank: its random number generators, and its loss since the last log."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    states: dict[str, Any] = {
        "unlogged_loss": unlogged_loss,
        "python": [version, list(internal), gauss_next],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    torch.save(states, folder / _rng(rank))


def unlogged_loss(folder: Path, rank: int) -> float:
    """Read this rank's loss since the last log."""
    return float(torch.load(folder / _rng(rank), weights_only=True)["unlogged_loss"])


def load_rng(folder: Path, rank: int) -> None:
    """Bring this rank's generators back."""
    states = torch.load(folder / _rng(rank), weights_only=True)
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.random.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])


def _rng(rank: int) -> str:
    return f"rng_state_{rank}.pt"


def durable_lines(file: Path) -> int:
    """Count the lines of a journal, which are on the disk before the checkpoint that counts on them."""
    if not file.exists():
        return 0
    with file.open("rb") as stream:
        with suppress(OSError):  # a journal that can't be written costs a warning, never a checkpoint
            os.fsync(stream.fileno())
        return sum(1 for _ in stream)


# The checkpoint that a run resumes from, and what both must have in common.


class Checkpointing:
    """Checkpoints of a run: the store, the one to resume from, and when the next one is due.

    Args:
        job: The run.
        folder: Its folder.
        ranks: All of them open it at the same time.
        stop: How the ranks agree to stop.
        status: Learns of each checkpoint.
        tell: Says something on rank 0.

    Raises:
        CheckpointError: There are checkpoints, but none is whole, or they are of other data, another model or
            other sharding, or of more steps than this recipe has.
        StorageError: The folder can't be written.
    """

    def __init__(
        self,
        job: Job,
        folder: RunFolder,
        ranks: Ranks,
        *,
        stop: StopRequest,
        status: Status,
        tell: Callable[[str], None],
    ) -> None:
        self.stop, self.status, self.tell = stop, status, tell
        self.journals = (folder.metrics, folder.samples)
        """Files that grow line by line; a checkpoint notes their lengths."""
        self.pace = Pace(job.recipe.saving, tell)
        self.store = Store(folder.checkpoints, ranks, job.recipe.saving.keep)
        self.facts = facts(job)
        self.resume_from: Path | None = None
        found = self.store.resume_point()
        for name, reason in self.store.skipped:
            tell(f"warning: {name} is not used: {reason}")
        if found is not None:
            self.resume_from = self.store.path(found.step)
            check(self.resume_from, found, self.facts, job.machine, tell)
            total, training = job.length.total_steps, job.recipe.training
            if found.step > total:
                how = "give more, or --restart to start anew"
                message = f"{found.step} steps are trained already, and this recipe has {total}; {how}"
                raise CheckpointError(Problem(message, key="training.steps" if training.steps else "training.epochs"))

    def resume(self, tracker: Tracker) -> None:
        """Cut the journals that a tracker writes where the checkpoint ends, and say where that is."""
        if self.resume_from is None:
            if tracker.folder.metrics.exists():
                self.status.reached(0, None)
                self.tell("no checkpoint was written before the earlier run ended: starting again at step 0")
            PartialState().wait_for_everyone()  # until every rank has looked
            tracker.start({}, 0)
            return
        progress = Progress.read(self.resume_from)
        self.committed(progress.step)
        tracker.start(progress.lines, progress.step)
        self.tell(f"resuming from {self.resume_from} at step {progress.step}")

    def committed(self, step: int) -> None:
        """Note that the checkpoint of a step counts."""
        self.status.reached(step, f"{self.store.folder.name}/{self.store.path(step).name}")


IDENTITY = {"source", "commit", "files"}
"""Of an adapter in the lock: what tells it from another one."""


def facts(job: Job) -> Facts:
    """Describe the sources of this run's checkpoints."""
    adapter = locking.of_adapter(job.recipe)
    return Facts(
        recipe=hashlib.sha256(job.recipe.dump().encode()).hexdigest(),
        data=job.prepared.fingerprint,
        model=pretrained.identity(job.recipe.model, pretrained.commit(job.recipe.model)),
        versions={name: version(name) for name in PACKAGES},
        more={} if adapter is None else {"adapter": adapter.model_dump(mode="json", include=IDENTITY)},
    )


def check(path: Path, manifest: Manifest, wanted: Facts, machine: Machine, tell: Callable[[str], None]) -> None:
    """Refuse a checkpoint that is of other data, another model, or weights that were spread otherwise.

    Raises:
        CheckpointError: It is.
    """
    sharded.check_checkpoint(path, manifest.world_size, machine)
    how = "changed since the run began; put back what it was, or give --restart to start anew"
    problems = []
    if wanted.data != manifest.facts.data:
        problems.append(Problem(f"the data {how}", key="data.train"))
    if wanted.model != manifest.facts.model:
        problems.append(Problem(f"the weights of the model {how}", key="model.name"))
    if "adapter" in manifest.facts.more and wanted.more.get("adapter") != manifest.facts.more["adapter"]:
        problems.append(Problem(f"the adapter that goes on training {how}", key="adapter.from"))
    if problems:
        raise CheckpointError(problems)
    if manifest.world_size != machine.world_size:
        now = f"now {machine.world_size}: the same rows in the same order, other random numbers"
        tell(f"note: the run was on {manifest.world_size} ranks, {now}")
    for name, now in wanted.versions.items():
        if (before := manifest.facts.versions.get(name)) != now:
            tell(f"note: {name} is {now}, the checkpoint was written with {before}: the next steps may differ in bits")
    sharded.refuse_other_format(path, machine)


# A finished run made longer: it is kept aside, whole, and a run that resumes from its last state takes its folder.
#
#     runs/x              the finished run; nothing in it changes
#     runs/.x.extended    the recipe, the checkpoints, and the journals up to the last one: an unfinished run
#     runs/x.old-1        first rename: the finished run
#     runs/x              second rename: the unfinished one
#
# So a folder always holds what belongs to one run. A kill before the first rename leaves the finished run; one between
# the two is completed by the next start; after the second there is a run that was killed at its checkpoint.


def extend(folder: RunFolder, job: Job) -> None:
    """Put the finished run aside and its successor into its place; rank 0 does it, and no other rank is in the folder.

    Args:
        folder: Held, with the finished run.
        job: The longer run.

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
        aside = folder.free_name()
        folder.real.rename(aside)
        folder.successor.rename(folder.real)
        sync_folder(folder.real.parent)
    except OSError as error:
        message = f"{folder.path} can't be moved aside to be extended: {error.strerror or error}; name another output"
        raise StorageError(Problem(message, key="output")) from error
    kept = folder.path.with_name(aside.name)
    say(f"the finished run is kept in {kept}; {folder.path} goes on from step {manifest.step}")


def _fill(folder: RunFolder, last: Path, recipe_yaml: str) -> None:
    """Make the successor: as if the run had been killed right after its last checkpoint."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)  # a second name: these files never change
        except OSError:
            shutil.copyfile(source, target)

    new, progress = folder.successor, Progress.read(last)
    discard(new)
    new.mkdir()
    folder.hold(new)
    # The ranks of this very launch watch each other in RANKS, so that it has to be there, too.
    for name, copy in ((folder.checkpoints.name, link), (folder.observations.name, link), (RANKS, shutil.copyfile)):
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
    sync_tree(new)
