"""Whether weights are there and whole, before any of them is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from models import recipe

from hf_finetune.errors import ModelError
from hf_finetune.models import pretrained

LORA = {"kind": "lora"}


@pytest.fixture
def folder(tiny_bert: str, tmp_path: Path) -> Path:
    """A copy of a model that a test may damage."""
    return Path(shutil.copytree(tiny_bert, tmp_path / "model"))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (truncate, "truncated or damaged model.safetensors"),
        (shard, "lacks 1 of 2 weight files, e.g. model-00002-of-00002.safetensors"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "a format that can run code"),
    ],
)
def test_weights_that_are_not_whole_are_found(damage: Callable[[Path], None], says: str, folder: Path) -> None:
    pretrained.check(recipe(str(folder), LORA).model)
    damage(folder)
    with pytest.raises(ModelError, match=says):
        pretrained.check(recipe(str(folder), LORA).model)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("_experts_implementation", "evil/kernel", "may be code from the Hub"),
        ("use_kernels", True, "asks for kernels from the Hub"),
        ("quantization_config", {"quant_method": "gptq"}, r"quantised \(gptq\); name the unquantised model"),
    ],
)
def test_a_config_chooses_no_kernels(key: str, value: object, says: str, folder: Path) -> None:
    from hf_finetune.models.pretrained import read_config

    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=says):
        read_config(recipe(str(folder), LORA).model)
