"""The peers: `CrossEncoderTrainer` and `SentenceTransformerTrainer` of sentence-transformers, as written by hand.

    python benchmarks/sentence_trainers.py ranking --folder FOLDER --output FOLDER --learning-rate 1e-4

FOLDER has `model/` and `train.jsonl`: rows of `query`, `documents` and `labels`, or of `anchor` and `positive`. It
shares no code with hf_finetune. It writes its training seconds as the last line of OUTPUT/metrics.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import RankNetLoss
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import set_seed


def parse() -> argparse.Namespace:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("task", choices=["ranking", "embedding"])
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--seed", type=int, default=42)
    return parser.parse_args()


def main() -> None:
    """Train, save and write the seconds."""
    options = parse()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    set_seed(options.seed)
    rows = load_dataset("json", data_files=str(options.folder / "train.jsonl"), split="train")
    settings: dict[str, Any] = {
        "output_dir": str(options.output / "checkpoints"),
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": options.learning_rate,
        "warmup_steps": 0.1,
        "bf16": options.precision == "bf16",
        "use_cpu": True,
        "save_strategy": "no",
        "logging_steps": 20,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": options.seed,
    }
    place, trainer = str(options.folder / "model"), None
    if options.task == "ranking":
        scorer = CrossEncoder(place, num_labels=1, max_length=options.max_length, device="cpu")
        # All pairs of a batch in one forward pass: its default would be passes of as many pairs as there are queries.
        loss: Any = RankNetLoss(scorer, reduction_log="natural", mini_batch_size=-1)
        trainer = CrossEncoderTrainer(
            model=scorer, args=CrossEncoderTrainingArguments(**settings), train_dataset=rows, loss=loss
        )
    else:
        body = Transformer(place, max_seq_length=options.max_length)
        encoder = SentenceTransformer(
            modules=[body, Pooling(body.get_embedding_dimension()), Normalize()], device="cpu"
        )
        # The documents of a batch must differ, or a row's own is a negative of another one.
        arguments = SentenceTransformerTrainingArguments(**settings, batch_sampler=BatchSamplers.NO_DUPLICATES)
        loss = MultipleNegativesRankingLoss(encoder)
        trainer = SentenceTransformerTrainer(model=encoder, args=arguments, train_dataset=rows, loss=loss)
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    trainer.save_model(str(options.output))
    with (options.output / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"seconds": seconds}) + "\n")


if __name__ == "__main__":
    main()
