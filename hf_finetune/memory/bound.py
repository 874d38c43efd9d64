"""More memory than a training step can need, found in a moment: often there is no need to simulate one."""

from __future__ import annotations

import torch
from torch import nn

from hf_finetune.adaptation.targets import output_embedding
from hf_finetune.hardware import Machine

TRAINED = 4 + 4 + 8 + 4
"""Bytes of a trained weight: itself, its gradient, two moments, its place in the buckets that ranks exchange."""
NUMBER = {"fp32": 4, "bf16": 3, "fp16": 3}
"""Bytes of a number that a layer keeps; where the precision is mixed, some are cast to fp32."""
COPIES = 2
"""Copies that are kept of a layer's output: as it is, and cast, activated or dropped out."""
SCORES = 2
"""The same for the score of a token with another: before and after softmax."""
LOGITS = 3
"""The same for a language model's logits, in fp32: as they are, cast, their gradient."""
LEFT = 1.6
"""On a CPU, times that for what batches of other shapes leave, and for holes."""


def bound(base: nn.Module, machine: Machine, shape: tuple[int, int]) -> int:
    """Bytes that a training step will hardly exceed, without what the process holds before.

    Every weight counts as trained and in fp32: an adapter has fewer than its base. A layer keeps of each token what it
    makes of it, `COPIES` times, and attention the scores of all pairs, as in https://arxiv.org/abs/2205.05198, section
    4.1, but for any architecture: widths are read from the modules. It is 1.3 to 4.5 times what `memory.estimate` finds
    for the models of `benchmarks/memory_estimate.py`.

    Args:
        base: The model without adapter; on the meta device will do.
        machine: Its device.
        shape: Rows of a micro-batch, and tokens of a row.
    """
    rows, tokens = shape
    config = base.config.get_text_config()  # type: ignore[operator, union-attr]
    layers = int(getattr(config, "num_hidden_layers", 0) or 0)
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    vocabulary = 0 if output_embedding(base) is None else int(config.vocab_size)
    width = 0
    for module in base.modules():
        sides = [max(weight.shape) for weight in module.parameters(recurse=False) if weight.ndim]
        width += module.embedding_dim if isinstance(module, nn.Embedding) else max(sides, default=0)
    a_token = NUMBER[machine.precision] * (COPIES * width + SCORES * layers * heads * tokens)
    a_token += torch.float32.itemsize * LOGITS * vocabulary
    needed = TRAINED * sum(parameter.numel() for parameter in base.parameters()) + rows * tokens * a_token
    return int(needed * LEFT) if machine.device == "cpu" else needed
