"""Unsloth's `FastLanguageModel` with TRL's `SFTTrainer`, as in its own notebooks. Needs a GPU.

python unsloth_sft.py JOB.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from unsloth import FastLanguageModel  # type: ignore[import-not-found]  # isort: skip  # patches what is imported later
from datasets import load_dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


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


def main() -> None:
    """Train, save the adapter."""
    job = json.loads(Path(sys.argv[1]).read_text())
    clock = Clock(job["events"])
    model, tokenizer = FastLanguageModel.from_pretrained(
        job["model"], max_seq_length=job["max_length"], load_in_4bit=job["quantization"] == "nf4"
    )
    model = FastLanguageModel.get_peft_model(
        model, r=job["r"], lora_alpha=job["alpha"], lora_dropout=job["dropout"], target_modules=LINEAR,
        random_state=job["seed"], use_gradient_checkpointing="unsloth",
    )  # fmt: skip
    data: Any = load_dataset("json", data_files={"train": job["train"]})["train"]
    data = data.map(
        lambda row: {
            "text": tokenizer.apply_chat_template(
                [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}],
                tokenize=False,
            )
        },
        remove_columns=data.column_names,
    )
    options = {
        "per_device_train_batch_size": job["micro_batch"], "num_train_epochs": job["epochs"],
        "gradient_accumulation_steps": job["batch_size"] // job["micro_batch"],
        "learning_rate": job["learning_rate"], "lr_scheduler_type": job["schedule"], "seed": job["seed"],
        "warmup_steps": job["warmup_ratio"], "save_strategy": "no", "report_to": "none",
    }  # fmt: skip
    arguments = SFTConfig(output_dir=f"{job['output']}/checkpoints", max_length=job["max_length"], **options)
    trainer = SFTTrainer(model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[clock])
    clock.note("train_begin", rows=len(data))
    trainer.train()
    clock.note("train_end", steps=trainer.state.global_step)
    model.save_pretrained(f"{job['output']}/adapter")


if __name__ == "__main__":
    main()
