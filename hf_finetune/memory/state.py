"""Memory that lives as long as the run does: the process, weights, gradients, the optimiser's state, and copies."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from hf_finetune.adaptation.targets import base_model, output_embedding
from hf_finetune.hardware import Machine
from hf_finetune.model import heads
from hf_finetune.recipe import Recipe

MOMENTS = {"adamw": 8.0, "adamw_8bit": 2.0 + 2 * 4 / 256, "sgd": 0.0}
"""Bytes of optimiser state for a trained weight: two fp32 moments; in 8 bits, with an fp32 scale for each block of 256
(https://arxiv.org/abs/2110.02861); none without momentum."""
SMALLEST_8BIT = 4096
"""Weights of a tensor below which bitsandbytes keeps its moments in fp32 (`min_8bit_size`)."""
NF4_BLOCK, NF4_SCALES = 64, 256
"""Weights under one 8-bit scale, and scales under one fp32 scale (https://arxiv.org/abs/2305.14314, section 3)."""
NF4_TABLES = 4 * (16 + 256) + 4
"""Bytes of the two code books and the offset of each layer."""

WARM = 110_000_000
"""Bytes that a CPU process takes with its first steps, whatever the model: kernels, libraries that load late."""
FILES, PROCESS = "weights on disk", "process and libraries"


def lasting(recipe: Recipe, adapted: nn.Module, machine: Machine) -> dict[str, int]:
    """Weights and optimiser state of one device, in bytes."""
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    shards = machine.world_size if machine.is_sharded else 1
    parts = machine.world_size if machine.is_sharded or machine.zero_stage else 1
    # DeepSpeed trains in half precision, and keeps a copy of the trained weights in fp32.
    copies = 4 * sum(p.numel() for p in trained) if machine.zero_stage and machine.precision != "fp32" else 0
    return {
        "weights": weights(recipe, adapted) // shards,
        "optimiser state": (copies + sum(_moments(recipe, parameter) for parameter in trained)) // parts,
        # DistributedDataParallel keeps a copy of all gradients in its buckets.
        "gradients to exchange": sum(map(size, trained)) if machine.world_size > 1 and parts == 1 else 0,
    }


def weights(recipe: Recipe, adapted: nn.Module) -> int:
    """Bytes of parameters and buffers, quantised ones as bitsandbytes stores them."""
    quantized = quantized_layers(recipe, adapted)
    packed = {id(layer.weight) for layer in quantized}
    tensors = [*adapted.parameters(), *adapted.buffers()]
    plain = sum(size(tensor) for tensor in tensors if id(tensor) not in packed)
    return plain + sum(quantized_size(layer.weight, str(recipe.model.quantization)) for layer in quantized)


def quantized_layers(recipe: Recipe, adapted: nn.Module) -> list[nn.Linear]:
    """The linear layers of the base that `model.quantization` packs: all but heads and output embedding."""
    if recipe.model.quantization is None:
        return []
    body = base_model(adapted)
    output = output_embedding(body)
    skip = heads.find(body)
    return [
        module
        for path, module in body.named_modules()
        # Adapters are trained and thus floating point, as are copies that are trained in full.
        if isinstance(module, nn.Linear)
        and module is not output
        and not module.weight.requires_grad
        and path.partition(".")[0] not in skip
    ]


def quantized_size(weight: torch.Tensor, quantization: str) -> int:
    """Bytes of a linear layer's packed weight with its scales.

    NF4: half a byte each, an 8-bit scale for each block of 64, an fp32 scale for 256 of these, and code books. int8:
    one byte each and an fp32 scale for each output.
    """
    count = weight.numel()
    if quantization == "int8":
        return count + 4 * weight.shape[0]
    blocks = -(-count // NF4_BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // NF4_SCALES) + NF4_TABLES


def loading(recipe: Recipe, adapted: nn.Module, machine: Machine) -> dict[str, int]:
    """The weights, and on a CPU the file that they are cast from, which is mapped until all are there.

    Sharded weights reach an accelerator one by one and are divided there; a CPU that reads them, and a device that
    quantises them, holds them whole first.
    """
    whole = weights(recipe, adapted)
    if machine.is_sharded and machine.device != "cpu" and recipe.model.quantization is None:
        whole = whole // machine.world_size + max(map(size, adapted.parameters()))
    return {"weights": whole, FILES: _cast_from(recipe, adapted, machine)}


def process(machine: Machine) -> dict[str, int]:
    """On a CPU what this process holds now, Python, the libraries and the data, and what its first steps add."""
    return {PROCESS: (resident("VmRSS") or 0) + WARM} if machine.device == "cpu" else {}


def resident(field: str) -> int | None:
    """`VmRSS` or `VmHWM` of this process in bytes; None where there is no /proc."""
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    for line in status.read_text("utf-8").splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return None


def size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def _cast_from(recipe: Recipe, adapted: nn.Module, machine: Machine) -> int:
    """Bytes of the weight files in memory besides the weights; 0 where the weights are the mapped files themselves."""
    if machine.device != "cpu":
        return 0
    body = base_model(adapted)
    stored: torch.dtype = getattr(body.config, "dtype", None) or torch.float32
    kept = [p for p in body.parameters() if not (recipe.adapter.freezes_base and p.requires_grad)]
    if stored == kept[0].dtype and recipe.model.quantization is None:
        return 0
    return sum(parameter.numel() * stored.itemsize for parameter in kept)


def _moments(recipe: Recipe, parameter: torch.Tensor) -> int:
    count = parameter.numel()
    if recipe.training.optimizer == "adafactor":
        # One mean a row and a column of the last two dimensions (https://arxiv.org/abs/1804.04235), else one each.
        rows = count // parameter.shape[-1] if parameter.ndim > 1 else 0
        return 4 * (rows + count // parameter.shape[-2] if parameter.ndim > 1 else count)
    kind = recipe.training.optimizer
    small = kind == "adamw_8bit" and count < SMALLEST_8BIT
    return int(count * MOMENTS["adamw" if small else kind])
