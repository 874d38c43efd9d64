"""The same bits on a GPU: deterministic kernels wherever there are any."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.nn import functional

CUBLAS = (":4096:8", ":16:8")
"""Workspaces with which cuBLAS is deterministic (https://docs.nvidia.com/cuda/cublas, "Results reproducibility")."""
_plain: Any = functional.scaled_dot_product_attention


def enforce() -> None:
    """Choose deterministic CUDA kernels; an operation that has none warns."""
    if os.environ.get("CUBLAS_WORKSPACE_CONFIG") not in CUBLAS:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS[0]
    # Read by transformers before each call of flash_attention_2, whose backward pass adds up in any order without it.
    os.environ["FLASH_ATTENTION_DETERMINISTIC"] = "1"
    _demand(errors=False)
    torch.backends.cudnn.deterministic = True
    # On by default with the above, and slow: fills every new tensor.
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False
    functional.scaled_dot_product_attention = _attend


def _attend(*arguments: Any, **options: Any) -> Any:
    """`scaled_dot_product_attention` in kernels that give the same bits.

    torch 2.13 has flash and memory-efficient kernels that do, and takes them only where operations without any are
    errors, not warnings (`aten/src/ATen/native/transformers/cuda/attention_backward.cu`). Here they are for just the
    call and its backward pass.
    """
    if torch.compiler.is_compiling():
        return _plain(*arguments, **options)
    _demand(errors=True)
    try:
        out = _plain(*arguments, **options)
    finally:
        _demand(errors=False)
    if out.grad_fn is not None:
        out.grad_fn.register_prehook(lambda gradients: _demand(errors=True))
        out.grad_fn.register_hook(lambda made, gradients: _demand(errors=False))
    return out


def _demand(*, errors: bool) -> None:
    torch.use_deterministic_algorithms(mode=True, warn_only=not errors)
