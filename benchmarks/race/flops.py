"""Floating-point operations of a training run, from the weights in matrix products and the tokens that met them.

A product with a weight of N numbers costs 2N a token forward, 2N for the gradient of its input, and 2N for its own
where it is trained (Kaplan et al. 2020, Scaling Laws for Neural Language Models, section 2.1): 4N a token for the
frozen base, 6N for the adapter. Attention's own products are left out, as are padding and what is computed twice: so a
share of the peak is never flattered.
"""

from __future__ import annotations

from typing import Any

ROW_MODULES = ("pooler", "classifier", "score")
"""Met once a row, not once a token; not counted."""
HEADS = ("lm_head", "classifier", "score")
"""What `all-linear` leaves out (peft 0.21)."""


def training(frozen: int, trained: int, tokens: int) -> float:
    """FLOPs forward and backward.

    Args:
        frozen: Numbers of the frozen weights that each token meets.
        trained: Numbers of the trained ones.
        tokens: Without padding.
    """
    return (4.0 * frozen + 6.0 * trained) * tokens


def weights(model: str, kind: str, r: int) -> tuple[int, int]:
    """Numbers of frozen and of trained weights that a token meets, with LoRA on all linear layers.

    Args:
        model: Folder of the base model; no weights are read.
        kind: `chat` or `classification`.
        r: Rank.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    auto: Any = AutoModelForCausalLM if kind == "chat" else AutoModelForSequenceClassification
    with torch.device("meta"):
        empty: Any = auto.from_config(AutoConfig.from_pretrained(model))
    frozen = trained = 0
    for name, module in empty.named_modules():
        if not isinstance(module, torch.nn.Linear) or set(name.split(".")) & set(ROW_MODULES):
            continue
        frozen += module.in_features * module.out_features
        if name.rpartition(".")[2] not in HEADS:
            trained += r * (module.in_features + module.out_features)
    return frozen, trained
