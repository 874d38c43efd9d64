"""Features that the model gives each row as training begins: computed once, kept in the cache, added to the rows.

A task whose loss compares the model with its start (`Task.needs_start`) so needs no second model in memory, and no
second forward pass a step. The cache holds one file a split, `start/<key>.npz`, by a hash of the model, of the adapter
that is trained further, of how the machine computes, and of the rows as they are encoded: runs that differ in anything
else, such as `task.beta`, find it there.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from hf_finetune.config.paths import cache_folder
from hf_finetune.data.job import Job
from hf_finetune.device import Machine
from hf_finetune.log import phase
from hf_finetune.models.pretrained import commit
from hf_finetune.recipe import Recipe
from hf_finetune.run.files import write_atomically, writing
from hf_finetune.run.ranks import Ranks
from hf_finetune.tasks.base import BOOKKEEPING
from hf_finetune.training import locking

Array = np.ndarray[Any, Any]
# Columns of encoded rows that are not for the model.
OTHERS = {*BOOKKEEPING, "row"}
# Rows that are hashed at a time.
TOGETHER = 10_000


def remember(trainer: Any, ranks: Ranks) -> Job:
    """Have every row of a `FinetuneTrainer` know the start; every rank calls it before anything is trained or restored.

    All ranks share the rows; a task that needs no start keeps its job.
    """
    job: Job = trainer.job
    prepared, machine, task = job.prepared, job.machine, job.task
    if not task.needs_start:
        return job
    adapted, forward = trainer.bare_model, trainer.paths.forward(trainer.bare_model)
    was_training = adapted.training

    def compute(encoded: Any) -> dict[str, Array]:
        own = []
        for batch in trainer.get_eval_dataloader(encoded):
            numbers: list[int] = batch.pop("row_ids").tolist()
            moved = {name: value.to(trainer.args.device) for name, value in batch.items()}
            with torch.no_grad(), machine.autocast():
                found = task.start(forward, moved, job.targets)
            own.append((numbers, {name: value.float().cpu().numpy() for name, value in found.items()}))
        return _ordered([part for rank in ranks.gather(own) for part in rank], len(encoded))

    adapted.eval()
    try:
        with phase("looking at the rows with the model that training begins with"):
            splits = {
                name: with_start(encoded, job.recipe, machine, compute, ranks)
                for name in ("train", "validation", "test")
                if (encoded := getattr(prepared, name)) is not None
            }
    finally:
        adapted.train(was_training)
    trainer.job = job = job.remembering(replace(prepared, **splits))
    trainer.train_dataset, trainer.eval_dataset = job.train, job.validation
    return job


def with_start(
    encoded: Any, recipe: Recipe, machine: Machine, compute: Callable[[Any], dict[str, Array]], ranks: Ranks
) -> Any:
    """Return encoded rows with the features of `Task.start`, from the cache or computed and put there.

    Args:
        encoded: A data set of rows.
        recipe: Names the model, and the task.
        machine: Its precision and attention decide the last digits.
        compute: Makes the features, (N, ...) each; every rank calls it alike.
        ranks: Where one of them finds nothing, all compute.
    """
    file = cache_folder(recipe.data.cache) / "start" / f"{_key(encoded, recipe, machine)}.npz"
    found = _read(file)
    if not all(ranks.gather(found is not None)) or found is None:
        found = compute(encoded)
        if ranks.local_rank == 0:
            held = io.BytesIO()
            np.savez(held, **found)  # type: ignore[arg-type]
            with writing(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(file, held.getvalue())
    for name, values in found.items():
        encoded = encoded.add_column(name, list(values.astype(np.float32)))
    return encoded


def _read(file: Path) -> dict[str, Array] | None:
    with suppress(OSError, ValueError, zipfile.BadZipFile), np.load(file, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
    return None


def _key(encoded: Any, recipe: Recipe, machine: Machine) -> str:
    digest, names = hashlib.sha256(), sorted(set(encoded.column_names) - OTHERS)
    rows = encoded.select_columns(names).with_format("arrow")
    for first in range(0, len(rows), TOGETHER):
        part = rows[first : first + TOGETHER]
        for name in names:
            values = part[name]
            while str(values.type).startswith(("list", "large_list")):
                digest.update(pc.list_value_length(values).to_numpy().tobytes())
                values = pc.list_flatten(values)
            digest.update(values.to_numpy().tobytes())
    adapter = locking.of_adapter(recipe)
    facts = {
        "model": locking.of_model(recipe, commit(recipe.model)).model_dump(mode="json"),
        "quantization": recipe.model.quantization,
        "adapter": None if adapter is None else adapter.model_dump(mode="json"),
        "frozen": recipe.adapter.freezes_base,
        "machine": [machine.device, machine.precision, machine.attention, torch.__version__],
        "features": [recipe.task.kind, names, recipe.task.partner(len(encoded))],
        "rows": digest.hexdigest(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _ordered(parts: list[tuple[list[int], dict[str, Array]]], rows: int) -> dict[str, Array]:
    """Return features of rows in their order, from batches of them; rows that only fill a rank are left out."""
    numbers = np.concatenate([numbers for numbers, _ in parts])
    found = {}
    for name in parts[0][1]:
        values = np.concatenate([part[name] for _, part in parts])
        found[name] = np.empty((rows, *values.shape[1:]), dtype=np.float32)
        found[name][numbers[numbers >= 0]] = values[numbers >= 0]
    return found
