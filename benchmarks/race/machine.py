"""The machine: what it is, what runs on it, and how fast it multiplies matrices."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers")
SIZES = (1024, 2048, 4096)
SECONDS = 1.0
"""How long each size is repeated, twice at least."""


def cores() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict[str, Any]:
    """Facts for the head of the table; nothing that tells who or where."""
    import torch

    return {
        "cpu": _cpu(),
        "cores": cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "commit": _commit(),
        "peaks": peaks(),
    }


def load() -> float:
    """Load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def has_gpu() -> bool:
    """Whether torch finds a CUDA device."""
    import torch

    return bool(torch.cuda.is_available())


def peaks() -> dict[str, float]:
    """FLOP/s of the fastest square product, for each arithmetic, with all threads."""
    import torch

    torch.set_num_threads(cores())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return {name: max(_rate(size, dtype, device) for size in SIZES) for name, dtype in kinds.items()}


def _rate(size: int, dtype: Any, device: str) -> float:
    import torch

    one = torch.randn(size, size, generator=torch.Generator(device).manual_seed(0), device=device).to(dtype)
    out = torch.empty_like(one)
    wait: Callable[[], None] = torch.cuda.synchronize if device == "cuda" else _nothing_runs_on
    best, tries, began = float("inf"), 0, time.perf_counter()
    while tries < 3 or time.perf_counter() - began < SECONDS:
        wait()
        started = time.perf_counter()
        torch.mm(one, one, out=out)
        wait()
        best, tries = min(best, time.perf_counter() - started), tries + 1
    return 2.0 * size**3 / best


def _nothing_runs_on() -> None:
    """A CPU's products are done when the call returns."""


def _cpu() -> str:
    """Model name, and the matrix units that matter, where the kernel tells."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set(facts.get("flags", "").split())
    units = [name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in flags][:1]
    family = f"family {facts['cpu family']}, model {facts['model']}" if "cpu family" in facts else ""
    return ", ".join(part for part in (facts.get("model name") or platform.processor(), family, *units) if part)


def _commit() -> str | None:
    try:
        words = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
