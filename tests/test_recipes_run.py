"""The gallery: every recipe runs for two steps, on a tiny model and local rows with the columns that it names."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import QUICK, WORDS, Run
from PIL import Image
from test_chat import TOOLS

from hf_finetune.pipeline import gallery
from hf_finetune.pipeline.check import check, look, read
from hf_finetune.pipeline.train import train
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import Task

if TYPE_CHECKING:
    from forked import Server

RECIPES = list(gallery.files().values())

FEW = ("quickstart", "tool_calls")
"""A classifier and a language model for `make test`; the others are in `make test-slow`."""

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def splits(recipe: Recipe) -> list[str]:
    """The splits that a recipe names."""
    named = {"train": True, "validation": recipe.data.validation, "test": recipe.data.test}
    return [split for split, files in named.items() if files]


def stand_in(recipe: Recipe, split: int, index: int, folder: Path = Path()) -> dict[str, Any]:
    """A row with the columns that a recipe names, unlike any other of its splits; files are written into `folder`."""
    words = f"{WORDS[4 + split]} {WORDS[20 + index]} the film is good . #### 7".split()
    task: Any = recipe.task
    columns = task.columns()
    is_tagged = any(column.kind == "words" for column in columns.values())
    row: dict[str, Any] = {}
    for name, column in columns.items():
        if column.kind == "image":
            row[name] = f"{split}-{index}.png"
            Image.new("RGB", (30 + index, 20 + split), "grey").save(folder / row[name])
        elif column.kind == "audio":
            row[name] = f"{split}-{index}.wav"
            Path(folder, row[name]).write_bytes(task.example_sound(index + 24 * split))
        elif column.kind == "chat" and name == getattr(task, "tools", None):
            row[name] = [TOOL]
        elif column.kind == "chat":
            call = {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]}
            answer: dict[str, Any] = {
                "role": "assistant",
                "content": "good .",
                **(call if getattr(task, "tools", None) else {}),
            }
            row[name] = [{"role": "user", "content": " ".join(words)}, answer]
        elif task.kind == "decision" and column.is_target:
            (names,) = (asked.names for asked in task.decisions.values() if asked.answer == name)
            row[name] = names[index % len(names)]
        elif column.kind == "number":
            row[name] = [float(place == 0) for place in range(len(words))] if is_tagged else index / 4
        elif is_tagged and column.kind == "label":
            row[name] = ["O", "B-x", *["O"] * (len(words) - 2)]
        elif column.kind == "label" and isinstance(task.label, list):
            row[name] = int((index + len(row)) % 3 == 0)
        elif column.kind == "label":
            label = "ab"[index % 2]
            row[name] = [label] if task.problem == "multi_label" else label
        elif task.pipeline == "automatic-speech-recognition":
            row[name] = "a bee"
        else:
            row[name] = words if column.kind == "words" else " ".join(words)
        if name == task.one_row_by:  # two rows of each
            row[name] = f"{WORDS[4 + split]} {WORDS[20 + index // 2]}"
    return row


@pytest.fixture(scope="module")
def tool_llama(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> str:
    """Folder of the tiny language model with a chat template that knows tools."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(tiny_llama, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TOOLS.replace("</s>", "<|im_end|>")
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    "path", [pytest.param(path, id=path.stem, marks=[] if path.stem in FEW else pytest.mark.slow) for path in RECIPES]
)
def test_a_shipped_recipe_runs(
    path: Path, tmp_path: Path, model_of: Callable[[Task], str], tool_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe.load(str(path))
    task: Any = recipe.task
    monkeypatch.chdir(tmp_path)
    # The schemas of tools take room.
    is_chat = task.kind == "reward" and any(column.kind == "chat" for column in task.columns().values())
    name, length = (tool_llama, 128) if is_chat or getattr(task, "tools", None) else (model_of(task), 64)
    overrides = [f"model.name={name}", "data.source=null", f"data.max_length={length}", "data.limit=16", "output=run"]
    for number, split in enumerate(splits(recipe)):
        rows = [stand_in(recipe, number, index) for index in range(24)]
        Path(f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if split == "train" and recipe.data.mix:
            overrides.append("data.mix=[{train: train.jsonl, weight: 0.8}, {train: train.jsonl, weight: 0.2}]")
        else:
            overrides.append(f"data.{split}={split}.jsonl")
    overrides += ["training.epochs=null", "training.steps=2", "training.batch_size=8", "training.eval_every=2"]
    # What the tiny models and two steps leave no room for.
    if recipe.task.generates:
        overrides += ["task.max_new_tokens=4"]
        if hasattr(task, "generate_rows"):
            overrides += [f"task.generate_rows={min(2, task.generate_rows)}"]
    if recipe.adapter.kind == "lora":
        overrides += ["adapter.r=4"]
    if recipe.training.early_stopping:
        overrides += ["training.early_stopping.patience=1", "training.eval_every=1"]
    overrides += ["data.checks.unknown_tokens=off", "checkpoints=off", "tracking.tensorboard=false", *QUICK]
    reading, _ = read(path, overrides)
    assert list(look(reading)) == []
    outcome = train(reading).outcome
    done = Run(tmp_path / "run", outcome)
    assert done.status["state"] == "done"
    assert done.lines("train")[0]["step"] == 1
    peft = {"adapter_config.json", "adapter_model.safetensors"}
    weights = {"config.json", "model.safetensors"} if recipe.adapter.kind == "full" else peft
    assert {path.name for path in (tmp_path / "run" / "adapter").iterdir()} >= {*weights, "README.md"}


def pairs(index: int) -> dict[str, Any]:
    """A row of HuggingFaceH4/ultrafeedback_binarized."""
    prompt = f"how is the {WORDS[20 + index]} ?"
    asked = {"role": "user", "content": prompt}
    chosen, rejected = ([asked, {"role": "assistant", "content": text}] for text in ("good .", "the film is bad ."))
    more = {"prompt_id": f"{index:064x}", "messages": chosen, "score_chosen": 8.5, "score_rejected": 4.0}
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def names(index: int) -> dict[str, Any]:
    """A row of tomaarsen/conll2003."""
    tokens = f"the {WORDS[20 + index]} is the film .".split()
    tags = {"pos_tags": [12] * len(tokens), "chunk_tags": [0] * len(tokens), "ner_tags": [0, 3, 4, 0, index % 3, 0]}
    return {"id": str(index), "document_id": 1, "sentence_id": index, "tokens": tokens, **tags}


PUBLIC: dict[str, tuple[Callable[[int], dict[str, Any]], int, str]] = {
    "ultrafeedback_dpo": (pairs, 128, "margin"),
    "conll2003_full": (names, 64, "f1"),
}
"""By recipe: its rows, most tokens of the tiny model, and a metric."""


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_recipe_trains_offline_by_overrides_alone(
    name: str, tmp_path: Path, model_of: Callable[[Task], str], server: Server
) -> None:
    """The rows have the columns and types of the public ones, and nothing of the recipe is edited."""
    row, length, score = PUBLIC[name]
    recipe = gallery.files()[name]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row(index)) + "\n" for index in range(24)))
    overrides = [
        f"model.name={model_of(Recipe.load(str(recipe)).task)}",
        f"data.train={file}",
        f"data.max_length={length}",
    ]
    asked = [str(recipe), *overrides, f"output={tmp_path / 'run'}", "data.checks.unknown_tokens=off", *QUICK]
    assert "set data.validation" in server.run("train", *asked).stderr
    done = server.run("train", *asked, "data.validation_share=0.25", "training.epochs=1", "training.batch_size=6")
    assert done.returncode == 0, done.stderr
    assert "note: data.source of the recipe is not used, because data.train was overridden" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert score in next(line for line in lines if line["phase"] == "eval")


def test_the_gallery_fits_a_terminal_and_the_page_lists_it() -> None:
    assert len(RECIPES) >= 15
    assert max(map(len, gallery.shown().splitlines())) <= 80
    page = (gallery.FOLDER.parent / "docs" / "tasks.md").read_text(encoding="utf-8")
    rows = [f"| `{name}` | `{task}` | {purpose} |" for name, task, purpose in gallery.listed()]
    assert re.findall(r"^\| `\w+` \| `\w+` \| .* \|$", page, re.MULTILINE) == rows


def test_a_recipe_is_listed_shown_and_copied(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str, str]:
        done = server.run("recipes", *words, cwd=tmp_path)
        return done.returncode, done.stdout, done.stderr

    assert "wnut17_ner" not in run("list", "--task", "causal_lm")[1]
    for words, says in [
        (["show", "mnli_pair"], "did you mean 'mnli_pairs'?"),
        (["copy", "x"], "`hf-finetune recipes list` names them all"),
        (["copy"], "needs the NAME"),
        (["list", "sst2_lora"], "takes no name"),
        (["--task", "text_clasification"], "did you mean 'text_classification'?"),
    ]:
        code, _, error = run(*words)
        assert (code, says in error) == (2, True), error
    assert run("show", "mnli_pairs")[1] == (gallery.FOLDER / "mnli_pairs.yaml").read_text(encoding="utf-8")
    assert "next: hf-finetune check quickstart.yaml" in run("copy", "quickstart")[1]
    # Its rows came along.
    assert check("quickstart.yaml").problems == []
    assert run("copy", "sst2_lora", "-o", "quickstart.yaml")[0] == 2
    assert run("copy", "sst2_lora", "-o", "quickstart.yaml", "--overwrite")[0] == 0
