"""Small data sets, prepared for a tokenizer, for the tests of what is shown of data."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_finetune.data import prepare
from hf_finetune.device import Machine
from hf_finetune.errors import Findings
from hf_finetune.recipe import Recipe
from hf_finetune.reports import data

CLASSES = {"kind": "text_classification", "text": "text", "label": "label"}
TEXTS = {"kind": "causal_lm", "text": "text"}
PAIRS = {"kind": "causal_lm", "prompt": "question", "completion": "answer"}

EVIL = "<script>window.pwned=1</script><img src=http://x.test/y onerror=window.pwned=1>\x1b[31m\u202e\x00"
PLAN = [("steps", "2 of 4 rows: 1 rank x 1 micro-batch"), ("memory", f"12 MB {EVIL}")]
"""What a page says of a plan."""


@dataclass(frozen=True)
class Made:
    """A recipe, its data and its tokenizer."""

    recipe: Recipe
    prepared: prepare.Prepared
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
    return Made(recipe, prepare.prepare(recipe, tokenizer, machine), tokenizer)


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


def write(made: Made, file: Path, findings: Findings | None = None) -> str:
    findings = findings or Findings()
    data.write(str(file), made.recipe, made.prepared, tokenizer=made.tokenizer, findings=findings, plan=PLAN)
    return file.read_text(encoding="utf-8")


def hostile(folder: Path, model: str) -> Made:
    """Three splits with every kind of trouble."""
    train = [*reviews(40), {"text": EVIL, "label": EVIL}, {"text": "the film " * 30, "label": "positive"}, *reviews(3)]
    return make(folder, model, CLASSES, {"train": train, "validation": reviews(8), "test": reviews(2)})
