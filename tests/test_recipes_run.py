"""Every shipped recipe runs for two steps, on a tiny model and local rows with the columns that it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Run

from hf_finetune.recipe import Recipe
from hf_finetune.training import finetune

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))


def test_there_are_recipes() -> None:
    assert len(RECIPES) >= 5


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.stem))
def test_a_shipped_recipe_runs(
    path: Path, tmp_path: Path, tiny_bert: str, tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(str(path))
    row = dict.fromkeys(recipe.task.columns(), "the film is good . #### 7")
    rows = [row | ({"label": "ab"[index % 2]} if "label" in row else {}) for index in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    name = tiny_llama if recipe.task.kind == "causal_lm" else tiny_bert
    splits = [f"data.{split}=rows.jsonl" for split in ("train", "validation", "test") if getattr(recipe.data, split)]
    length = ["training.epochs=null", "training.steps=2", "training.batch_size=8", "training.eval_every=1"]
    small = [f"model.name={name}", "data.source=null", "data.max_length=64", "task.generate_rows=2"]
    small = [*small, "task.max_new_tokens=4"] if recipe.task.kind == "causal_lm" else small[:-1]
    outcome = finetune(Recipe.load(str(path), [*small, *splits, *length, "output=run", "data.limit=16"]))
    done = Run(tmp_path / "run", outcome)
    assert done.status["state"] == "done"
    assert done.lines("train")[0]["step"] == 1
    assert {path.name for path in (tmp_path / "run" / "adapter").iterdir()} >= {
        "adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"
    }  # fmt: skip
