"""Arithmetic of a model and of this machine: FLOPs of the matrix products, which are nearly all, and their peak rate.

A product with a weight of N numbers takes 2N FLOPs a token forward, 2N for the gradient of its input, and 2N for its
own gradient where it is trained: 6N where all is (Kaplan et al. 2020, Scaling Laws for Neural Language Models, section
2.1), 4N for frozen weights. Attention takes 4 d T a token and layer forward, T tokens of a sequence attending to each
other through heads of d numbers in all, and twice that backward (Chowdhery et al. 2022, PaLM, appendix B; the half that
a causal mask hides is not taken off there, nor here). Left out: recomputation for activation checkpointing, padding,
normalisation, activations, embeddings and convolutions. Below the lowest trained weight no gradient of inputs is
needed; it is counted all the same.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_finetune.adapters._targets import base_model
from hf_finetune.device import DTYPES, Machine, wait
from hf_finetune.models import load

# Rows and columns of a product: large enough that nothing but the product counts.
SIZES = {"cpu": 1024, "mps": 2048, "cuda": 4096}
# Seconds of timing; at least two products are timed all the same.
LONGEST = 0.2


@dataclass(frozen=True)
class Flops:
    """Weights in matrix products, and the cost of attention."""

    token: float
    """Numbers that each token meets, and those of them that are trained."""
    token_trained: float
    row: float
    """Numbers that each row meets once, of a pooler or a classification head, and those of them that are trained."""
    row_trained: float
    attention: float
    """Forward FLOPs for each pair of tokens of a sequence, of all layers together."""

    def training(self, tokens: float, rows: float, squares: float) -> float:
        """Return FLOPs, forward and backward.

        Args:
            tokens: Without padding.
            rows: Sequences.
            squares: Sum of the squared lengths of the sequences.
        """
        weights = tokens * (4 * self.token + 2 * self.token_trained) + rows * (4 * self.row + 2 * self.row_trained)
        return weights + 3 * self.attention * squares

    @classmethod
    def of(cls, adapted: nn.Module) -> Flops:
        """Count the weights of a model, adapter included."""
        base = base_model(adapted)
        text, once = base.config.get_text_config(), tuple(f"{name}." for name in load.find_heads(base))
        sums = {(is_row, is_trained): 0.0 for is_row in (False, True) for is_trained in (False, True)}
        for path, module in base.named_modules():
            if "original_module" in path:  # PEFT's copy of what it trains
                continue
            is_row = f"{path}.".startswith(once) or "pooler" in path
            for numbers, is_trained in _products(module, text):
                sums[is_row, is_trained] += numbers
        layers, heads = getattr(text, "num_hidden_layers", 0), getattr(text, "num_attention_heads", 0)
        width = getattr(text, "head_dim", None) or getattr(text, "hidden_size", 0) // max(heads, 1)
        return cls(
            token=sums[False, False] + sums[False, True],
            token_trained=sums[False, True],
            row=sums[True, False] + sums[True, True],
            row_trained=sums[True, True],
            attention=4.0 * layers * heads * width,
        )


def _products(module: nn.Module, text: Any) -> list[tuple[float, bool]]:
    """Numbers of each weight of a module itself that inputs are multiplied with; True for those that are trained."""
    weight: Any = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):  # quantised layers keep their features, but pack their weights
        return [(module.in_features * module.out_features, bool(weight.requires_grad))]
    if type(module).__name__ == "Conv1D":  # of GPT-2
        return [(weight.numel(), bool(weight.requires_grad))]
    if isinstance(module, nn.Conv1d):
        return []
    # Experts are kept as (experts, out, in); each token meets a few of them.
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    active = getattr(text, "num_experts_per_tok", None)
    share = active / experts if experts and active else 1.0
    own = dict(module.named_parameters(recurse=False))
    return [(p.numel() * share, p.requires_grad) for name, p in own.items() if p.ndim == 3 and "lora_" not in name]


def matmul_peak(machine: Machine) -> float:
    """Measure the FLOP/s of the fastest of several square products on this rank's device, in the run's precision."""
    device, size = torch.device(machine.device), SIZES[machine.device]
    # A generator of its own: training's random numbers stay what they were.
    generator = torch.Generator(device).manual_seed(0)
    one = torch.randn(size, size, generator=generator, device=device).to(DTYPES[machine.precision])
    out, seconds, began = torch.empty_like(one), list[float](), time.perf_counter()
    # The first product chooses a kernel and wakes the clocks.
    while len(seconds) < 3 or time.perf_counter() - began < LONGEST:
        wait(machine.device)
        start = time.perf_counter()
        torch.mm(one, one, out=out)
        wait(machine.device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds[1:])
