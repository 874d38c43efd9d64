"""transformers' Trainer, with three things of our own: the batches, the loss, and what evaluation collects.

The loss of a step is the sum over every item of the *global* batch divided by the number of these items, however the
batch is cut into ranks and micro-batches. (transformers 5.23 multiplies the loss of sequence classification by
accumulation x world size, https://github.com/huggingface/transformers/issues/47688, and averages the means of unequal
micro-batches elsewhere.)
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import EvalPrediction, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from hf_finetune.data import batches
from hf_finetune.data.job import COUNTS, Job
from hf_finetune.data.prepare import Prepared
from hf_finetune.errors import DivergedError, Problem
from hf_finetune.models.paths import Paths
from hf_finetune.run.journal import of_phase
from hf_finetune.tasks._generation import answer_together, until
from hf_finetune.tasks.base import Prompts
from hf_finetune.tracking.observing import Look, Observing
from hf_finetune.tracking.throughput import DATA, FORWARD, StepTimes, Throughput
from hf_finetune.training.callbacks import Guard
from hf_finetune.training.loop import AfterStep, ResumableTrainer
from hf_finetune.training.resume import Checkpointing, Progress


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
        self.times = StepTimes(args.device.type)
        self.throughput = Throughput(self.times)
        self.paths = Paths(job.task, job.targets)
        self._split = "validation"
        self._logged_at = 0
        self._logged: dict[str, torch.Tensor | float] = {}
        """Sums of `Loss.logs` since the last log, each micro-batch's share of the mean over its global batch."""
        super().__init__(
            model=model,
            args=args,
            train_dataset=job.train,
            eval_dataset=job.validation,
            compute_metrics=self._metrics,
            callbacks=[AfterStep(self), self.throughput, *callbacks],
        )
        # Read instead of `loss_is_scaled_for_ga` by transformers < 5.20, with the same effect.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)

    # ---- batches ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Load this rank's micro-batches."""
        if self.job.batches is not None and (done := self.steps_done()):
            # The Trainer skips what was trained on; which batches these are follows from the epoch.
            self.job.batches.set_epoch(done // self.steps_per_epoch())
        return replace(self.job, train=self._from_its_place(self.job.train)).loader(pin=self.args.device.type == "cuda")

    def _from_its_place(self, train: Any) -> Any:
        """Return the training set; a stream from where the run resumes. Of a set, the Trainer skips the beginning."""
        start, done = self.checkpointing.resume_from, self.steps_done()
        if not isinstance(train, batches.StreamedBatches) or start is None:
            return train
        stream = Progress.read(start).stream
        self.streamed = torch.tensor(stream, dtype=torch.float64) if stream else None
        return replace(train, done=done, used=tuple(stream[: self.job.division.batch_size]))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Load this rank's part of an encoded split."""
        encoded: Any = self.job.validation if eval_dataset is None else eval_dataset
        most, tokens = self.job.eval_batch(all_logits=self.paths.makes_all_logits)
        ranks = self.args.world_size
        division = batches.Division(most * ranks, most, self.args.process_index, ranks)
        rows = batches.Rows(encoded, self.job.task)
        return batches.eval_loader(rows, batches.lengths_of(encoded), division, self.job.collate, tokens)

    # ---- loss ----

    def get_batch_samples(self, *arguments: Any, **options: Any) -> Any:
        """Return the micro-batches of the next step, and the divisor of its loss."""
        self.throughput.begin()
        with self.times.part(DATA):
            return super().get_batch_samples(*arguments, **options)

    def count_items(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor | None:
        """Count the items of the global batch, the divisor of the loss; tokens and rows in the same exchange."""
        if not batch_samples:
            return None
        for batch in batch_samples:
            if batches.FAILED in batch:
                raise batch[batches.FAILED]
        task, targets = self.job.task, self.job.targets
        items = sum(task.count(batch, targets).to(torch.float64) for batch in batch_samples)
        counts = torch.stack([torch.as_tensor(items), *(self.throughput.sizes(batch_samples))])
        streamed = [batch.pop(batches.STREAMED) for batch in batch_samples if batches.STREAMED in batch]
        if streamed:
            counts = torch.cat([counts, batches.merged(torch.stack(streamed)).to(torch.float64)])
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
        before = [] if self.streamed is None else [self.streamed[None]]
        self.streamed = batches.merged(torch.cat([*before, ranks]))
        train: Any = self.job.train
        train.stream.report = batches.report(self.streamed)

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """Time the forward pass; see `_loss`."""
        with self.times.part(FORWARD):
            return self._loss(*arguments, **options)

    def _loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return this micro-batch's share of the loss of the global batch, a scalar.

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
        """Train on one micro-batch; its share of the loss is added up on the device, so that nothing waits for it."""
        self.progress(self.state.global_step, "training")
        if self.paths.is_unproven:
            self._prove_paths(*arguments[:2])
        with self.times.micro_batch():
            loss: torch.Tensor = super().training_step(*arguments, **options)
        self.step_loss = self.step_loss + loss
        return loss

    def _prove_paths(self, model: torch.nn.Module, inputs: dict[str, Any]) -> None:
        """Compare the fast paths of a sharded model with the plain ones; all ranks do, before the first step."""
        rows = self._prepare_inputs({key: value for key, value in inputs.items() if key not in COUNTS})
        with torch.no_grad(), self.compute_loss_context_manager():
            self.paths.prove(model.eval(), rows)

    def log(self, logs: dict[str, float], *arguments: Any, **options: Any) -> None:
        """Log, with the steps that were not taken so far, if any, and the scale of the loss in fp16."""
        if "loss" in logs and self.guard.not_taken:
            logs["steps_not_taken"] = self.guard.not_taken
        if "loss" in logs and self.accelerator.scaler is not None:
            logs["loss_scale"] = self.accelerator.scaler.get_scale()
        if "loss" in logs:
            steps = max(1, self.state.global_step - self._logged_at)
            logs |= {name: self.mean_over_ranks(value) / steps for name, value in self._logged.items()}
            self._logged, self._logged_at = {}, self.state.global_step
        super().log(logs, *arguments, **options)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Make the adapter's own optimiser where it has one (LoRA+), else the Trainer's."""
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
        """Return the adapted model, not wrapped for distribution."""
        return self.accelerator.unwrap_model(self.model)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, Any, torch.Tensor]:
        """Return predictions, and the numbers of their rows."""
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
        """Compute the metrics of a split from predictions in any order, with rows that fill ranks among them."""
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

    def _answers(self, questions: Prompts) -> dict[str, float]:
        """Generate and score answers to the split's questions."""
        model = self.bare_model
        with self.accelerator.autocast(), until(self.is_asked_to_stop):
            answers = answer_together(
                model, self.job.tokenizer, questions.prompts, max_new_tokens=questions.max_new_tokens
            )
        self.stop_evaluation_if_asked()
        return {name: sum(values) / len(values) for name, values in questions.score(answers).items() if values}


# The final metrics: of the model that is saved, on the validation and the test split.


def final(trainer: FinetuneTrainer, prepared: Prepared) -> dict[str, dict[str, float]]:
    """Evaluate the model as it will be saved.

    Returns:
        Split -> metrics; a split that the recipe does not have is left out.
    """

    def scores(logs: dict[str, float], phase: str) -> dict[str, float]:
        return {name: value for name, value in of_phase(logs, phase).items() if name != "runtime"}

    found = {}
    if prepared.validation is not None:
        # Not again where the last evaluation saw these very weights, unless the best checkpoint was loaded since.
        last = [logs for logs in trainer.state.log_history if "eval_loss" in logs][-1:]
        if trainer.state.best_model_checkpoint is None and last and last[0]["step"] == trainer.state.global_step:
            found["validation"] = scores(last[0], "eval")
        else:
            logs = trainer.evaluate_split("validation", prepared.validation, "final")
            found["validation"] = scores(logs, "final")
    if prepared.test is not None:
        found["test"] = scores(trainer.evaluate_split("test", prepared.test, "test"), "test")
    return found
