"""Records made once a process: the data that the model learns from, and the machine that it learns on."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_finetune.batching import lengths_of
from hf_finetune.hardware import Machine
from hf_finetune.records import Record

if TYPE_CHECKING:
    from hf_finetune.data import Prepared

BINS = 32
"""Bins of the lengths; the last one takes the longest too."""
FATES = ("rows", "kept", "cut", "dropped", "untrained", "empty", "unused", "tokens", "trained")
"""Counts of the rows of a split, as in `SplitReport`."""
PACKAGES = (
    "hf_finetune", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "tensorboardX", "numpy",
    "bitsandbytes", "deepspeed", "flash_attn",
)  # fmt: skip


def record(prepared: Prepared) -> Record:
    """Record `data`: tokens a row after cutting, in bins that all splits share, labels, and what became of the rows.

    The lengths of a stream are not known.
    """
    splits = {"train": prepared.train, "validation": prepared.validation, "test": prepared.test}
    lengths = {name: lengths_of(rows) for name, rows in splits.items() if hasattr(rows, "column_names")}
    longest = max((int(found.max(initial=0)) for found in lengths.values()), default=0)
    step = max(1, -(-(longest + 1) // BINS))
    edges = np.arange(0, longest + 1 + step, step)
    counts = {f"lengths.{name}": np.histogram(found, edges)[0].astype(np.int64) for name, found in lengths.items()}
    reports = {name: asdict(report) for name, report in prepared.reports.items()}
    facts: dict[str, Any] = {
        "labels": {name: dict(found.labels) for name, found in prepared.facts.items()},
        **{fate: {name: report[fate] for name, report in reports.items()} for fate in FATES},
    }
    return Record("data", "train", 0, {"edges": edges.astype(np.int64), **counts}, facts)


def environment(machine: Machine, step: int) -> Record:
    """Record `environment`: versions of packages, and the machine.

    Args:
        machine: This run's.
        step: Where the process begins.
    """
    import torch

    devices = platform.processor() or platform.machine()
    if machine.device == "cuda":
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        devices = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    table = {
        "machine": machine.describe(),
        "devices": devices,
        "cores": str(os.cpu_count()),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            table[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        table["cuda"] = str(torch.version.cuda)
    return Record("environment", "train", step, facts={"table": table, "time": round(time.time(), 3)})
