"""What was measured before: one small file for each machine, model and shape, beside the cache of tokenised data."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune import __version__, resources
from hf_finetune.data import cache
from hf_finetune.runfolder import write_atomically

if TYPE_CHECKING:
    from hf_finetune.tasks.base import Batch
    from hf_finetune.tuning.bench import Bench

RECIPE: Any = {
    "adapter": True,
    "speed": True,
    "model": {"quantization", "dropout"},
    "data": {"packing"},
    "training": {"deterministic"},
}
"""Keys that change how long a step takes, or what it may be made of."""
STEP = 32
"""Tokens of a row that count as the same shape."""


class Memo:
    """Where the measurements of one question are kept.

    Args:
        question: What is measured.
        bench: The run: its machine, model, adapter, precision.
        batches: What it is measured on.
    """

    def __init__(self, question: str, bench: Bench, batches: list[Batch]) -> None:
        facts = {
            "question": question,
            "processor": resources.processor(bench.machine.device),
            "threads": bench.machine.threads,
            "ranks": bench.machine.local_world_size,
            "precision": bench.machine.precision,
            "versions": [__version__, *(version(package) for package in ("torch", "transformers", "peft"))],
            "model": bench.base.config.to_json_string(use_diff=False),
            "recipe": bench.recipe.model_dump(mode="json", include=RECIPE),
            "task": bench.recipe.task.kind,
            "checkpointing": bench.machine.activation_checkpointing,
            "shapes": [_shape(batch) for batch in batches],
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        self.file = cache.root(None) / "tuning" / f"{question}-{key[:32]}.json"

    def recall(self) -> dict[str, float] | None:
        """Seconds by name; None where nothing, or nothing readable, is kept."""
        try:
            kept: Any = json.loads(self.file.read_text(encoding="utf-8"))
            return {str(name): float(seconds) for name, seconds in kept.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def keep(self, seconds: dict[str, float]) -> None:
        """For the next run; where nothing can be written, that one measures again."""
        with suppress(OSError):
            Path(self.file.parent).mkdir(parents=True, exist_ok=True)
            write_atomically(self.file, json.dumps(seconds) + "\n")


def _shape(batch: Batch) -> tuple[int, int]:
    rows, tokens = batch["input_ids"].shape
    return rows, -(-tokens // STEP) * STEP
