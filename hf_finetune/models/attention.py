"""Attention for a CPU as one autograd function, and attention within packed documents.

`attend` is transformers' `eager`, with shared keys and values that are not copied. Autograd keeps the weights twice, in
float32 and rounded, and makes several tensors of their size in each pass. Here only the rounded ones are kept, and what
can be done in place is.

Shapes: B rows, H heads, K heads of keys and values (H = K G), T queries, S keys, D size of a head.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_finetune.models.kernels import dtype_of, multiplier

Tensor = torch.Tensor

NAME = "hf_finetune"
# Fewer keys than that: torch's softmax gradient of half precision is ten times slower than that of float32.
SHORT = 128


class _Attend(torch.autograd.Function):
    """softmax(q k^T scaling + mask) v (Vaswani et al. 2017, section 3.2), the softmax in float32.

    From (B, H, T, D) and twice (B, K, S, D) to (B, T, H, D); the mask is (B or 1, 1, T, S) and added, p the dropout of
    the weights.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd knows no names
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, p: float
    ) -> Tensor:
        rows, heads, length, size = query.shape
        kept, ctx.like = key.shape[1], (query.shape, query.dtype, key.dtype, value.dtype)
        dtype = dtype_of(query)
        key, value = key.to(dtype).contiguous(), value.to(dtype).contiguous()
        # The heads that share a key lie side by side. Scaled are the queries: they are fewer than the scores.
        query = (query * scaling).to(dtype).reshape(rows, kept, -1, size)
        with torch.autocast(query.device.type, enabled=False):
            scores = torch.matmul(query, key.transpose(2, 3))
            if mask is not None:
                scores.view(rows, heads, length, -1).add_(mask[..., : key.shape[2]])
            weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(dtype)
            keep = multiplier(weights, p) if p else None
            out = torch.matmul(weights if keep is None else weights * keep, value)
        ctx.save_for_backward(query, key, value, weights, keep)
        ctx.scaling = scaling
        return out.view(rows, heads, length, size).transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights, keep = ctx.saved_tensors
        shape, *dtypes = ctx.like
        grad = gradients[0].to(query.dtype).transpose(1, 2).reshape(query.shape)
        used = weights if keep is None else weights * keep
        grad_value = torch.matmul(used.transpose(2, 3), grad)
        grad_weights = torch.matmul(grad, value.transpose(2, 3))
        if keep is not None:
            grad_weights.mul_(keep)
        if weights.shape[-1] < SHORT:
            grad_weights, weights = grad_weights.float(), weights.float()
        # Sums are in float32, whatever the type.
        grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, weights.dtype).to(query.dtype)
        grad_query = torch.matmul(grad_scores, key).view(shape).mul_(ctx.scaling)
        grad_key = torch.matmul(grad_scores.transpose(2, 3), query)
        found = (grad_query, grad_key, grad_value)
        return *(tensor.to(dtype) for tensor, dtype in zip(found, dtypes, strict=True)), None, None, None


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attend as transformers' attention functions do: see `_Attend`; no weights are returned."""
    p = options.get("dropout", 0.0) if module.training else 0.0
    scaling = options.get("scaling") or query.shape[-1] ** -0.5
    out: Tensor = _Attend.apply(query, key, value, attention_mask, scaling, p)  # type: ignore[no-untyped-call]
    return out, None


def install(base: Any) -> str | None:
    """Let a pretrained model whose attention is `eager` attend in this way; its attention before, or None."""
    before = base.config._attn_implementation
    if before != "eager" or not base._can_set_attn_implementation():
        return None
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    base.set_attn_implementation(NAME)
    return str(before)


# Packed documents attend one by one: no mask of tokens by tokens, and no products across documents.
#
# For a row of several documents transformers makes a mask of (T, T), and `sdpa` leaves its flash kernels. Here each
# document is a call of its own; where the documents are short, one call with a mask takes less time, and is made.
#
# Shapes: B rows, H heads, K heads of keys and values, T tokens, D size of a head.

# Attention that can be called for each document -> how transformers makes its mask.
MASKS: dict[str, Any] = {"sdpa": sdpa_mask, NAME: eager_mask}
# Tokens for each document of a row but one, below which one call with a mask is made; a GPU computes more in the time
# that a call takes.
SHORT_DOCUMENTS, SHORT_ON_GPU = {"cpu": 64}, 256


def attend_documents(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    inner: str,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return attention within each document: (B, T, H, D) from (B, H, T, D) and twice (B, K, T, D), and no weights.

    Args:
        module: Of the model.
        query: Of the module.
        key: Of the module.
        value: Of the module.
        attention_mask: A mask that was made all the same is obeyed.
        inner: Name of the attention.
        options: `position_ids` (B or 1, T), which begin anew with each document, and those of `inner`.
    """
    apply: Any = ALL_ATTENTION_FUNCTIONS[inner]
    positions = options.get("position_ids")
    if attention_mask is not None or positions is None or query.shape[2] != key.shape[2]:
        found: tuple[Tensor, None] = apply(module, query, key, value, attention_mask, **options)
        return found
    spans = _spans(positions)
    if not spans:
        mask = _mask(inner, positions, query.dtype, apart=spans is None)
        whole: tuple[Tensor, None] = apply(module, query, key, value, mask, **options)
        return whole
    rows = []
    for row, ends in enumerate(spans):
        parts, begin = [], 0
        for end in ends:
            part = [tensor[row : row + 1, :, begin:end] for tensor in (query, key, value)]
            mask = _mask(inner, positions[:1, begin:end], query.dtype, apart=False)
            parts.append(apply(module, *part, mask, **options)[0])
            begin = end
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows), None


def _spans(positions: Tensor) -> list[list[int]] | None:
    """The ends of the documents of each row; empty where each row is one, None where one call with a mask is better."""
    if torch.compiler.is_compiling() or isinstance(positions, FakeTensor):
        return None  # there are no values to look at
    known: Any = positions
    if not hasattr(known, "spans"):  # every layer gets the same tensor
        length = positions.shape[1]
        ends = [[*row.nonzero()[:, 0].tolist(), length] for row in _begins(positions).cpu()]
        count = sum(map(len, ends))
        more = count - len(ends)  # than one a row; what fills a row up is one, too
        is_worth_it = len(ends) * length >= SHORT_DOCUMENTS.get(positions.device.type, SHORT_ON_GPU) * more
        known.spans = (ends if more else []) if is_worth_it else None
    spans: list[list[int]] | None = known.spans
    return spans


def _begins(positions: Tensor) -> Tensor:
    """True where a document begins, but the first of a row: as transformers sees it."""
    return positions.diff(dim=1, prepend=positions[:, :1] - 1) != 1


def _mask(inner: str, positions: Tensor, dtype: torch.dtype, *, apart: bool) -> Tensor | None:
    """Return the mask that `inner` wants, (B or 1, 1, T, T); with `apart`, of several documents in a row."""
    if inner == "sdpa" and not apart:
        return None
    length = positions.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=positions.device).tril()[None]
    if apart:
        document = _begins(positions).cumsum(1)
        seen = seen & (document[:, :, None] == document[:, None, :])
    seen = seen[:, None]
    if inner == "sdpa":
        return seen
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def _no_mask(inner: str, batch_size: int, q_length: int, kv_length: int, *arguments: Any, **options: Any) -> Any:
    """None for whole rows without padding, which `attend` takes care of; else the mask of `inner`."""
    if options.get("attention_mask") is None and options.get("local_size") is None and q_length == kv_length:
        return None
    return MASKS[inner](batch_size, q_length, kv_length, *arguments, **options)


def install_documents(base: Any) -> str | None:
    """Let a pretrained model attend in this way; its attention before, or None where that can't be."""
    before = str(base.config._attn_implementation)
    if before not in MASKS or not base._can_set_attn_implementation():
        return None
    name = f"{before}_of_documents"
    AttentionInterface.register(name, partial(attend_documents, inner=before))
    AttentionMaskInterface.register(name, partial(_no_mask, before))
    base.set_attn_implementation(name)
    return before
