"""Small data sets, prepared for a tokenizer, for the tests of what is shown of data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_finetune import data
from hf_finetune.hardware import Machine
from hf_finetune.recipe import Recipe

CLASSES = {"kind": "text_classification", "text": "text", "label": "label"}
TEXTS = {"kind": "causal_lm", "text": "text"}
PAIRS = {"kind": "causal_lm", "prompt": "question", "completion": "answer"}


@dataclass(frozen=True)
class Made:
    """A recipe, its data and its tokenizer."""

    recipe: Recipe
    prepared: data.Prepared
    tokenizer: PreTrainedTokenizerBase


def make(folder: Path, model: str, task: dict[str, Any], splits: dict[str, list[dict[str, Any]]], **block: Any) -> Made:
    """Write the rows of each split to a file, and prepare them."""
    for split, rows in splits.items():
        file = folder / f"{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        block[split] = str(file)
    recipe = Recipe.model_validate(
        {
            "task": task,
            "model": {"name": model},
            "data": {"max_length": 32, **block},
            "adapter": {"kind": "lora"},
            "training": {"steps": 2, "batch_size": 4, "learning_rate": 1e-3},
            "output": "runs/reviews",
        }
    )
    tokenizer = AutoTokenizer.from_pretrained(model)
    machine = Machine("cpu", 0, 0, 1, 1, 1, "fp32", "sdpa")
    return Made(recipe, data.prepare(recipe, tokenizer, machine), tokenizer)


def reviews(rows: int) -> list[dict[str, Any]]:
    """Rows of two classes, all different."""
    words = ["film", "movie", "story", "plot", "acting", "cast", "scene", "music"]
    return [
        {
            "text": f"the {words[i % 8]} is {'very ' * (i // 8)}{'dull' if i % 2 else 'good'} .",
            "label": "negative" if i % 2 else "positive",
        }
        for i in range(rows)
    ]
