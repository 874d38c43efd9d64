"""Keys of transformers, TRL, PEFT and Axolotl, and what a recipe calls them."""

from __future__ import annotations

_OURS = {
    "adapter.alpha": "lora_alpha",
    "adapter.dora": "use_dora",
    "adapter.dropout": "lora_dropout",
    "adapter.init": "init_lora_weights",
    "adapter.kind": "peft_type",
    "adapter.modules_to_save": "lora_modules_to_save",
    "adapter.r": "lora_r lora_rank rank",
    "adapter.rslora": "use_rslora",
    "adapter.target_modules": "lora_target_modules",
    "checkpoints.every": "save_steps save_strategy",
    "checkpoints.keep": "save_total_limit",
    "data.limit": "max_train_samples",
    "data.max_length": "max_seq_length max_seq_len sequence_len model_max_length",
    "data.packing": "sample_packing",
    "data.source": "dataset datasets dataset_name dataset_path",
    "data.subset": "dataset_config_name",
    "data.test": "test_file",
    "data.train": "data_files train_file train_split",
    "data.validation": "validation_file eval_dataset",
    "data.validation_share": "val_set_size",
    "data.workers": "preprocessing_num_workers dataset_num_proc",
    "hub.private": "hub_private_repo",
    "hub.repo": "hub_model_id",
    "model.attention": "attn_implementation",
    "model.name": "model_name_or_path base_model model_id pretrained_model_name_or_path",
    "model.revision": "model_revision",
    "output": "output_dir",
    "task.kind": "task_type",
    "task.label": "label_column",
    "task.label_smoothing": "label_smoothing_factor",
    "task.problem": "problem_type",
    "task.text": "dataset_text_field text_column",
    "training.activation_checkpointing": "gradient_checkpointing",
    "training.batch_size": "train_batch_size global_batch_size per_device_train_batch_size micro_batch_size",
    "training.best_metric": "metric_for_best_model",
    "training.beta1": "adam_beta1",
    "training.beta2": "adam_beta2",
    "training.early_stopping.patience": "early_stopping_patience",
    "training.epochs": "num_train_epochs num_epochs",
    "training.eval_at_start": "eval_on_start",
    "training.eval_batch": "per_device_eval_batch_size eval_batch_size",
    "training.eval_every": "eval_steps eval_strategy evaluation_strategy",
    "training.learning_rate": "lr",
    "training.log_every": "logging_steps",
    "training.max_grad_norm": "gradient_clipping",
    "training.optimizer": "optim",
    "training.schedule": "lr_scheduler lr_scheduler_type",
    "training.steps": "max_steps max_train_steps",
    "training.warmup_steps": "num_warmup_steps",
}
KEYS = {theirs: ours for ours, words in _OURS.items() for theirs in words.split()}

_BATCH = "write training.batch_size, the global batch; training.micro_batch is what one device takes at once"
_EVAL = "write training.eval_every: N, epoch or null"
_EXTENDS = "write extends: FILE in the first line of the file"
_LABELS = "list the labels in task.labels, in the order of their ids"
_LAUNCHER = "choose it at the launcher (accelerate launch --config_file FILE); remove it"
HINTS = {
    "assistant_only_loss": "write task.train_on: assistant",
    "bf16": "write training.precision: bf16",
    "completion_only_loss": "write task.train_on: assistant",
    "dataloader_num_workers": "not needed, rows are tokenised beforehand (data.workers); remove it",
    "deepspeed": _LAUNCHER,
    "defaults": _EXTENDS,
    "device_map": "follows from the machine; remove it",
    "do_eval": "give data.validation to evaluate, and remove it",
    "do_train": "the recipe says what is done; remove it",
    "dtype": "write training.precision",
    "eval_strategy": _EVAL,
    "evaluation_strategy": _EVAL,
    "extend": _EXTENDS,
    "fp16": "write training.precision: fp16",
    "fsdp": _LAUNCHER,
    "gradient_accumulation_steps": "accumulation follows from training.batch_size (the global batch) and "
    "training.micro_batch; remove it",
    "greater_is_better": "known for every metric; remove it",
    "hub_strategy": "the finished adapter is uploaded; write hub.every: best to upload the best so far, too",
    "id2label": _LABELS,
    "include": _EXTENDS,
    "label2id": _LABELS,
    "load_best_model_at_end": "training.best_metric: NAME keeps the best checkpoint; remove it",
    "load_in_4bit": "write model.quantization: nf4",
    "load_in_8bit": "write model.quantization: int8",
    "logging_dir": "TensorBoard files are written to the folder tensorboard of the run; remove it",
    "micro_batch_size": _BATCH,
    "num_labels": "the labels are counted in the data, or listed in task.labels; remove it",
    "num_processes": "the launcher sets it (accelerate launch --num_processes N); remove it",
    "overwrite_output_dir": "give --restart on the command line to move an earlier run aside",
    "peft_type": "write adapter.kind: lora (or another one)",
    "per_device_train_batch_size": _BATCH,
    "push_to_hub": "write hub: {repo: OWNER/NAME}, or upload a finished run with hf-finetune push RUN",
    "remove_unused_columns": "only the columns that the task names are read; remove it",
    "report_to": "TensorBoard files and metrics.jsonl are always written; remove it",
    "resume_from_checkpoint": "not part of a recipe; to go on training an adapter, name its run in adapter.from",
    "save_strategy": "write checkpoints.every: N, epoch or auto, or checkpoints: off",
    "task_type": "write task.kind, e.g. causal_lm or text_classification",
    "torch_dtype": "write training.precision",
    "train_on_inputs": "write task.train_on: all, or assistant",
    "trust_remote_code": "code from a repository is never run; remove it",
    "warmup": "write training.warmup_ratio or training.warmup_steps",
}
"""Advice where no key of ours takes the same value."""


def hint(key: str) -> str | None:
    """Say what to do about a key of another tool; None for an unknown word."""
    return HINTS.get(key) or (f"write {KEYS[key]}" if key in KEYS else None)
