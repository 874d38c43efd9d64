"""transformers' Trainer, with three things of our own: the batches, the loss, and what evaluation collects.

The loss of a step is the sum over every item of the *global* batch divided by the number of these items, however the
batch is cut into ranks and micro-batches. (transformers 5.23 multiplies the loss of sequence classification by
accumulation x world size, https://github.com/huggingface/transformers/issues/47688, and averages the means of unequal
micro-batches elsewhere.)
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
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
from hf_finetune.recipe import Recipe
from hf_finetune.run.journal import of_phase
from hf_finetune.tasks._catalogue import METRICS
from hf_finetune.tasks._generation import answer_together, until
from hf_finetune.tracking.observing import Look, Observing
from hf_finetune.tracking.throughput import DATA, FORWARD, StepTimes, Throughput
from hf_finetune.training import pool
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
        self.is_calibrating = False
        """The next evaluation is that of the validation split to which the task fits what it calibrates."""
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
        pool.keep_constants(model)
        # Read instead of `loss_is_scaled_for_ga` by transformers < 5.20, with the same effect.
        self.model_accepts_loss_kwargs = True
        self.remove_callback(PrinterCallback)

    # ---- batches ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Load this rank's micro-batches."""
        if self.job.batches is not None and (done := self.steps_done()):
            # The Trainer skips what was trained on; which batches these are follows from the epoch.
            self.job.batches.set_epoch(done // self.steps_per_epoch())
        train: Any = self.job.train
        # Of a stream nothing is skipped: it goes on where the lanes of the checkpoint ended.
        if isinstance(train, batches.StreamedBatches) and (start := self.checkpointing.resume_from) is not None:
            stream = Progress.read(start).stream
            self.streamed = torch.tensor(stream, dtype=torch.float64) if stream else None
            train = replace(train, done=self.steps_done(), used=tuple(stream[: self.job.division.batch_size]))
        return replace(self.job, train=train).loader(pin=self.args.device.type == "cuda")

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
        if task.contrasts and (self.args.world_size > 1 or len(batch_samples) > 1):
            pool.fill(self, batch_samples)
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
            before = [] if self.streamed is None else [self.streamed[None]]
            self.streamed = batches.merged(torch.cat([*before, ranks[:, 5:]]))
            train: Any = self.job.train
            train.stream.report = batches.report(self.streamed)
        return counts[0].to(torch.float32).to(device)

    def compute_loss(
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
        with self.times.part(FORWARD):
            batch = {key: value for key, value in inputs.items() if key not in COUNTS}
            task, targets = self.job.task, self.job.targets
            items = task.count(batch, targets) if num_items_in_batch is None else num_items_in_batch
            found = task.loss(self.paths.forward(model), batch, targets)
            # A global batch without a single item has a loss of 0, not 0/0.
            divisor = torch.clamp(torch.as_tensor(items), min=1e-8)
            share = self.args.world_size / divisor
            # Divided first: multiplied by `share`, the loss would have other bits.
            loss = found.sum / divisor * self.args.world_size
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
        # Of a sharded model, all ranks compare the fast paths with the plain ones before the first step.
        if self.paths.is_unproven:
            model, inputs = arguments[:2]
            rows = self._prepare_inputs({key: value for key, value in inputs.items() if key not in COUNTS})
            with torch.no_grad(), self.compute_loss_context_manager():
                self.paths.prove(model.eval(), rows)
        with self.times.micro_batch():
            loss: torch.Tensor = super().training_step(*arguments, **options)
        self.step_loss = self.step_loss + loss
        return loss

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
    #
    # Not the loop of `inference.load`: that has one process with a whole model, and this one rows that are spread over
    # ranks, weights that may be sharded, and a stop on which all ranks agree at every batch. What follows from logits
    # is in one place all the same: both call the task's `predict` and `metrics`.

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
        if self.is_calibrating:
            targets = self.job.task.calibrated(predictions, self.job.targets)
            self.job = replace(self.job, prepared=replace(self.job.prepared, targets=targets))
        metrics = self.job.task.metrics(predictions, self.job.targets)
        if not np.isfinite(metrics.get("loss", 0.0)):
            message = f"the loss on the {self._split} split is {metrics['loss']} at step {self.state.global_step}"
            raise DivergedError(Problem(f"{message}; lower training.learning_rate"))
        if self._look is not None:
            metrics |= self._look.score(ids, predictions, self.job.collate)
        if (questions := self.job.questions.get(self._split)) is not None:
            tokenizer, most = self.job.tokenizer, questions.max_new_tokens
            # A rank may stop in the middle of an answer, but all must get to where they agree on it.
            options: dict[str, Any] = {"max_new_tokens": most, "task": self.job.task}
            with self.accelerator.autocast(), until(self.is_asked_to_stop):
                answers = answer_together(self.bare_model, tokenizer, questions.prompts, **options)
            self.stop_evaluation_if_asked()
            for sums in questions.score(answers):
                metrics |= sums.whole()
        return metrics


# The one place where a recipe's keys become transformers' TrainingArguments.

OPTIMIZERS = {"adamw": "adamw_torch_fused", "adamw_8bit": "adamw_bnb_8bit", "adafactor": "adafactor", "sgd": "sgd"}
SCHEDULES = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def training_arguments(job: Job, checkpoints: Path) -> TrainingArguments:
    """Make the TrainingArguments of a run on this machine.

    Args:
        job: Recipe, machine, division and length.
        checkpoints: Folder for the Trainer's checkpoints.
    """
    recipe, machine, division, length = job.recipe, job.machine, job.division, job.length
    training = recipe.training
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        per_device_train_batch_size=division.micro_batch,
        gradient_accumulation_steps=division.accumulation,
        max_steps=length.total_steps,
        learning_rate=training.learning_rate,
        lr_scheduler_type=SCHEDULES[training.schedule],
        warmup_steps=length.warmup_steps,
        optim=OPTIMIZERS[training.optimizer],
        weight_decay=training.weight_decay,
        adam_beta1=training.beta1,
        adam_beta2=training.beta2,
        max_grad_norm=training.max_grad_norm or 0.0,
        bf16=machine.precision == "bf16",
        fp16=machine.precision == "fp16",
        seed=training.seed,
        logging_steps=training.log_every,
        logging_first_step=True,
        # The default shows NaN as 0.0.
        logging_nan_inf_filter=False,
        log_level="error",
        report_to="none",
        disable_tqdm=True,
        use_cpu=machine.device == "cpu",
        remove_unused_columns=False,
        # DDP would lay its buckets out anew after the first backward pass, in the order in which gradients came. Where
        # a number lies in a bucket decides in which order an all-reduce adds it up over three ranks or more, so that a
        # resumed run would take its first step with other bits. With this on, the first layout stays (torch 2.13,
        # `Reducer::should_rebuild_buckets`), for a walk through the graph at each step.
        ddp_find_unused_parameters=True,
        # Keep the process group that `hardware` made, with its timeout.
        accelerator_config={"use_configured_state": True},
        **_cadence(recipe),
    )
    # Only here: on its way in, transformers demands equal intervals of saving and evaluating; `FinetuneTrainer` saves
    # at every new best evaluation instead.
    arguments.load_best_model_at_end = training.best_metric is not None
    # One process never drives several GPUs through DataParallel: that is what `accelerate launch` is for.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


def _cadence(recipe: Recipe) -> dict[str, Any]:
    """Say when to evaluate and to save."""
    training, every = recipe.training, recipe.saving.every
    options: dict[str, Any] = {"eval_on_start": recipe.data.has_validation and training.eval_at_start}
    eval_every = training.eval_every if recipe.data.has_validation else None
    # Checkpoints by the clock and the last one are `ResumableTrainer`'s, and so is the removal of old ones.
    for what, when in (("eval", eval_every), ("save", None if every == "auto" else every)):
        options[f"{what}_strategy"] = "no" if when is None else "epoch" if when == "epoch" else "steps"
        if options[f"{what}_strategy"] == "steps":
            options[f"{what}_steps"] = when
    if training.best_metric is not None:
        options |= {
            "metric_for_best_model": training.best_metric,
            "greater_is_better": METRICS[training.best_metric].greater,
        }
        if every in (None, "auto"):
            options["save_strategy"] = "best"
    return options


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
        trainer.is_calibrating = trainer.job.task.calibrates
        is_known = trainer.state.best_model_checkpoint is None and not trainer.is_calibrating
        if is_known and last and last[0]["step"] == trainer.state.global_step:
            found["validation"] = scores(last[0], "eval")
        else:
            logs = trainer.evaluate_split("validation", prepared.validation, "final")
            found["validation"] = scores(logs, "final")
        trainer.is_calibrating = False
    if prepared.test is not None:
        found["test"] = scores(trainer.evaluate_split("test", prepared.test, "test"), "test")
    return found
