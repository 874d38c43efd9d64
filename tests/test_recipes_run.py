"""Every shipped recipe runs for two steps, on a tiny model and local rows with the columns that it names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS, Run
from PIL import Image

from hf_finetune.pipeline.check import check
from hf_finetune.pipeline.train import train
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import Task

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))

FEW = ("quickstart", "qwen_sft_lora")
"""A classifier and a language model for `make test`; the others are in `make test-slow`."""


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 5


def stand_in(recipe: Recipe, split: int, index: int, folder: Path = Path()) -> dict[str, Any]:
    """A row with the columns that a recipe names, unlike any other of its splits; files are written into `folder`."""
    words = f"{WORDS[4 + split]} {WORDS[20 + index]} the film is good . #### 7".split()
    columns = recipe.task.columns()
    is_tagged = any(column.kind == "words" for column in columns.values())
    row: dict[str, Any] = {}
    for name, column in columns.items():
        if column.kind == "image":
            row[name] = f"{split}-{index}.png"
            Image.new("RGB", (30 + index, 20 + split), "grey").save(folder / row[name])
        elif column.kind == "label":
            row[name] = ["O", "B-x", *["O"] * (len(words) - 2)] if is_tagged else "ab"[index % 2]
        else:
            row[name] = words if column.kind == "words" else " ".join(words)
    return row


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=[] if path.stem in FEW else pytest.mark.slow) for path in RECIPES]
)
def test_a_shipped_recipe_runs(
    path: Path, tmp_path: Path, model_of: Callable[[Task], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(str(path))
    monkeypatch.chdir(tmp_path)
    name = model_of(recipe.task)
    splits = [split for split in ("train", "validation", "test") if getattr(recipe.data, split)]
    for number, split in enumerate(splits):
        rows = [stand_in(recipe, number, index) for index in range(24)]
        Path(f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = [f"data.{split}={split}.jsonl" for split in splits]
    length = ["training.epochs=null", "training.steps=2", "training.batch_size=8", "training.eval_every=1"]
    small = [f"model.name={name}", "data.source=null", "data.max_length=64", "task.generate_rows=2"]
    small = [*small, "task.max_new_tokens=4"] if recipe.task.generates else small[:-1]
    overrides = [*small, *named, *length, "output=run", "data.limit=16", "data.checks.unknown_tokens=off"]
    checked = check(path, overrides)
    assert list(checked.findings) == []
    assert checked.plan["steps"].startswith("2 steps of 8 rows")
    outcome = train(Recipe.load(str(path), overrides)).outcome
    done = Run(tmp_path / "run", outcome)
    assert done.status["state"] == "done"
    assert done.lines("train")[0]["step"] == 1
    peft = {"adapter_config.json", "adapter_model.safetensors"}
    weights = {"config.json", "model.safetensors"} if recipe.adapter.kind == "full" else peft
    assert {path.name for path in (tmp_path / "run" / "adapter").iterdir()} >= {*weights, "README.md"}
