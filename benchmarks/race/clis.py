"""Configurations of the peers that have a command line: what each file says, what its command is, what it saves."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Job = dict[str, Any]


@dataclass(frozen=True)
class Configured:
    """A written configuration and the command that reads it."""

    command: list[str]
    """First word: a program of the peer's environment."""
    adapter: Path
    """Folder, or a pattern for one."""
    environment: dict[str, str] = field(default_factory=dict)


def accumulation(job: Job) -> int:
    """Micro-batches of a batch."""
    return int(job["batch_size"] // job["micro_batch"])


def llama_factory(job: Job) -> Configured:
    """LLaMA-Factory: data set as `alpaca` columns, template `chatml`, bf16."""
    output = Path(job["output"])
    columns = {"prompt": "question", "response": "answer"}
    _dump(output / "dataset_info.json", {"race": {"file_name": job["train"], "columns": columns}})
    facts = {
        "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_target": "all", "template": "chatml",
        "model_name_or_path": job["model"], "dataset": "race", "dataset_dir": str(output),
        "cutoff_len": job["max_length"], "lora_rank": job["r"], "lora_alpha": job["alpha"],
        "lora_dropout": job["dropout"], "output_dir": str(output / "out"), "save_strategy": "no", "logging_steps": 1,
        "per_device_train_batch_size": job["micro_batch"], "gradient_accumulation_steps": accumulation(job),
        "report_to": "none",
        "learning_rate": job["learning_rate"], "num_train_epochs": job["epochs"], "lr_scheduler_type": job["schedule"],
        "warmup_ratio": job["warmup_ratio"], "seed": job["seed"], "bf16": True, "use_cpu": job["device"] == "cpu",
    }  # fmt: skip
    _dump(output / "config.yaml", facts)
    command = ["llamafactory-cli", "train", str(output / "config.yaml")]
    return Configured(command, output / "out", {"DISABLE_VERSION_CHECK": "1"})


def ms_swift(job: Job) -> Configured:
    """ms-swift: data set as `messages` or as texts with label numbers, bf16, no conversion of the model."""
    output, is_classifier = Path(job["output"]), job["kind"] == "classification"
    rows = [json.loads(line) for line in Path(job["train"]).read_text(encoding="utf-8").splitlines()]
    converted = [_swift_row(row, job) for row in rows]
    (output / "swift.jsonl").write_text("".join(json.dumps(row) + "\n" for row in converted), encoding="utf-8")
    facts = {
        "model": job["model"], "dataset": str(output / "swift.jsonl"), "output_dir": str(output / "out"),
        "torch_dtype": "bfloat16", "max_length": job["max_length"], "lora_rank": job["r"], "lora_alpha": job["alpha"],
        "lora_dropout": job["dropout"], "target_modules": "all-linear", "logging_steps": 1, "save_strategy": "epoch",
        "per_device_train_batch_size": job["micro_batch"], "gradient_accumulation_steps": accumulation(job),
        "report_to": "none",
        "learning_rate": job["learning_rate"], "num_train_epochs": job["epochs"], "lr_scheduler_type": job["schedule"],
        "warmup_ratio": job["warmup_ratio"], "seed": job["seed"], "add_version": "false", "use_hf": "true",
        "save_only_model": "true", "split_dataset_ratio": 0, "use_cpu": str(job["device"] == "cpu").lower(),
    }  # fmt: skip
    if is_classifier:
        facts |= {"task_type": "seq_cls", "num_labels": len(job["labels"]), "model_type": "bert", "template": "bert"}
    else:
        facts |= {"model_type": "llama", "template": "chatml"}
    words = [word for key, value in facts.items() for word in (f"--{key}", str(value))]
    return Configured(["swift", "sft", *words], output / "out" / "checkpoint-*")


def axolotl(job: Job) -> Configured:
    """axolotl: chats by the tokenizer's own template, sdpa attention; bf16 on a GPU, as it refuses that on a CPU."""
    output = Path(job["output"])
    rows = [json.loads(line) for line in Path(job["train"]).read_text(encoding="utf-8").splitlines()]
    (output / "axolotl.jsonl").write_text(
        "".join(json.dumps({"messages": _messages(row)}) + "\n" for row in rows), encoding="utf-8"
    )
    data = {"path": str(output / "axolotl.jsonl"), "ds_type": "json", "type": "chat_template",
            "field_messages": "messages", "chat_template": "tokenizer_default"}  # fmt: skip
    facts = {
        "base_model": job["model"], "datasets": [data], "dataset_prepared_path": str(output / "prepared"),
        "output_dir": str(output / "out"), "adapter": "lora", "lora_r": job["r"], "lora_alpha": job["alpha"],
        "lora_dropout": job["dropout"], "lora_target_linear": True, "sequence_len": job["max_length"],
        "micro_batch_size": job["micro_batch"], "gradient_accumulation_steps": accumulation(job),
        "num_epochs": int(job["epochs"]),
        "learning_rate": job["learning_rate"], "lr_scheduler": job["schedule"], "warmup_ratio": job["warmup_ratio"],
        "optimizer": "adamw_torch", "seed": job["seed"], "bf16": job["device"] != "cpu", "attn_implementation": "sdpa",
        "logging_steps": 1, "save_strategy": "no", "val_set_size": 0,
    }  # fmt: skip
    if job["device"] == "cpu":
        # Its Triton kernels are on by default where nothing is said of them.
        facts |= dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), False)
    _dump(output / "config.yaml", facts)
    return Configured(
        ["axolotl", "train", str(output / "config.yaml"), "--launcher", "python"],
        output / "out",
        {"AXOLOTL_DO_NOT_TRACK": "1", "DO_NOT_TRACK": "1"},
    )


def _swift_row(row: Job, job: Job) -> Job:
    if job["kind"] == "classification":
        return {"messages": [{"role": "user", "content": row["text"]}], "label": job["labels"].index(row["label"])}
    return {"messages": _messages(row)}


def _messages(row: Job) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]


def _dump(file: Path, facts: Any) -> None:
    """JSON is YAML, too."""
    file.write_text(json.dumps(facts, indent=1), encoding="utf-8")
