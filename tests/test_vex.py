"""What `supply/vex.json` says about accelerate's CVE-2026-69112 is true."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

CALLS = {"load_checkpoint_in_model", "load_checkpoint_and_dispatch", "load_and_quantize_model"}
"""The function with the hole, and the two of accelerate that call it."""


def sources(package: str) -> Iterator[Path]:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    for place in spec.submodule_search_locations:
        yield from Path(place).rglob("*.py")


def test_nobody_calls_what_has_the_hole() -> None:
    for package in ["hf_finetune", "transformers", "peft", "datasets"]:
        naming = [file for file in sources(package) if any(name in file.read_text(encoding="utf-8") for name in CALLS)]
        used = {
            node.id if isinstance(node, ast.Name) else node.attr
            for file in naming
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Name | ast.Attribute)
        }
        assert not used & CALLS


def test_the_hole_is_still_there(tmp_path: Path) -> None:
    """Fails when accelerate refuses a way out of the folder: then vex.json has to go."""
    from accelerate import load_checkpoint_in_model

    model = torch.nn.Linear(2, 1, bias=False)
    save_file({"weight": torch.ones(1, 2)}, tmp_path / "outside.safetensors")
    (tmp_path / "model").mkdir()
    index = {"weight_map": {"weight": "../outside.safetensors"}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    load_checkpoint_in_model(model, str(tmp_path / "model"))
    assert model.weight.tolist() == [[1.0, 1.0]]
