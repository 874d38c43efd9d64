"""The one place where a recipe's keys become transformers' TrainingArguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from hf_finetune.data.job import Job
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import METRICS

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
    has_validation = recipe.data.validation is not None or recipe.data.validation_share is not None
    eval_every = training.eval_every if has_validation else None
    options: dict[str, Any] = {
        **_every("eval", eval_every),
        # Checkpoints by the clock and the last one are `ResumableTrainer`'s, and so is the removal of old ones.
        **_every("save", None if every == "auto" else every),
        "eval_on_start": has_validation and training.eval_at_start,
    }
    if training.best_metric is not None:
        options |= {
            "metric_for_best_model": training.best_metric,
            "greater_is_better": METRICS[training.best_metric].greater,
        }
        if every in (None, "auto"):
            options["save_strategy"] = "best"
    return options


def _every(what: str, every: Any) -> dict[str, Any]:
    if every is None:
        return {f"{what}_strategy": "no"}
    if every == "epoch":
        return {f"{what}_strategy": "epoch"}
    return {f"{what}_strategy": "steps", f"{what}_steps": every}
