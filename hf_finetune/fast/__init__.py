"""Faster ways to the same numbers: each is a file, is checked against the plain way, and can be switched off.

    lora       a frozen linear layer with LoRA as one autograd function
    head       the loss of a language model without its logits
    attention  plain attention for a CPU
    dropout    dropout from fewer random bits, on a CPU
    paths      which of them a model takes

They change how a model computes, never what it holds: saving, merging and loading see PEFT's and transformers' modules.
"""

from __future__ import annotations

from hf_finetune.fast.paths import Paths, take

__all__ = ["Paths", "take"]
