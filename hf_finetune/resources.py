"""Free memory, and the name of the processor."""

from __future__ import annotations

import os
import platform
import re
from contextlib import suppress
from pathlib import Path

import torch

from hf_finetune.errors import RecipeError
from hf_finetune.hardware import Machine

VARIABLE = "HF_FINETUNE_MEMORY"
"""Most free memory that a rank reckons with, e.g. `8GB`, where several share a device."""
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}
CGROUP = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def memory_available(machine: Machine) -> int | None:
    """Bytes that one rank may take on its device; None where that can't be known.

    On a CPU the node's free memory, or what its control groups (cgroup v2) leave, divided by the ranks of the node. No
    more than `HF_FINETUNE_MEMORY` says, where it is set.

    Raises:
        RecipeError: It says no amount of memory.
    """
    known = []
    if text := os.environ.get(VARIABLE, "").strip():
        found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]I?B|)", text.upper(), re.ASCII)
        if found is None:
            raise RecipeError(f"{VARIABLE}={text} is no amount of memory; write e.g. 8GB, or the bytes")
        known.append(int(float(found[1]) * UNITS[found[2]]))
    if machine.device == "cuda":
        known.append(int(torch.cuda.mem_get_info()[0]))
    else:
        known += [free // machine.local_world_size for free in (_free(), _left_by_cgroups()) if free is not None]
    return min(known, default=None)


def _free() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return None if found is None else int(found) * 1024


def _left_by_cgroups() -> int | None:
    """Bytes that the tightest of this process's control groups leaves; a limit holds for the groups inside, too."""
    try:
        lines = MEMBERSHIP.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    own, left = CGROUP / next((line[3:].strip("/") for line in lines if line.startswith("0::")), ""), []
    for group in (own, *(group for group in own.parents if group.is_relative_to(CGROUP))):
        with suppress(OSError):
            limit, used, kinds = ((group / f"memory.{name}").read_text("ascii") for name in ("max", "current", "stat"))
            if limit.strip().isdigit():
                # Cached files are given back before anyone is refused, and do not count as used.
                cached = [int(line.split()[1]) for line in kinds.splitlines() if line.startswith("inactive_file ")]
                left.append(max(0, int(limit) - int(used) + sum(cached)))
    return min(left, default=None)


def processor(device: str) -> str:
    """Name of the GPU, or of the CPU as its maker writes it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def is_out_of_memory(error: BaseException) -> bool:
    """Recognise that memory could not be allocated: for a GPU torch has a class, for a CPU only a text."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
