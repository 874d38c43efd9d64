"""The speed of matrix products on this machine, measured in the arithmetic of the run: nobody knows it beforehand."""

from __future__ import annotations

import time

import torch

from hf_finetune.hardware import DTYPES, Machine, wait

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
    out, seconds, began = torch.empty_like(one), list[float](), time.perf_counter()
    # The first product chooses a kernel and wakes the clocks.
    while len(seconds) < 3 or time.perf_counter() - began < LONGEST:
        wait(machine.device)
        start = time.perf_counter()
        torch.mm(one, one, out=out)
        wait(machine.device)
        seconds.append(time.perf_counter() - start)
    return 2.0 * size**3 / min(seconds[1:])
