"""transformers' Trainer with checkpoints that commit, resume that is bit-exact, and an agreed stop.

The Trainer's own checkpoints are neither atomic nor checked (transformers 5.23: a kill inside a save makes the next
resume crash or, without optimizer.pt, silently start the optimiser and the schedule anew). Its loop is used as it is:
only what is written, what is read back, and when it stops are ours.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import TrainingArguments

from hf_finetune.adapters.base import Adapter
from hf_finetune.errors import CheckpointError, Problem
from hf_finetune.log import phase
from hf_finetune.models import sharded as models_sharded
from hf_finetune.run.store import Facts, Store
from hf_finetune.training.callbacks import Guard, Pace, StopRequest

# The content of a checkpoint: everything that the next step depends on, bit for bit as the last step left it.
#
#     trained.safetensors     trained weights, by their names in the adapted model, and further state of the adapter
#     optimizer.pt scheduler.pt scaler.pt
#     trainer_state.json      the Trainer's own counters and history
#     progress.json           state that the Trainer forgets: lines written, patience used up, ...
#     rng_state_<rank>.pt     random number generators (python, numpy, torch, CUDA) and unlogged loss of every rank
#
# Not PEFT's format: that would convert some initialisations, and round. torch files are read with `weights_only` alone.

TRAINED = "trained.safetensors"
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
    """Of streamed rows: how many each lane has used up, and what became of them; see `batching.Streamed`."""

    def write(self, folder: Path) -> None:
        """Write `progress.json`."""
        (folder / PROGRESS).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Progress:
        """Read `progress.json`."""
        return cls(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))


def save_trained(adapted: nn.Module, adapter: Adapter, folder: Path) -> None:
    """Write the trained weights and the adapter's own state; one rank does it."""
    tensors = {name: p.detach().contiguous().cpu() for name, p in adapted.named_parameters() if p.requires_grad}
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
    own = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    odd = sorted(own.keys() ^ tensors.keys()) or [name for name, p in own.items() if p.shape != tensors[name].shape]
    if odd:
        message = f"holds other weights than this run trains, e.g. {odd[0]}; give --restart to start anew"
        raise CheckpointError(Problem(message, file=str(folder)))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    adapter.load_state(adapted, extra)


HYPERPARAMETERS = ("weight_decay", "betas", "initial_lr")
"""Settings of each group of weights, which the recipe may change; the rest is state."""


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


class EvaluationStopped(Exception):  # noqa: N818 - it is not an error
    """The ranks agreed to stop in the middle of an evaluation."""


@dataclass
class Checkpointing:
    """Checkpoints of a run: the store, the one to resume from, and when the next one is due."""

    store: Store
    facts: Facts
    stop: StopRequest
    journals: tuple[Path, ...]
    """Files that grow line by line; a checkpoint notes their lengths."""
    pace: Pace
    resume_from: Path | None = None
    committed: Callable[[int], None] = field(default=lambda step: None)
    """Called with the step of each checkpoint."""


class ResumableTrainer(Trainer):
    """A Trainer that can be killed anywhere. The subclass sets `checkpointing`, `guard` and `adapter`."""

    checkpointing: Checkpointing
    guard: Guard
    adapter: Adapter
    optimizer: Any
    lr_scheduler: Any
    stopped: int = 0
    """The signal that the ranks agreed to stop for."""
    last_evaluated: int = -1
    """Step of the last evaluation of the watched split that was completed."""
    is_sharded: bool = False
    last_saved: int = -1
    """Step of the last checkpoint."""
    _ends_at_once: bool = False
    _has_saved: bool = False

    def progress(self, step: int, phase: str, *, is_long: bool = False) -> None:
        """Show the other ranks that this one makes progress; see `peers.Watch.progress`."""

    def train_on(self) -> None:
        """Train from the beginning, or from where the checkpoint ends."""
        self.add_callback(_Flow(self))
        start = self.checkpointing.resume_from
        self.train(resume_from_checkpoint=None if start is None else str(start))

    def steps_done(self) -> int:
        """Return the step of the checkpoint that this run resumes from; 0 for a new run."""
        start = self.checkpointing.resume_from
        return 0 if start is None else Progress.read(start).step

    # ---- writing ----

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        """Commit the state after the present step; every rank calls this."""
        self.store_flos()
        self.progress(self.state.global_step, "saving", is_long=True)
        step, best, store = self.state.global_step, self.state.best_global_step, self.checkpointing.store
        self.state.best_model_checkpoint = str(store.path(best)) if best else None
        protect = [best] if best and self.args.load_best_model_at_end else []
        began = time.perf_counter()
        with phase("saving a checkpoint"):
            store.write(step, self._write_state, self.checkpointing.facts, protect)
        self.last_saved = step
        self.checkpointing.committed(step)
        self._has_saved = True
        self.checkpointing.pace.saved(time.perf_counter() - began)

    def _write_state(self, folder: Path) -> None:
        """Write the files of this rank."""
        is_writer = self.checkpointing.store.is_writer
        save_rank(folder, self.args.process_index, float(self._tr_loss))
        if self.is_deepspeed_enabled:
            self._save_optimizer_and_scheduler(str(folder))  # and the trained weights, each rank its part
        elif self.is_sharded:
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
            if is_writer and not self.is_deepspeed_enabled:
                torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)
        elif is_writer:
            save_trained(self.accelerator.unwrap_model(self.model), self.adapter, folder)
            torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)
        if is_writer:
            # The Trainer writes the scaler, and a sharded run's schedule, on rank 0 alone; each disk needs them.
            if (scaler := self.accelerator.scaler) is not None:
                torch.save(scaler.state_dict(), folder / SCALER)
            self.state.save_to_json(str(folder / "trainer_state.json"))
            self._progress().write(folder)

    def _progress(self) -> Progress:
        patience = [c.early_stopping_patience_counter for c in self._stoppers()]
        return Progress(
            step=self.state.global_step,
            world_size=self.args.world_size,
            total_loss=float(self._total_loss_scalar),
            last_logged=self._globalstep_last_logged,
            last_evaluated=self.last_evaluated,
            patience_used=patience[0] if patience else 0,
            skipped=self.guard.skipped,
            overflowed=self.guard.overflowed,
            overflows_in_a_row=self.guard.overflows_in_a_row,
            lines={file.name: _kept_lines(file) for file in self.checkpointing.journals},
            throughput=self.throughput_so_far(),
            stream=self.stream_so_far(),
        )

    def throughput_so_far(self) -> dict[str, float]:
        """Return rows, tokens, slots and seconds of the run until now."""
        return {}

    def resume_throughput(self, so_far: dict[str, float]) -> None:
        """Continue counting from there."""

    def stream_so_far(self) -> list[int]:
        """Return the rows of a stream that are used up; empty where rows are not streamed."""
        return []

    # ---- reading ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load the trained weights."""
        if self.is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        load_trained(target, self.adapter, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimiser and the schedule."""
        if checkpoint is None:
            return
        sharded: Any = super()

        def load() -> None:
            if self.is_sharded or self.is_deepspeed_enabled:
                sharded._load_optimizer_and_scheduler(checkpoint)
                return
            folder = Path(checkpoint)
            # To the CPU first: torch knows no device "cpu:0", which accelerate names with several CPU ranks.
            self.optimizer.load_state_dict(torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))
            self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))

        load_optimizer(self.optimizer, self.lr_scheduler, load)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random numbers; with another number of ranks each draws its own, by seed, rank and step."""
        if checkpoint is None:
            return
        if self._same_ranks(Path(checkpoint)):
            load_rng(Path(checkpoint), self.args.process_index)
        else:
            set_seed((self.args.seed + self.args.process_index + 7919 * self.state.global_step) % 2**32)

    def _same_ranks(self, folder: Path) -> bool:
        return bool(Progress.read(folder).world_size == self.args.world_size)

    def _load_best_model(self) -> None:
        """Load the best checkpoint's weights."""
        best = self.state.best_model_checkpoint
        if best is None or self.is_sharded or self.is_deepspeed_enabled:
            super()._load_best_model()
            return
        load_trained(self.accelerator.unwrap_model(self.model), self.adapter, Path(best))

    def _resume(self) -> None:
        """Restore from the checkpoint whatever the Trainer has just reset."""
        start = self.checkpointing.resume_from
        if start is None:
            return
        progress = Progress.read(start)
        self._total_loss_scalar = progress.total_loss
        if self._same_ranks(start):
            self._tr_loss.fill_(unlogged_loss(start, self.args.process_index))
            self._globalstep_last_logged = progress.last_logged
        self.last_evaluated = progress.last_evaluated
        self.guard.skipped = progress.skipped
        self.guard.overflowed = progress.overflowed
        self.guard.overflows_in_a_row = progress.overflows_in_a_row
        for stopper in self._stoppers():
            stopper.early_stopping_patience_counter = progress.patience_used
        # The recipe may log, evaluate and save at other steps now.
        state: Any = self.state
        state.compute_steps(self.args, self.state.max_steps)
        best = self.state.best_global_step
        self.state.best_model_checkpoint = str(self.checkpointing.store.path(best)) if best else None
        self.args.eval_on_start = False
        self.resume_throughput(progress.throughput)
        self._ends_at_once = self.state.global_step >= self.state.max_steps
        # An evaluation may have been due at the checkpoint's step, where the run was stopped before it.
        step = self.state.global_step
        if not self.evaluates_at(step) or step in (0, self.last_evaluated):
            return
        # The best model so far is saved at once, with these; the Trainer brings them back only later.
        self._load_rng_state(str(start))
        self.control.should_evaluate, self.control.should_save, self.control.should_log = True, False, False
        self._maybe_log_save_evaluate(self._tr_loss, None, self.model, None, self.state.epoch, None, 0.0)
        self.control.should_evaluate = self.control.should_save = False
        self._ends_at_once = self._ends_at_once or bool(self.control.should_training_stop)

    def evaluates_at(self, step: int) -> bool:
        """Tell whether the watched split is evaluated after so many steps."""
        strategy = IntervalStrategy(self.args.eval_strategy).value
        every = self._steps_per_epoch() if strategy == "epoch" else int(self.state.eval_steps or 0)
        return strategy != "no" and (step >= self.state.max_steps or (every > 0 and step % every == 0))

    @property
    def keeps_best(self) -> bool:
        """Tell whether the best checkpoint is loaded after training."""
        return bool(self.args.load_best_model_at_end)

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        """Train for one epoch, unless the evaluation that was made up for ends training."""
        trainer: Any = super()
        if not self._ends_at_once:
            trainer._run_epoch(*arguments, **options)

    def _steps_per_epoch(self) -> int:
        raise NotImplementedError

    def _stoppers(self) -> list[EarlyStoppingCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]

    # ---- stopping ----

    def _maybe_log_save_evaluate(self, *arguments: Any, **options: Any) -> None:
        """Log, evaluate, save; an evaluation that is stopped is made up for after the resume."""
        try:
            self._has_saved = False
            super()._maybe_log_save_evaluate(*arguments, **options)
            if self._has_saved:
                # Rank 0 may have copied the model for an upload, which takes longer than a step's collective may wait.
                self.checkpointing.store.ranks.barrier()
            if self._globalstep_last_logged == self.state.global_step:
                self._tr_loss.zero_()  # the Trainer subtracts the loss from itself, and NaN stays NaN
        except EvaluationStopped:
            self.control.should_evaluate = False
            self.control.should_training_stop = True
            self._save_checkpoint(self.model)

    def is_asked_to_stop(self) -> bool:
        """Tell whether this rank received a signal; the others may not know yet."""
        return self.checkpointing.stop.is_asked

    def stop_evaluation_if_asked(self) -> None:
        """Leave an evaluation where the ranks agree on a stop; every rank calls it at the same moments.

        Raises:
            EvaluationStopped: They do.
        """
        if self.agrees_to_stop():
            raise EvaluationStopped

    def agrees_to_stop(self, *, due: bool = False) -> bool:
        """Tell whether any rank received a signal; every rank asks at the same moment.

        Args:
            due: This rank wants a checkpoint; `checkpointing.stop.is_due` then says so on every rank.
        """
        if signal := self.checkpointing.stop.agreed(due=due):
            self.stopped = signal
            self.args.load_best_model_at_end = False  # an unfinished run has no result
        return bool(self.stopped)


class _Flow(TrainerCallback):
    """Resumes as training begins, saves where that is due by the clock, and stops where the ranks agree to."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer
        self._saves_epoch = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Resume where the checkpoint ends."""
        if self.trainer.is_deepspeed_enabled:
            models_sharded.hold_back(self.trainer.accelerator)
        self.trainer._resume()
        self.trainer.checkpointing.pace.begin()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note that this step is evaluated."""
        self.trainer.last_evaluated = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, if any rank received a signal; an evaluation that is due waits until the run is resumed.

        A checkpoint that is due by the clock of rank 0 is written by all; at the end of an epoch, after its evaluation.
        """
        checkpointing, epoch = self.trainer.checkpointing, self.trainer._steps_per_epoch()
        ends_epoch = epoch > 0 and state.global_step % epoch == 0
        due = args.process_index == 0 and checkpointing.pace.is_due(ends_epoch=ends_epoch)
        if self.trainer.agrees_to_stop(due=due):
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True
        elif checkpointing.stop.is_due:
            control.should_save, self._saves_epoch = control.should_save or not ends_epoch, ends_epoch

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do nothing more where the run is stopped; else save the last step in any case."""
        if self.trainer.stopped:
            control.should_save = control.should_evaluate = control.should_log = False
            return
        is_last = control.should_training_stop and self.trainer.checkpointing.pace.keeps_last
        if (is_last or self._saves_epoch) and self.trainer.last_saved != state.global_step:
            control.should_save = True
        self._saves_epoch = False


def _kept_lines(file: Path) -> int:
    """Count the lines of a journal, which are on the disk before the checkpoint that counts on them."""
    if not file.exists():
        return 0
    with file.open("rb") as stream:
        with suppress(OSError):  # a journal that can't be written costs a warning, never a checkpoint
            os.fsync(stream.fileno())
        return sum(1 for _ in stream)
