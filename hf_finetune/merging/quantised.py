"""The merged model with int8 or int4 weights, by torchao: a folder that transformers loads where torchao is installed.

Only weights are quantised, activations are not. Heads and the output layer stay as they are: they are few weights, and
what a classifier says hangs on them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from hf_finetune.adaptation.targets import output_embedding
from hf_finetune.errors import ModelError
from hf_finetune.merging import folder as folders
from hf_finetune.merging import plain
from hf_finetune.merging.options import Bits, refusal
from hf_finetune.model import heads
from hf_finetune.model.pretrained import silence

if TYPE_CHECKING:
    from hf_finetune.finished import Finished

GROUPS = (128, 64, 32)
"""Weights that share one scale in int4: the first that divides every row."""
LIBRARY = "torchao"


def check(bits: Bits, device: str) -> None:
    """Refuse what this machine can't run.

    Raises:
        RecipeError: torchao has no kernel for it here.
    """
    if bits == "int4" and device != "cuda":
        # torchao 0.18: each packing of Int4WeightOnlyConfig needs CUDA or XPU, and what packs 4 bits on a CPU
        # (IntxWeightOnlyConfig) stores them in 8.
        reason = f"torchao has kernels for int4 weights on CUDA only, and this machine has {device}"
        raise refusal(f"--quantize int4: {reason}; run this on a GPU, or write int8")


def write(source: Path, run: Finished, bits: Bits, folder: Path) -> None:
    """Quantise the model in a folder and write it to another, with its tokenizer.

    Args:
        source: The merged model.
        run: Says which class.
        bits: Of the weights.
        folder: Where to.

    Raises:
        ModelError: torchao does not take this model.
        StorageError: The disk does not take it.
    """
    settings = transformers.TorchAoConfig(_config(source, run, bits), modules_to_not_convert=_kept(source, run))
    options = {"dtype": torch.bfloat16} if bits == "int4" else {}
    network = plain.load(source, run, quantization_config=settings, **options)
    if not any(LIBRARY in type(parameter.data).__module__ for parameter in network.parameters()):
        raise ModelError(f"--quantize {bits}: torchao found no linear layer in this model to quantise")
    with folders.reported(folder), silence():
        network.save_pretrained(folder)
        folders.add_tokenizer(run, folder)


def _config(source: Path, run: Finished, bits: Bits) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if bits == "int8":
        return Int8WeightOnlyConfig()
    widths = [module.in_features for _, module in _linear(_outline(source, run))]
    group = next((size for size in GROUPS if all(width % size == 0 for width in widths)), None)
    if group is None:
        raise ModelError(f"--quantize int4: rows of {min(widths)} weights can't be divided into groups of {GROUPS[-1]}")
    return Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")


def _kept(source: Path, run: Finished) -> list[str]:
    """Modules that are not quantised."""
    outline = _outline(source, run)
    output = output_embedding(outline)
    return [*heads.find(outline), *(name for name, module in outline.named_modules() if module is output)]


def _linear(outline: Any) -> list[tuple[str, Any]]:
    return [(name, module) for name, module in outline.named_modules() if isinstance(module, torch.nn.Linear)]


def _outline(source: Path, run: Finished) -> Any:
    """The model without weights."""
    config = transformers.AutoConfig.from_pretrained(str(source), trust_remote_code=False)
    with torch.device("meta"), silence():
        return getattr(transformers, run.recipe.task.auto_model).from_config(config, trust_remote_code=False)
