"""What the README and the pages of docs/ tell people to type works: each shell block is run as it stands there.

It is run in a folder that looks like a checkout, with the shipped recipes on tiny models and a few rows. What needs a
GPU, the Hub, docker and the like is not run, but listed and counted here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import documents
import pytest
import yaml
from documents import ROOT, Block
from test_recipes_run import stand_in

from hf_finetune.recipe import Recipe

BLOCKS = [block for page in documents.PAGES for block in documents.blocks(page)]
RUN = [block for block in BLOCKS if not block.needs]
NOT_RUN = {"docs/scaling.md": 4, "README.md": 2}
"""Blocks that need something, by page."""


def test_what_is_not_run_is_listed_and_counted() -> None:
    assert [str(block) for block in BLOCKS if set(block.needs) - set(documents.NEEDS)] == []
    counted = Counter(block.page for block in BLOCKS if block.needs)
    listed = {page: number for page, number in NOT_RUN.items() if (ROOT / page).exists()}
    assert {page: counted[page] for page in listed} == listed, "\n".join(
        f"{block}: needs {', '.join(block.needs)}" for block in BLOCKS if block.needs
    )
    assert len(RUN) >= 10


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, tiny_llama: str, classifier: Path) -> Path:
    """A folder in which the commands of the pages make sense."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("accelerate_configs", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    for recipe in sorted((ROOT / "recipes").glob("*.yaml")):
        _shrink(recipe, folder, tiny_bert, tiny_llama)
    (folder / "recipe.yaml").write_text((folder / "recipes" / "quickstart.yaml").read_text())
    (folder / "path/to").mkdir(parents=True)
    (folder / "path/to/model").symlink_to(tiny_bert)
    (folder / "reviews-llama-12m").symlink_to(tiny_llama)
    for name in ("path/to/folder", "sst2"):
        _tables(folder / name)
    for name in ("RUN", "runs/a", "runs/b"):
        shutil.copytree(classifier, folder / name)
    return folder


def _shrink(path: Path, folder: Path, bert: str, llama: str) -> None:
    """A shipped recipe on a tiny model, for two steps on a few local rows with the columns that it names."""
    recipe = Recipe.load(str(path))
    told: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    splits = [split for split in ("train", "validation", "test") if getattr(recipe.data, split)]
    rows = folder / "recipes" / path.stem
    rows.mkdir(parents=True)
    for number, split in enumerate(splits):
        lines = [json.dumps(stand_in(recipe, number, index)) for index in range(24)]
        (rows / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    told["model"] = {"name": llama if recipe.task.kind == "causal_lm" else bert}
    told["data"] = {split: f"recipes/{path.stem}/{split}.jsonl" for split in splits}
    told["data"] |= {"max_length": 64, "checks": {"unknown_tokens": "off"}}
    told["training"] = {"steps": 2, "batch_size": 8, "learning_rate": 1.0e-3, "eval_every": 1}
    if recipe.task.kind == "causal_lm":
        told["task"] |= {"generate_rows": 2, "max_new_tokens": 4}
    (folder / "recipes" / path.name).write_text(yaml.safe_dump(told))
    if path.stem.startswith("gsm8k"):
        shutil.copytree(rows, folder / "gsm8k")
        shutil.copy(rows / "validation.jsonl", folder / "gsm8k" / "test.jsonl")


def _tables(folder: Path) -> None:
    """SST-2 as GLUE gives it: tsv with a header."""
    folder.mkdir(parents=True)
    recipe = Recipe.load(str(ROOT / "recipes" / "sst2_lora.yaml"))
    for number, split in enumerate(("train", "dev")):
        rows = [stand_in(recipe, number, index) for index in range(24)]
        text = "".join(f"{row['sentence']}\t{row['label']}\n" for row in rows)
        (folder / f"{split}.tsv").write_text(f"sentence\tlabel\n{text}")


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> str:
    """PATH with this environment's commands; TensorBoard takes a free port and is ended after a while."""
    folder = tmp_path_factory.mktemp("bin")
    board = folder / "tensorboard"
    real = Path(sys.prefix) / "bin" / "tensorboard"
    board.write_text(f'#!/bin/sh\ntimeout 12 {real} --port 0 "$@"\n[ $? = 124 ]\n')
    board.chmod(0o755)
    return f"{folder}:{sys.prefix}/bin:{os.environ['PATH']}"


def _cases() -> Iterator[Any]:
    for block in RUN:
        yield pytest.param(block, id=str(block), marks=[pytest.mark.slow] if block.trains else [])


@pytest.mark.timeout(900)
@pytest.mark.parametrize("block", list(_cases()))
def test_a_block_does_what_it_says(block: Block, checkout: Path, tools: str, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkout, tmp_path / "here", symlinks=True))
    # The code of this checkout, whatever is installed.
    environment = {**os.environ, "PATH": tools, "PYTHONPATH": str(ROOT), "ACCELERATE_LOG_LEVEL": "error"}
    script = f"set -euo pipefail\n{block.text}"
    command = ["bash", "-c", script]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{block}\n{block.text}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
