"""What this process may use: memory, and which processor."""

from __future__ import annotations

import platform
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from hf_finetune.hardware import Machine

CGROUP = Path("/sys/fs/cgroup")


def memory_available(machine: Machine) -> int | None:
    """Bytes that one rank may take on its device; None where that can't be known.

    On a CPU the node's free memory, or what its control group (cgroup v2) leaves, divided by the ranks of the node.
    """
    if machine.device == "cuda":
        return int(torch.cuda.mem_get_info(machine.local_rank)[0])
    known = [amount for amount in (_free(), _left_by_cgroup()) if amount is not None]
    return min(known) // machine.local_world_size if known else None


def _free() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found) * 1024


def _left_by_cgroup() -> int | None:
    try:
        limit = (CGROUP / "memory.max").read_text(encoding="ascii").strip()
        used = (CGROUP / "memory.current").read_text(encoding="ascii").strip()
    except OSError:
        return None
    return max(0, int(limit) - int(used)) if limit.isdigit() else None


def processor(device: str) -> str:
    """Name of the GPU, or of the CPU as its maker writes it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate memory: on a GPU it has a class for that, on a CPU only a text."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
