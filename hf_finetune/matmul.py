"""How fast this machine multiplies matrices: measured, in the arithmetic of the run, as nobody knows it beforehand."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch

from hf_finetune.hardware import DTYPES

if TYPE_CHECKING:
    from hf_finetune.hardware import Machine

SIZES = {"cpu": 1024, "mps": 2048, "cuda": 4096}
"""Rows and columns: large enough that nothing but the product counts."""
LONGEST = 0.2
"""Seconds; at least two products are timed all the same."""


def peak(machine: Machine) -> float:
    """FLOP/s of the fastest of several square products on this rank's device.

    Draws from a generator of its own, so that training's random numbers stay what they were.

    Args:
        machine: Device and precision.
    """
    device, size = torch.device(machine.device), SIZES[machine.device]
    generator = torch.Generator(device).manual_seed(0)
    one = torch.randn(size, size, generator=generator, device=device).to(DTYPES[machine.precision])
    out = torch.empty_like(one)
    with torch.no_grad():
        _seconds(one, out)  # chooses a kernel, wakes the clocks
        began, best, tries = time.perf_counter(), float("inf"), 0
        while tries < 2 or time.perf_counter() - began < LONGEST:
            best, tries = min(best, _seconds(one, out)), tries + 1
    return 2.0 * size**3 / best


def _seconds(one: torch.Tensor, out: torch.Tensor) -> float:
    _wait(one.device)
    began = time.perf_counter()
    torch.mm(one, one, out=out)
    _wait(one.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    backend: Any = {"cuda": torch.cuda, "mps": torch.mps}.get(device.type)
    if backend is not None:
        backend.synchronize()
