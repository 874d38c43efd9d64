"""`transformers.Trainer` + PEFT as one writes it by hand, after the library's own examples.

    python plain.py JOB.json

Variants: `plain` is what `Trainer` does by itself (fp32, random order, batches padded to their longest row);
`plain-padded` is what the example `run_glue.py` does by default: the same, every row padded to the greatest length;
`tuned` is what a careful user reaches with arguments alone (bf16 autocast, frozen weights stored in bf16,
length-grouped batches, eager attention).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

Job = dict[str, Any]


class Clock(TrainerCallback):
    """Writes down when things happen."""

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def note(self, event: str, **facts: Any) -> None:
        """Append one line."""
        with self.file.open("a") as stream:
            stream.write(json.dumps({"event": event, "time": time.time(), **facts}) + "\n")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first step is done."""
        if state.global_step == 1:
            self.note("first_step")

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        """An evaluation is done."""
        found = {key.removeprefix("eval_"): value for key, value in (metrics or {}).items()}
        self.note(
            "evaluated", step=state.global_step, **{key: found[key] for key in ("loss", "accuracy") if key in found}
        )


def encode(job: Job, tokenizer: Any) -> Any:
    """Token ids and labels of both splits."""
    files = {split: job[split] for split in ("train", "validation")}
    data: Any = load_dataset("json", data_files=files)
    limit = job["max_length"]
    padding = "max_length" if job["variant"] == "plain-padded" else False

    def text(row: Job) -> Job:
        encoded = tokenizer(row["text"], truncation=True, max_length=limit, padding=padding)
        return {**encoded, "label": job["labels"].index(row["label"])}

    def chat(row: Job) -> Job:
        question = [{"role": "user", "content": row["question"]}]
        whole = [*question, {"role": "assistant", "content": row["answer"]}]
        asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = tokenizer.apply_chat_template(whole, return_dict=True)["input_ids"][:limit]
        labels = ([-100] * len(asked) + ids[len(asked) :])[:limit]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    return data.map(text if job["kind"] == "classification" else chat, remove_columns=data["train"].column_names)


def load(job: Job, *, is_tuned: bool) -> Any:
    """The base model with LoRA on all linear layers."""
    options: Any = {"dtype": torch.bfloat16 if is_tuned else torch.float32}
    if is_tuned:
        options["attn_implementation"] = "eager"
    if job["kind"] == "classification":
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            job["model"], num_labels=len(job["labels"]), **options
        )
        # The defect that multiplies the loss by accumulation x world size (transformers #47688).
        model.accepts_loss_kwargs = False
    else:
        model = AutoModelForCausalLM.from_pretrained(job["model"], **options)
    task = "SEQ_CLS" if job["kind"] == "classification" else "CAUSAL_LM"
    lora = {"r": job["r"], "lora_alpha": job["alpha"], "lora_dropout": job["dropout"]}
    model = get_peft_model(model, LoraConfig(task_type=task, target_modules="all-linear", **lora))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of right predictions."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def arguments(job: Job, *, is_tuned: bool) -> TrainingArguments:
    """What is the same for all systems, and what the tuned variant sets."""
    options: Job = {"bf16": True, "train_sampling_strategy": "group_by_length"} if is_tuned else {}
    if job["eval_every"]:
        options |= {"eval_strategy": "steps", "eval_steps": job["eval_every"], "per_device_eval_batch_size": 32}
    return TrainingArguments(
        output_dir=f"{job['output']}/checkpoints",
        per_device_train_batch_size=job["micro_batch"],
        gradient_accumulation_steps=job["batch_size"] // job["micro_batch"],
        num_train_epochs=job["epochs"],
        learning_rate=job["learning_rate"],
        lr_scheduler_type=job["schedule"],
        warmup_steps=job["warmup_ratio"],
        seed=job["seed"],
        save_strategy="no",
        report_to="none",
        use_cpu=job["device"] == "cpu",
        **options,
    )


def main() -> None:
    """Train, save the adapter."""
    job = json.loads(Path(sys.argv[1]).read_text())
    is_tuned, is_classifier = job["variant"] == "tuned", job["kind"] == "classification"
    clock = Clock(job["events"])
    set_seed(job["seed"])
    tokenizer: Any = AutoTokenizer.from_pretrained(job["model"])
    data = encode(job, tokenizer)
    model = load(job, is_tuned=is_tuned)
    trainer = Trainer(
        model=model,
        args=arguments(job, is_tuned=is_tuned),
        train_dataset=data["train"],
        eval_dataset=data["validation"] if job["eval_every"] else None,
        data_collator=(DataCollatorWithPadding if is_classifier else DataCollatorForSeq2Seq)(tokenizer),
        compute_metrics=accuracy if is_classifier else None,
        callbacks=[clock],
    )
    clock.note(
        "train_begin",
        rows=len(data["train"]),
        tokens=sum(sum(mask) for mask in data["train"]["attention_mask"]),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    trainer.train()
    clock.note("train_end", steps=trainer.state.global_step)
    model.save_pretrained(f"{job['output']}/adapter")


if __name__ == "__main__":
    main()
