"""What a run depends on besides recipe, model and data: packages, machine, checkout. No path, user or host in it."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hf_finetune import __version__, hardware, resources
from hf_finetune.runlock import lockfile
from hf_finetune.runlock.lockfile import Git

if TYPE_CHECKING:
    from hf_finetune.hardware import Machine
    from hf_finetune.recipe import Recipe

PACKAGES = (
    "transformers", "peft", "accelerate", "datasets", "tokenizers", "numpy", "safetensors", "tensorboardX",
    "huggingface_hub", "scikit-learn", "scipy",
)  # fmt: skip
"""Those that take part in every run, besides torch and this one."""
GIT_SECONDS = 10
"""How long git may take."""


def packages(recipe: Recipe, machine: Machine) -> dict[str, str]:
    """Versions of what this run uses, by name."""
    used = {
        "bitsandbytes": recipe.model.quantization is not None or recipe.training.optimizer == "adamw_8bit",
        "flash_attn": machine.attention.startswith("flash_attention"),
        "deepspeed": bool(machine.zero_stage),
    }
    found = {"python": platform.python_version(), "hf_finetune": __version__, "torch": str(torch.__version__)}
    if machine.device == "cuda" and torch.version.cuda:
        found["cuda"] = str(torch.version.cuda)
    for name in (*PACKAGES, *(name for name, is_used in used.items() if is_used)):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def decisive(machine: Machine) -> dict[str, str | int | bool | None]:
    """What of a machine decides bits.

    Another processor has other kernels; other threads and ranks add in another order, and each rank draws random
    numbers of its own.
    """
    return {
        "device": machine.device,
        "processor": resources.processor(machine.device),
        "stepping": _stepping() if machine.device == "cpu" else None,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "bf16": _has_bf16(machine),
        "ranks": machine.world_size,
        "ranks_a_node": machine.local_world_size,
        "threads": machine.threads,
        "sharded": machine.is_sharded,
    }


def is_same_memory(file: Path, machine: Machine) -> bool:
    """Whether a run that left a lock had as much memory as it has here, as far as can be told by device and ranks.

    Args:
        file: `run.lock.json`; one that can't be read tells of no other machine.
        machine: This one.
    """
    was = lockfile.find(file)
    if was is None:
        return True
    now = decisive(machine)
    return all(was.hardware.get(name) == now[name] for name in ("processor", "ranks", "ranks_a_node", "sharded"))


def driver() -> str | None:
    """Version of the NVIDIA driver, where there is one."""
    with suppress(OSError):
        said = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        found = re.search(r"Kernel Module\D*([\d.]+)", said)
        return found[1] if found else None
    return None


def checkout() -> Git | None:
    """Commit of the working directory, and whether tracked files differ from it; None outside a checkout."""
    commit = _git("rev-parse", "--verify", "HEAD")
    if commit is None or not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        return None
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return Git(commit=commit, dirty=None if changes is None else bool(changes))


def _git(*words: str) -> str | None:
    """What git says; None where it fails, hangs or is not installed."""
    program = shutil.which("git")
    if program is None:
        return None
    # A checkout may name a program as its file system monitor.
    command = [program, "-c", "core.fsmonitor=false", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=GIT_SECONDS)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _stepping() -> str | None:
    """Which of several processors of one name this is, as Linux knows it on x86."""
    with suppress(OSError):
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("\n\n")[0]
        found = dict(re.findall(r"^(cpu family|model|stepping)\s*: (\w+)$", first, re.MULTILINE))
        return ", ".join(f"{name} {value}" for name, value in found.items()) or None
    return None


def _has_bf16(machine: Machine) -> bool:
    if machine.device == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return machine.device == "cpu" and hardware.cpu_has_bf16()
