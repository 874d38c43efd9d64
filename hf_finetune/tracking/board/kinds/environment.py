"""`environment`: with what a run was made. Versions of packages, and the machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from tensorboardX import summary

from hf_finetune.records import Record
from hf_finetune.tracking.board.markdown import table

if TYPE_CHECKING:
    from tensorboardX.proto.summary_pb2 import Summary

    from hf_finetune.hardware import Machine

KIND = "environment"
PACKAGES = (
    "hf_finetune", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "tensorboardX", "numpy",
    "bitsandbytes", "deepspeed", "flash_attn",
)  # fmt: skip


def look(machine: Machine, step: int) -> Record:
    """What a process runs on.

    Args:
        machine: This run's.
        step: Where the process begins.
    """
    import torch

    facts = {
        "machine": machine.describe(),
        "devices": _devices(machine.device, torch),
        "cores": str(os.cpu_count()),
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{package: found for package in PACKAGES if (found := _version(package)) is not None},
    }
    if torch.version.cuda:
        facts["cuda"] = str(torch.version.cuda)
    return Record(KIND, "train", step, facts={"table": facts, "time": round(time.time(), 3)})


def draw(record: Record) -> Iterator[Summary]:
    """One table."""
    yield summary.text("environment", table(("", ""), record.facts["table"].items()))


def _devices(device: str, torch: object) -> str:
    if device == "cuda":
        cuda = torch.cuda  # type: ignore[attr-defined]
        names = [cuda.get_device_name(index) for index in range(cuda.device_count())]
        return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
