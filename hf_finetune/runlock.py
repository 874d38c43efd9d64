"""`run.lock.json`: what a run was made from and on, and what was chosen for it by measuring."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hf_finetune.errors import Problem, StorageError
from hf_finetune.runfolder import write_atomically
from hf_finetune.tuning.choices import Choices

if TYPE_CHECKING:
    from pathlib import Path

    from hf_finetune.checkpoints import Facts
    from hf_finetune.recipe import Recipe

VERSION = 1


def write(file: Path, recipe: Recipe, facts: Facts, environment: dict[str, str], choices: Choices) -> None:
    """Write the lock of a run, anew at each start.

    Args:
        file: `run.lock.json` of the run folder.
        recipe: Names model and data, and the seed.
        facts: Hash of the recipe, fingerprint of the data, commit or hash of the model.
        environment: Versions of packages, and the machine, by name.
        choices: What this run's arithmetic depends on besides.

    Raises:
        StorageError: It can't be written.
    """
    lock = {
        "version": VERSION,
        "recipe": facts.recipe,
        "model": {"name": recipe.model.name, "revision": recipe.model.revision, "identity": facts.model},
        "data": {"fingerprint": facts.data},
        "seed": recipe.training.seed,
        "environment": environment,
        "choices": choices.dump(),
    }
    try:
        write_atomically(file, json.dumps(lock, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise StorageError(Problem(f"{file} can't be written: {error.strerror}", key="output")) from error


def choices(file: Path) -> Choices | None:
    """What was chosen when a run began; None where its lock is not there, or is damaged."""
    try:
        lock: Any = json.loads(file.read_text(encoding="utf-8"))
        return Choices.read(lock["choices"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
