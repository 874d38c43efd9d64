"""The peer: TRL's `DPOTrainer` with a LoRA, as one writes it by hand, on rows of `prompt`, `chosen` and `rejected`.

    python benchmarks/dpo_trainer.py --folder FOLDER --output FOLDER --learning-rate 5e-4

FOLDER has `model/`, `train.jsonl` and `validation.jsonl`. It shares no code with hf_finetune, and writes its training
seconds as the last line of OUTPUT/metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import DPOConfig, DPOTrainer


def main() -> None:
    """Train, save and write the seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--tuned", action="store_true", help="no gradient checkpointing, the reference computed once")
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.folder / "model")
    model = AutoModelForCausalLM.from_pretrained(options.folder / "model", dtype=torch.float32)
    data = load_dataset("json", data_files={"train": str(options.folder / "train.jsonl")})
    more = {"gradient_checkpointing": False, "precompute_ref_log_probs": True} if options.tuned else {}
    settings = DPOConfig(
        output_dir=str(options.output),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.micro_batch,
        gradient_accumulation_steps=options.batch_size // options.micro_batch,
        learning_rate=options.learning_rate,
        warmup_steps=0.1,
        beta=options.beta,
        max_length=options.max_length,
        bf16=True,
        use_cpu=True,
        seed=options.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **more,
    )
    trainer = DPOTrainer(
        model,
        args=settings,
        train_dataset=data["train"],
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    trainer.save_model(str(options.output))
    (options.output / "metrics.jsonl").write_text(json.dumps({"seconds": seconds}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
