"""The peer: `transformers.Seq2SeqTrainer` as one writes it by hand, on rows of two columns, `en` and `fr`.

    python benchmarks/seq2seq_trainer.py --folder FOLDER --output FOLDER --epochs 3 --learning-rate 1e-3

FOLDER has `model/`, `train.jsonl` and `validation.jsonl`. It shares no code with hf_finetune. It generates at the
end of each epoch, as hf_finetune does, and writes its training seconds as the last line of OUTPUT/metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import sacrebleu
import torch
from datasets import load_dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    set_seed,
)

ANSWERED = 200


def parse() -> argparse.Namespace:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--group-by-length", action="store_true")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def main() -> None:
    """Train, save and write the seconds."""
    options = parse()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    set_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(options.folder / "model")
    auto: Any = AutoModelForSeq2SeqLM
    model = auto.from_pretrained(options.folder / "model")
    files = {split: str(options.folder / f"{split}.jsonl") for split in ("train", "validation")}
    data = load_dataset("json", data_files=files)

    def encode(rows: dict[str, list[str]]) -> Any:
        return tokenizer(rows["en"], text_target=rows["fr"], truncation=True, max_length=options.max_length)

    data = data.map(encode, batched=True, remove_columns=["en", "fr"])

    def metrics(prediction: Any) -> dict[str, float]:
        # Positions behind the end of an answer, and of a target, hold -100.
        given, wanted = (
            tokenizer.batch_decode(np.where(ids >= 0, ids, tokenizer.pad_token_id), skip_special_tokens=True)
            for ids in (prediction.predictions, prediction.label_ids)
        )
        return {"bleu": sacrebleu.corpus_bleu(given, [wanted]).score}

    arguments = Seq2SeqTrainingArguments(
        output_dir=str(options.output),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=16,
        num_train_epochs=options.epochs,
        learning_rate=options.learning_rate,
        warmup_steps=0.05,
        weight_decay=0.0,
        bf16=options.precision == "bf16",
        train_sampling_strategy="group_by_length" if options.group_by_length else "random",
        seed=options.seed,
        predict_with_generate=True,
        generation_max_length=options.max_new_tokens,
        eval_strategy="epoch",
        save_strategy="no",
        logging_steps=100,
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Seq2SeqTrainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["validation"].select(range(ANSWERED)),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        processing_class=tokenizer,
        compute_metrics=metrics,
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    trainer.save_model(str(options.output))
    (options.output / "metrics.jsonl").write_text(json.dumps({"seconds": round(seconds, 1)}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
