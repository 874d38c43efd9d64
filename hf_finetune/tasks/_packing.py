"""Batches of token rows: padded, or several documents packed into one row without attention across documents.

A packed batch has `position_ids` that restart at every document and no `attention_mask`: from that transformers
(`masking_utils.find_packed_sequence_indices`) makes a causal mask that is block-diagonal, for the attention
implementations in `PACKED_ATTENTION`. Shapes: B rows, T tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_finetune.errors import ModelError
from hf_finetune.tasks.base import IGNORE, Batch

if TYPE_CHECKING:
    import torch

PACKED_ATTENTION = ("eager", "sdpa")
"""Attention implementations that packing is offered for. `flash_attention_2` sees documents only in a batch of one
row, so it is left out."""
MULTIPLE_ON_GPU = 8
"""Rows are padded to a multiple of this on CUDA, where tensor cores want it."""


def padded(features: list[dict[str, Any]], pad: int) -> Batch:
    """Pad rows on the right: `input_ids`, `attention_mask` and `labels`, each (B, T)."""
    width = _width([len(row["input_ids"]) for row in features])
    return {
        "input_ids": _stack([row["input_ids"] for row in features], width, pad),
        "attention_mask": _stack([[1] * len(row["input_ids"]) for row in features], width, 0),
        "labels": _stack([row["labels"] for row in features], width, IGNORE),
    }


def packed(features: list[Any], pad: int) -> Batch:
    """Join the documents of each row: `input_ids`, `position_ids` and `labels`, each (B, T).

    Padding at the end is a document of its own: its tokens see each other, so no row of the attention is empty. The
    first label of each document is `IGNORE`, so that nothing is predicted across documents.
    """
    ids = [[token for document in row for token in document["input_ids"]] for row in features]
    labels = [[label for document in row for label in (IGNORE, *document["labels"][1:])] for row in features]
    width = _width([len(row) for row in ids])
    positions = [
        [position for document in row for position in range(len(document["input_ids"]))]
        + list(range(width - len(tokens)))
        for row, tokens in zip(features, ids, strict=True)
    ]
    return {
        "input_ids": _stack(ids, width, pad),
        "position_ids": _stack(positions, width, 0),
        "labels": _stack(labels, width, IGNORE),
    }


def check_packing(model: torch.nn.Module) -> None:
    """Prove on the model itself that packed documents do not see each other and start at position 0.

    No logit of a document may have a gradient at the embeddings of the one before it. Values can't tell: bitsandbytes'
    int8 rounds a token by what else is in the batch.

    Turns `config.use_cache` off for good: with a cache, transformers does not look for packed documents.

    Args:
        model: A causal LM, with or without its adapter.

    Raises:
        ModelError: Packing would train this model on something else than its rows.
    """
    import torch

    config: Any = model.config
    config.use_cache = False
    vocabulary = config.get_text_config().vocab_size
    first, second = ((torch.arange(length) * step + 1) % vocabulary for length, step in ((7, 7), (9, 3)))
    training = model.training
    model.eval()
    try:
        packed, gradient = _second_logits(model, [first, second])
        alone, _ = _second_logits(model, [second])
    except TypeError as error:
        raise ModelError(f"this model takes no position ids, so rows can't be packed; {_REMEDY} ({error})") from None
    finally:
        model.train(training)
    # Other shapes round otherwise, weights of a few bits most of all.
    is_rounded = any(p.dtype not in {torch.float32, torch.float64} for p in model.parameters())
    tolerance = (0.1 if is_rounded else 1e-3) * alone.abs().max()
    leaks, is_seen = gradient[: len(first)].any(), gradient[len(first) :].any()
    if leaks or not is_seen or not bool(((packed - alone).abs() <= tolerance).all()):
        raise ModelError(f"this model ignores position ids: packed rows would see each other; {_REMEDY}")


_REMEDY = "set data.packing: false"


def _second_logits(model: Any, documents: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (tokens of the last document, V) in float32, and the gradient of their norm at the embeddings (T, H)."""
    import torch

    device = next(model.parameters()).device
    ids = torch.cat(documents)[None].to(device)
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None].to(device)
    embedded: list[torch.Tensor] = []

    def begin_here(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(begin_here)
    try:
        with torch.enable_grad():
            logits: torch.Tensor = model(input_ids=ids, position_ids=positions).logits
            logits = logits[0, -len(documents[-1]) :].float()
            (gradient,) = torch.autograd.grad(torch.linalg.vector_norm(logits), embedded)
    finally:
        hook.remove()
    return logits.detach(), gradient[0]


def _width(lengths: list[int]) -> int:
    import torch

    multiple = MULTIPLE_ON_GPU if torch.cuda.is_available() else 1
    return -(-max(lengths) // multiple) * multiple


def _stack(rows: list[list[int]], width: int, fill: int) -> torch.Tensor:
    import torch

    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.long)
