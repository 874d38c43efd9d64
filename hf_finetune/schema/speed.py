"""The `speed` block: faster ways to the same numbers, each of which can be switched off."""

from __future__ import annotations

from typing import Literal

from hf_finetune.plugins import Section


class Speed(Section):
    """Fast paths that may be taken where they fit the model; a batch is compared before training."""

    fused_lora: bool = True
    """Compute a frozen linear layer and its LoRA branch as one operation with fewer copies."""
    fused_loss: bool = True
    """Make an LLM's logits for trained tokens only, a chunk at a time, together with their gradient."""
    skip_padding_mask: bool = True
    """Leave out a language model's padding mask: rows are padded on the right, and no token sees what follows it."""
    document_attention: bool = True
    """Let packed documents attend one by one, without a mask of tokens by tokens, where they are long enough."""
    fused_norm: bool = True
    """Compute an RMSNorm with a frozen weight, and its gradient, as one operation with fewer copies."""
    fused_mlp: bool = True
    """Compute a gated feed-forward layer (SwiGLU) so that it keeps half as much for its gradient."""
    plain_attention: bool = True
    """On a CPU, where attention is `eager`: without copies of keys and values that heads share."""
    compile: bool | Literal["auto"] = "auto"
    """Compile the layers of a model without dropout for training; `auto` does where that pays within the run."""
    cheap_dropout: bool = True
    """On a CPU, draw 16 random bits an element for dropout instead of a double."""
