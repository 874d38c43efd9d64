"""transformers' Trainer, with three things of our own: the batches, the loss, and what evaluation collects.

The loss of a step is the sum over every item of the *global* batch divided by the number of these items, however the
batch is cut into ranks and micro-batches. (transformers 5.23 multiplies the loss of sequence classification by
accumulation x world size, https://github.com/huggingface/transformers/issues/47688, and averages the means of unequal
micro-batches elsewhere.)
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hf_finetune.data import batches as data_batches
from hf_finetune.data.job import COUNTS, Job
from hf_finetune.errors import DataError, DivergedError, Problem
from hf_finetune.models import sharded
from hf_finetune.models.paths import Paths
from hf_finetune.run.journal import of_phase
from hf_finetune.tasks._generation import answer_together, until
from hf_finetune.tasks.base import Questions
from hf_finetune.tracking.observing import Look, Observing
from hf_finetune.tracking.throughput import DATA, FORWARD, StepTimes, Tally, Throughput
from hf_finetune.training.callbacks import Guard
from hf_finetune.training.resume import Checkpointing, Progress, ResumableTrainer

if TYPE_CHECKING:
    from hf_finetune.data.prepare import Prepared


class FinetuneTrainer(ResumableTrainer):
    """One fine-tuning run."""

    # The loss is divided by the items of the whole global batch, so the Trainer must not divide it again.
    loss_is_scaled_for_ga = True
    observing: Observing | None = None
    """Watches evaluations."""
    _look: Look | None = None

    def __init__(
        self,
        model: torch.nn.Module,
        args: TrainingArguments,
        job: Job,
        *,
        checkpointing: Checkpointing,
        callbacks: list[TrainerCallback],
    ) -> None:
        self.job = job
        self.checkpointing = checkpointing
        self.guard = Guard(job.recipe.training)
        self.is_sharded = job.machine.is_sharded
        self.adapter = job.adapter
        self.times = StepTimes(args.device.type)
        self.throughput = Throughput(self.times)
        self.paths = Paths(job.task, job.targets)
        self._split = "validation"
        self._step_loss: torch.Tensor | float = 0.0
        self._logged_at = 0
        self._logged: dict[str, torch.Tensor | float] = {}
        """Sums of `Loss.logs` since the last log, each micro-batch's share of the mean over its global batch."""
        self._streamed: torch.Tensor | None = None
        self._is_left_out = False
        """The present step is skipped."""
        super().__init__(
            model=model,
            args=args,
            train_dataset=job.train,
            eval_dataset=job.validation,
            compute_metrics=self._metrics,
            callbacks=[_AfterStep(self), self.throughput, *callbacks],
        )
        # Read instead of `loss_is_scaled_for_ga` by transformers < 5.20, with the same effect.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)

    # ---- batches ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Loader of this rank's micro-batches."""
        if self.job.batches is not None and (done := self.steps_done()):
            # The Trainer skips what was trained on; which batches these are follows from the epoch.
            self.job.batches.set_epoch(done // self._steps_per_epoch())
        return replace(self.job, train=self._from_its_place(self.job.train)).loader(pin=self.args.device.type == "cuda")

    def _from_its_place(self, train: Any) -> Any:
        """Return the training set; a stream from where the run resumes. Of a set, the Trainer skips the beginning."""
        start, done = self.checkpointing.resume_from, self.steps_done()
        if not isinstance(train, data_batches.StreamedBatches) or start is None:
            return train
        stream = Progress.read(start).stream
        self._streamed = torch.tensor(stream, dtype=torch.float64) if stream else None
        return replace(train, done=done, used=tuple(stream[: self.job.division.batch_size]))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Loader of this rank's part of an encoded split."""
        encoded: Any = self.job.validation if eval_dataset is None else eval_dataset
        division = data_batches.Division(
            batch_size=self.job.eval_batch.rows * self.args.world_size,
            micro_batch=self.job.eval_batch.rows,
            rank=self.args.process_index,
            world_size=self.args.world_size,
        )
        rows = data_batches.Rows(encoded, self.job.task)
        tokens = self.job.eval_batch.budget(all_logits=self.paths.makes_all_logits)
        return data_batches.eval_loader(rows, data_batches.lengths_of(encoded), division, self.job.collate, tokens)

    # ---- loss ----

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """The micro-batches of the next step, and the divisor of its loss."""
        self.throughput.begin()
        with self.times.part(DATA):
            return super().get_batch_samples(*arguments, **options)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Items of the global batch: the divisor of the loss. Tokens and rows are counted in the same exchange."""
        if not batch_samples:
            return None
        for batch in batch_samples:
            if data_batches.FAILED in batch:
                raise batch[data_batches.FAILED]
        task, targets = self.job.task, self.job.targets
        items = sum(task.count(batch, targets).to(torch.float64) for batch in batch_samples)
        counts = torch.stack([torch.as_tensor(items), *(self.throughput.sizes(batch_samples))])
        streamed = [batch.pop(data_batches.STREAMED) for batch in batch_samples if data_batches.STREAMED in batch]
        if streamed:
            counts = torch.cat([counts, data_batches.merged(torch.stack(streamed)).to(torch.float64)])
        ranks = counts[None]
        if self.args.world_size > 1:
            ranks = self.accelerator.gather(ranks.to(device)).cpu()
        counts = ranks[:, :5].sum(0)
        self.throughput.count(counts[1:].tolist())
        if streamed:
            self._count_streamed(ranks[:, 5:])
        return counts[0].to(torch.float32).to(device)

    def _count_streamed(self, ranks: torch.Tensor) -> None:
        """Note what the ranks used up of the stream for the next step; float64, a row a rank."""
        before = [] if self._streamed is None else [self._streamed[None]]
        self._streamed = data_batches.merged(torch.cat([*before, ranks]))
        train: Any = self.job.train
        train.stream.count(data_batches.report(self._streamed))

    def stream_so_far(self) -> list[int]:
        """For a checkpoint."""
        return [] if self._streamed is None else [int(count) for count in self._streamed.tolist()]

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """The forward pass, timed; see `_loss`."""
        with self.times.part(FORWARD):
            return self._loss(*arguments, **options)

    def _loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the loss of the global batch, a scalar.

        The shares of all micro-batches of all ranks add up to the loss; times the world size, because the gradients
        of the ranks are averaged.
        """
        batch = {key: value for key, value in inputs.items() if key not in COUNTS}
        task, targets = self.job.task, self.job.targets
        items = task.count(batch, targets) if num_items_in_batch is None else num_items_in_batch
        found = task.loss(self.paths.forward(model), batch, targets)
        # A global batch without a single item has a loss of 0, not 0/0.
        share = self.args.world_size / torch.clamp(torch.as_tensor(items), min=1e-8)
        loss = found.sum / torch.clamp(torch.as_tensor(items), min=1e-8) * self.args.world_size
        for name, value in (found.logs or {}).items():
            self._logged[name] = self._logged.get(name, 0.0) + value.detach() * share
        adapted: Any = self.model  # not wrapped for distribution: nothing to look for at every micro-batch
        penalty = self.job.adapter.penalty(adapted)
        if penalty is not None:
            loss = loss + penalty / self.current_gradient_accumulation_steps
        return (loss, {}) if return_outputs else loss

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """One micro-batch; adds its share to the loss of the step, on the device, and waits for nothing."""
        self.progress(self.state.global_step, "training")
        if self.paths.is_unproven:
            self._prove_paths(*arguments[:2])
        with self.times.micro_batch():
            loss: torch.Tensor = super().training_step(*arguments, **options)
        self._step_loss = self._step_loss + loss
        return loss

    def _prove_paths(self, model: torch.nn.Module, inputs: dict[str, Any]) -> None:
        """Compare the fast paths of a sharded model with the plain ones; all ranks do, before the first step."""
        rows = self._prepare_inputs({key: value for key, value in inputs.items() if key not in COUNTS})
        with torch.no_grad(), self.compute_loss_context_manager():
            self.paths.prove(model.eval(), rows)

    def _get_grad_norm(self, *arguments: Any, **options: Any) -> Any:
        """Gradient norm, looked at before the optimiser takes the step.

        Raises:
            DivergedError: The loss or the gradient is not finite, or the loss has leapt.
        """
        trainer: Any = super()
        loss, self._step_loss = self._step_loss, 0.0
        if self.is_deepspeed_enabled:
            return self._zero_step(loss)
        norm = trainer._get_grad_norm(*arguments, **options)
        finite, fits = bool(torch.isfinite(torch.as_tensor(loss))), bool(torch.isfinite(torch.as_tensor(norm)))
        if self.accelerator.scaler is None:
            finite = fits = finite and fits
        self._judge(loss, norm, finite=not self.checkpointing.stop.any_rank(not finite), fits=fits)
        return norm

    def _zero_step(self, loss: torch.Tensor | float) -> float:
        """Take DeepSpeed's step where loss and gradient are finite; returns the gradient norm.

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
                guard.see(step, self._mean_over_ranks(loss))
        except DivergedError:
            self.state.global_step = step
            logs = {"loss": self._mean_over_ranks(loss), "grad_norm": float(norm)}
            self.log(logs | {"learning_rate": self._get_learning_rate()})
            raise

    def after_step(self) -> None:
        """Say whether the optimiser took the step, to all who ask `optimizer.step_was_skipped`, as the schedule does.

        accelerate 1.15 only sees that a loss scaler did not call the optimiser; a fused one is called all the same.
        """
        self.optimizer._is_overflow = self._is_left_out

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Log, with the steps that were not taken so far, if any, and what fp16 multiplies the loss by."""
        if "loss" in logs and self.guard.not_taken:
            logs["steps_not_taken"] = self.guard.not_taken
        if "loss" in logs and self.accelerator.scaler is not None:
            logs["loss_scale"] = self.accelerator.scaler.get_scale()
        if "loss" in logs:
            steps = max(1, self.state.global_step - self._logged_at)
            logs |= {name: self._mean_over_ranks(value) / steps for name, value in self._logged.items()}
            self._logged, self._logged_at = {}, self.state.global_step
        super().log(logs, *arguments, **options)

    def _mean_over_ranks(self, loss: Any) -> float:
        """The loss of the global batch: each rank holds its share times the number of ranks."""
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

    def _steps_per_epoch(self) -> int:
        batches = self.job.batches
        return 0 if batches is None else -(-len(batches.lengths) // batches.division.batch_size)

    def throughput_so_far(self) -> dict[str, float]:
        """For a checkpoint."""
        return asdict(self.throughput.total)

    def resume_throughput(self, so_far: dict[str, float]) -> None:
        """From a checkpoint."""
        self.throughput.total = Tally(**so_far)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The adapter's own optimiser where it has one (LoRA+), else the Trainer's."""
        if self.optimizer is None:
            trained: Any = self.model if model is None else model
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            options = {**options, "weight_decay": self.args.weight_decay}
            self.optimizer = self.job.adapter.optimizer(trained, cls, options)
        made: torch.optim.Optimizer = super().create_optimizer(model)
        filled = [group for group in made.param_groups if group["params"]]
        if self.is_sharded and len(filled) < len(made.param_groups) - 1:
            # torch's sharded checkpoints (2.13) give back the state of an optimiser with one empty group at most.
            made.param_groups[:] = filled
        return made

    # ---- evaluation ----

    def evaluate_split(self, split: str, encoded: Any, prefix: str) -> dict[str, float]:
        """Evaluate a split other than the one that is watched in training; metrics carry `prefix_`."""
        watched, self._split = self._split, split
        try:
            metrics: dict[str, float] = self.evaluate(encoded, metric_key_prefix=prefix)
            return metrics
        finally:
            self._split = watched

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluate a split, and have it watched."""
        run = partial(super().evaluate, eval_dataset, ignore_keys, metric_key_prefix)
        if self.observing is None:
            return run()
        encoded = self.job.validation if eval_dataset is None else eval_dataset
        self._look = self.observing.look(self, metric_key_prefix, self._split, encoded)
        try:
            with self._look.watching():
                metrics: dict[str, float] = run()
            return metrics
        finally:
            self._look = None

    @property
    def bare_model(self) -> Any:
        """The adapted model, not wrapped for distribution."""
        return self.accelerator.unwrap_model(self.model)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Any, torch.Tensor]:
        """Predictions, and the numbers of their rows."""
        self.progress(self.state.global_step, "evaluating")
        self.stop_evaluation_if_asked()
        if self._look is not None:
            self._look.announce(inputs)
        inputs = self._prepare_inputs(inputs)
        row_ids = inputs.pop("row_ids")
        totals = None if self._look is None else self._look.totals
        with torch.no_grad(), self.compute_loss_context_manager():
            found = self.job.task.predict(self.paths.forward(model), inputs, self.job.targets, totals)
        return None, found, row_ids

    def _metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """Metrics of a split, from predictions that come in any order and with fillers."""
        ids = np.asarray(prediction.label_ids)
        found: Any = prediction.predictions
        order = ids.argsort()[np.count_nonzero(ids < 0) :]
        ids, predictions = ids[order], {name: np.asarray(values)[order] for name, values in found.items()}
        metrics = self.job.task.metrics(predictions, self.job.targets)
        if not np.isfinite(metrics.get("loss", 0.0)):
            message = f"the loss on the {self._split} split is {metrics['loss']} at step {self.state.global_step}"
            raise DivergedError(Problem(f"{message}; lower training.learning_rate"))
        if self._look is not None:
            metrics |= self._look.score(ids, predictions, self.job.collate)
        questions = self.job.questions.get(self._split)
        return metrics | self._answers(questions) if questions is not None else metrics

    def _answers(self, questions: Questions) -> dict[str, float]:
        """Generate and score answers to the split's questions."""
        model = self.bare_model
        with self.accelerator.autocast(), until(self.is_asked_to_stop):
            answers = answer_together(
                model, self.job.tokenizer, questions.prompts, max_new_tokens=questions.max_new_tokens
            )
        self.stop_evaluation_if_asked()
        return questions.score(answers)


class _AfterStep(TrainerCallback):
    """Hears of a step before everyone else who wants to know whether it was taken."""

    def __init__(self, trainer: FinetuneTrainer) -> None:
        self.trainer = trainer

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The optimiser is done."""
        self.trainer.after_step()


# The metrics that count: of the model that is saved, on the validation and the test split.


def final(trainer: FinetuneTrainer, prepared: Prepared) -> dict[str, dict[str, float]]:
    """Evaluate the model as it will be saved.

    The validation split is not evaluated again where the last evaluation already saw these very weights; a best
    checkpoint that was loaded back is.

    Returns:
        Split -> metrics; a split that the recipe does not have is left out.
    """
    scores = {}
    if prepared.validation is not None:
        scores["validation"] = _last(trainer) or _evaluate(trainer, "validation", prepared)
    if prepared.test is not None:
        scores["test"] = _evaluate(trainer, "test", prepared)
    return scores


def _last(trainer: FinetuneTrainer) -> dict[str, float] | None:
    """Metrics of an evaluation after the last step, unless the weights were changed since."""
    if trainer.state.best_model_checkpoint is not None:
        return None
    for logs in reversed(trainer.state.log_history):
        if logs["step"] == trainer.state.global_step and "eval_loss" in logs:
            return _scores(logs, "eval")
    return None


def _evaluate(trainer: FinetuneTrainer, split: str, prepared: Prepared) -> dict[str, float]:
    phase = "final" if split == "validation" else split
    return _scores(trainer.evaluate_split(split, getattr(prepared, split), phase), phase)


def _scores(logs: dict[str, float], phase: str) -> dict[str, float]:
    return {name: value for name, value in of_phase(logs, phase).items() if name != "runtime"}
