"""transformers' Trainer with checkpoints that commit, resume that is bit-exact, and an agreed stop.

The Trainer's own checkpoints are neither atomic nor checked (transformers 5.23: a kill inside a save makes the next
resume crash or, without optimizer.pt, silently start the optimiser and the schedule anew). Its loop is used as it is;
writing, reading back and stopping are ours. Everything private of the Trainer that we touch is in this file:

    _save_checkpoint, _load_from_checkpoint, _load_optimizer_and_scheduler, _load_rng_state, _load_best_model
        its checkpoints, replaced by ours; those of sharded runs write and read their weights
    _tr_loss, _total_loss_scalar, _globalstep_last_logged
        the loss since the last log, which it forgets on resume: the first logged loss would differ
    _run_epoch
        left out where the evaluation that is made up for after a resume ends training
    _maybe_log_save_evaluate
        an evaluation can be left in the middle, and is called to make up for one
    _get_num_items_in_batch
        its divisor of the loss counts labels that are not -100; tasks count items of their own
    _get_grad_norm
        the last moment before the optimiser's step at which the gradient is whole: the guard decides there
    _determine_best_metric
        a new best model is saved whatever the cadence of checkpoints is
    _get_learning_rate, _prepare_inputs
        as its own logs and evaluation do
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import IntervalStrategy
from transformers.training_args import TrainingArguments

from hf_finetune.data.job import Job
from hf_finetune.errors import DataError, DivergedError, Problem
from hf_finetune.log import phase
from hf_finetune.models import sharded
from hf_finetune.tracking.throughput import Tally, Throughput
from hf_finetune.training import resume
from hf_finetune.training.callbacks import Guard
from hf_finetune.training.resume import OPTIMIZER, SCALER, SCHEDULER, Checkpointing, Progress


class EvaluationStopped(Exception):  # noqa: N818 - it is not an error
    """The ranks agreed to stop in the middle of an evaluation."""


class ResumableTrainer(Trainer):
    """A Trainer that can be killed anywhere. The subclass sets `job`, `checkpointing`, `guard` and `throughput`."""

    job: Job
    checkpointing: Checkpointing
    guard: Guard
    throughput: Throughput
    optimizer: Any
    lr_scheduler: Any
    stopped: int = 0
    """The signal that the ranks agreed to stop for."""
    is_sharded: bool = False
    last_evaluated: int = -1
    """Step of the last evaluation of the watched split that was completed."""
    last_saved: int = -1
    """Step of the last checkpoint."""
    streamed: torch.Tensor | None = None
    """Of streamed rows, see `Progress.stream`."""
    step_loss: torch.Tensor | float = 0.0
    """This rank's share of the loss of the present step, times the number of ranks."""
    _is_left_out: bool = False
    """The present step is skipped."""
    _ends_at_once: bool = False
    _has_saved: bool = False

    def progress(self, step: int, phase: str, *, is_long: bool = False) -> None:
        """Show the other ranks that this one makes progress; see `training.peers.Watch.progress`."""

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
        resume.save_rank(folder, self.args.process_index, float(self._tr_loss))
        if self.is_deepspeed_enabled:
            self._save_optimizer_and_scheduler(str(folder))  # and the trained weights, each rank its part
        elif self.is_sharded:
            self.save_model(str(folder), _internal_call=True)
            self._save_optimizer_and_scheduler(str(folder))
        elif is_writer:
            resume.save_trained(self.accelerator.unwrap_model(self.model), self.job.adapter, folder)
            torch.save(self.optimizer.state_dict(), folder / OPTIMIZER)
        if not is_writer:
            return
        # The Trainer writes the scaler, and a sharded run's schedule, on rank 0 alone; each disk needs them.
        if not self.is_deepspeed_enabled:
            torch.save(self.lr_scheduler.state_dict(), folder / SCHEDULER)
        if (scaler := self.accelerator.scaler) is not None:
            torch.save(scaler.state_dict(), folder / SCALER)
        self.state.save_to_json(str(folder / "trainer_state.json"))
        patience = [c.early_stopping_patience_counter for c in self._stoppers()]
        progress = Progress(
            step=self.state.global_step,
            world_size=self.args.world_size,
            total_loss=float(self._total_loss_scalar),
            last_logged=self._globalstep_last_logged,
            last_evaluated=self.last_evaluated,
            patience_used=patience[0] if patience else 0,
            skipped=self.guard.skipped,
            overflowed=self.guard.overflowed,
            overflows_in_a_row=self.guard.overflows_in_a_row,
            lines={file.name: resume.durable_lines(file) for file in self.checkpointing.journals},
            throughput=asdict(self.throughput.total),
            stream=[] if self.streamed is None else [int(count) for count in self.streamed.tolist()],
        )
        progress.write(folder)

    # ---- reading ----

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load the trained weights."""
        if self.is_sharded:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        target = self.accelerator.unwrap_model(self.model if model is None else model)
        resume.load_trained(target, self.job.adapter, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load the optimiser and the schedule."""
        if checkpoint is None:
            return
        trainer: Any = super()

        def load() -> None:
            if self.is_sharded or self.is_deepspeed_enabled:
                trainer._load_optimizer_and_scheduler(checkpoint)
                return
            folder = Path(checkpoint)
            # To the CPU first: torch knows no device "cpu:0", which accelerate names with several CPU ranks.
            self.optimizer.load_state_dict(torch.load(folder / OPTIMIZER, map_location="cpu", weights_only=True))
            self.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER, weights_only=True))

        resume.load_optimizer(self.optimizer, self.lr_scheduler, load)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore the random numbers; with another number of ranks each draws its own, by seed, rank and step."""
        if checkpoint is None:
            return
        if self._same_ranks(Path(checkpoint)):
            resume.load_rng(Path(checkpoint), self.args.process_index)
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
        resume.load_trained(self.accelerator.unwrap_model(self.model), self.job.adapter, Path(best))

    def _resume(self) -> None:
        """Restore from the checkpoint whatever the Trainer has just reset."""
        start = self.checkpointing.resume_from
        if start is None:
            return
        progress = Progress.read(start)
        self._total_loss_scalar = progress.total_loss
        if self._same_ranks(start):
            self._tr_loss.fill_(resume.unlogged_loss(start, self.args.process_index))
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
        self.throughput.total = Tally(**progress.throughput)
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
        every = self.steps_per_epoch() if strategy == "epoch" else int(self.state.eval_steps or 0)
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

    def steps_per_epoch(self) -> int:
        """Return the optimiser steps of one epoch; 0 for a stream."""
        batches = self.job.batches
        return 0 if batches is None else -(-len(batches.lengths) // batches.division.batch_size)

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

    # ---- the step ----

    def count_items(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Count the items of the global batch: the divisor of the loss."""
        raise NotImplementedError

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        return self.count_items(batch_samples, device)

    def _get_grad_norm(self, *arguments: Any, **options: Any) -> Any:
        """Return the gradient norm, judged before the optimiser takes the step.

        Raises:
            DivergedError: The loss or the gradient is not finite, or the loss has leapt.
        """
        trainer: Any = super()
        loss, self.step_loss = self.step_loss, 0.0
        if self.is_deepspeed_enabled:
            return self._zero_step(loss)
        norm = trainer._get_grad_norm(*arguments, **options)
        finite, fits = bool(torch.isfinite(torch.as_tensor(loss))), bool(torch.isfinite(torch.as_tensor(norm)))
        if self.accelerator.scaler is None:
            finite = fits = finite and fits
        self._judge(loss, norm, finite=not self.checkpointing.stop.any_rank(not finite), fits=fits)
        return norm

    def _zero_step(self, loss: torch.Tensor | float) -> float:
        """Take DeepSpeed's step where loss and gradient are finite, and return the gradient norm.

        Raises:
            DivergedError: The loss or the gradient is not finite, or the loss has leapt.
        """
        is_finite = bool(torch.isfinite(torch.as_tensor(loss)))
        is_finite = not self.checkpointing.stop.any_rank(not is_finite)
        if not is_finite and self.guard.training.on_nonfinite == "stop":
            self._judge(loss, math.nan, finite=False)
        # The gradients of a loss that is not finite are not finite either: DeepSpeed drops them and takes no step.
        is_taken, norm = sharded.step(self.deepspeed)
        self._judge(loss, norm, finite=is_finite and (is_taken or self.args.fp16), fits=is_taken)
        return norm

    def _judge(self, loss: Any, norm: Any, *, finite: bool, fits: bool = True) -> None:
        """Leave a step out, or end training and say where it was.

        Args:
            loss: This rank's.
            norm: Of the gradient.
            finite: Whether the loss and, without a loss scaler, the gradient are, on every rank. In fp16 only the
                backward pass is scaled: a loss must be finite there, too.
            fits: Whether the scaled gradient is finite, which is the same on every rank.

        Raises:
            DivergedError: See `Guard`.
        """
        guard, step, scaler = self.guard, self.state.global_step + 1, self.accelerator.scaler
        try:
            taken = guard.takes(step, finite=finite)
            if taken:
                # Asking for the scale waits for the device.
                scale = float("inf") if fits or scaler is None else scaler.get_scale()
                taken = guard.fits(step, finite=fits, scale=scale)
            self._is_left_out = not taken
            if not taken:
                self.optimizer.zero_grad(set_to_none=True)  # without a gradient the optimiser takes no step
            elif guard.training.loss_spike is not None:
                guard.see(step, self.mean_over_ranks(loss))
        except DivergedError:
            self.state.global_step = step
            logs = {"loss": self.mean_over_ranks(loss), "grad_norm": float(norm)}
            self.log(logs | {"learning_rate": self._get_learning_rate()})
            raise

    def mean_over_ranks(self, loss: Any) -> float:
        """Return the loss of the global batch: each rank holds its share times the number of ranks."""
        share = torch.as_tensor(loss, device=self.args.device).reshape(1)
        return float(self.accelerator.gather(share).mean())

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save whenever the model is the best so far, whatever `checkpoints.every` says, and where training ends.

        Returns whether to save: the Trainer sets `should_save` to it where nothing else is saved by steps.

        Raises:
            DataError: The metric is undefined on this validation split.
        """
        name = self.args.metric_for_best_model
        if name is not None and f"eval_{name}" not in metrics:
            message = f"{name} is undefined on this validation split; choose another metric, or more varied rows"
            raise DataError(Problem(message, key="training.best_metric"))
        is_best: bool = super()._determine_best_metric(metrics, trial)
        ends = self.control.should_training_stop and self.checkpointing.pace.keeps_last
        self.control.should_save = self.control.should_save or is_best or ends
        return self.control.should_save


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
            sharded.hold_back(self.trainer.accelerator)
        self.trainer._resume()
        self.trainer.checkpointing.pace.begin()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note that this step is evaluated."""
        self.trainer.last_evaluated = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Save and stop, if any rank received a signal; an evaluation that is due waits until the run is resumed.

        A checkpoint that is due by the clock of rank 0 is written by all; at the end of an epoch, after its evaluation.
        """
        checkpointing, epoch = self.trainer.checkpointing, self.trainer.steps_per_epoch()
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


class AfterStep(TrainerCallback):
    """Records whether the optimiser took the step, before the schedule asks `optimizer.step_was_skipped`.

    accelerate 1.15 only sees that a loss scaler did not call the optimiser; a fused one is called all the same.
    """

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Correct accelerate's record of the step."""
        self.trainer.optimizer._is_overflow = self.trainer._is_left_out
