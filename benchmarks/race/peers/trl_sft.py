"""TRL's `SFTTrainer` on prompts and completions.

    python trl_sft.py JOB.json

Variants: `trl` leaves every default (bf16 autocast, activation checkpointing); `trl-tuned` sets what is fastest by
arguments alone (no checkpointing, frozen weights in bf16, length-grouped batches, eager attention); `trl-packing` and
`trl-padding-free` are those two on top, with the default attention. Packed batches hold as many tokens as the others.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
from trl import SFTConfig, SFTTrainer  # lives in an environment of its own

Job = dict[str, Any]
TUNED: Job = {"gradient_checkpointing": False, "bf16": True}
VARIANTS: dict[str, Job] = {
    "trl": {},
    "trl-tuned": {**TUNED, "train_sampling_strategy": "group_by_length"},
    "trl-packing": {**TUNED, "packing": True},
    "trl-padding-free": {**TUNED, "padding_free": True},
}


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
        self.note("evaluated", step=state.global_step, loss=(metrics or {}).get("eval_loss"))


def model_of(job: Job) -> Any:
    """A folder for the defaults; else the model, with what TRL would not choose by itself."""
    if job["variant"] == "trl":
        return job["model"]
    options: Job = {"dtype": torch.bfloat16}
    if job["variant"] == "trl-tuned" and job["device"] == "cpu":
        options["attn_implementation"] = "eager"
    if job["quantization"] == "nf4":
        import transformers

        config: Any = transformers.BitsAndBytesConfig
        kind = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
        options["quantization_config"] = config(load_in_4bit=True, **kind)
    return AutoModelForCausalLM.from_pretrained(job["model"], **options)


def settings(job: Job) -> Any:
    """SFTConfig."""
    options = dict(VARIANTS[job["variant"]])
    if job["activation_checkpointing"] is not None:
        options["gradient_checkpointing"] = job["activation_checkpointing"]
    rows, micro = job["batch_size"], job["micro_batch"]
    if options.get("packing"):
        rows, micro = (max(1, round(count * job["mean_tokens"] / job["max_length"])) for count in (rows, micro))
    if not options.get("padding_free"):  # is refused together
        options["max_length"] = job["max_length"]
    else:
        options["max_length"] = None
    if job["eval_every"]:
        options |= {"eval_strategy": "steps", "eval_steps": job["eval_every"], "per_device_eval_batch_size": 32}
    return SFTConfig(
        output_dir=f"{job['output']}/checkpoints",
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=max(1, round(rows / micro)),
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
    clock = Clock(job["events"])
    set_seed(job["seed"])
    data: Any = load_dataset("json", data_files={split: job[split] for split in ("train", "validation")})
    data = data.map(
        lambda row: {
            "prompt": [{"role": "user", "content": row["question"]}],
            "completion": [{"role": "assistant", "content": row["answer"]}],
        },
        remove_columns=data["train"].column_names,
    )
    lora = {"r": job["r"], "lora_alpha": job["alpha"], "lora_dropout": job["dropout"]}
    trainer = SFTTrainer(
        model=model_of(job),
        args=settings(job),
        train_dataset=data["train"],
        eval_dataset=data["validation"] if job["eval_every"] else None,
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **lora),
        callbacks=[clock],
    )
    clock.note(
        "train_begin",
        rows=len(data["train"]),
        tokens=sum(len(ids) for ids in trainer.train_dataset["input_ids"]),
        trained_parameters=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    )
    trainer.train()
    clock.note("train_end", steps=trainer.state.global_step)
    trainer.model.save_pretrained(f"{job['output']}/adapter")


if __name__ == "__main__":
    main()
