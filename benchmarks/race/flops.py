"""Floating-point operations of a training run, from the weights in matrix products and the tokens that met them.

A product with a weight of N numbers costs 2N a token forward, 2N for the gradient of its input, and 2N for its own
where it is trained (Kaplan et al. 2020, Scaling Laws for Neural Language Models, section 2.1): 4N a token for the
frozen base, 6N for the adapter. The head of a language model counts for the tokens of the answers alone, as no others
need their logits. Attention's own products are left out, as are padding and what is computed twice. The one thing
counted that nobody computes: the gradient of the first layer's inputs, which no weight needs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

ROW_MODULES = ("pooler", "classifier", "score")
"""Met once a row, not once a token; not counted."""
HEADS = ("lm_head", "classifier", "score")
"""What `all-linear` leaves out (peft 0.21)."""


class Weights(NamedTuple):
    """Numbers of the weights in matrix products."""

    frozen: int
    """That each token meets."""
    trained: int
    """That each token meets."""
    head: int
    """Frozen, of a language model's head: for tokens whose loss counts."""


def training(weights: Weights, tokens: int, answers: int) -> float:
    """FLOPs forward and backward.

    Args:
        weights: What tokens meet.
        tokens: Without padding.
        answers: Those whose loss counts.
    """
    return (4.0 * weights.frozen + 6.0 * weights.trained) * tokens + 4.0 * weights.head * answers


def weights(model: str, kind: str, r: int) -> Weights:
    """What a token meets, with LoRA on all linear layers.

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
    frozen = trained = head = 0
    for name, module in empty.named_modules():
        if not isinstance(module, torch.nn.Linear) or set(name.split(".")) & set(ROW_MODULES):
            continue
        if name.rpartition(".")[2] in HEADS:
            head += module.in_features * module.out_features
            continue
        frozen += module.in_features * module.out_features
        trained += r * (module.in_features + module.out_features)
    return Weights(frozen, trained, head)
