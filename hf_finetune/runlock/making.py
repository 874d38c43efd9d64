"""The lock of a run that is about to train."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_finetune.errors import DataError, Problem
from hf_finetune.model import pretrained
from hf_finetune.runlock import drift, inputs, surroundings
from hf_finetune.runlock.lockfile import Lock, Made, RecipeText, find
from hf_finetune.terminal import phase

if TYPE_CHECKING:
    from pathlib import Path

    from hf_finetune.hardware import Machine
    from hf_finetune.recipe import Recipe
    from hf_finetune.tuning.choices import Choices


def lock(recipe: Recipe, machine: Machine, fingerprint: str, choices: Choices) -> Lock:
    """Everything that a repeat needs to be the same, or to be refused.

    Args:
        recipe: All local files that it names are read, unless the data are streamed.
        machine: With what was chosen for it.
        fingerprint: Of the prepared data.
        choices: What this run's arithmetic depends on besides.

    Raises:
        DataError: A file that was read is gone.
    """
    with phase("hashing what the run reads"):
        try:
            model = inputs.of_model(recipe, pretrained.commit(recipe.model))
            adapter, data = inputs.of_adapter(recipe), inputs.of_data(recipe, asks=True)
        except OSError as error:
            raise DataError(Problem("is gone since the run began; start again", file=str(error.filename))) from error
    return Lock(
        recipe=RecipeText.of(recipe.dump()),
        seed=recipe.training.seed,
        model=model,
        adapter=adapter,
        fingerprint=fingerprint,
        data=data,
        packages=surroundings.packages(recipe, machine),
        hardware=surroundings.decisive(machine),
        driver=surroundings.driver() if machine.device == "cuda" else None,
        git=surroundings.checkout(),
        choices=Made.model_validate(choices.dump()),
    )


def write(lock: Lock, file: Path, *, goes_on: bool) -> None:
    """Write a lock in the place of that of the start before, if there is one.

    Args:
        lock: Of this start.
        file: `run.lock.json` of the run folder.
        goes_on: Whether the run goes on from a checkpoint.

    Raises:
        StorageError: It can't be written.
    """
    (going_on(lock, file) if goes_on else lock).write(file)


def going_on(now: Lock, file: Path) -> Lock:
    """The lock of a run that goes on from a checkpoint: with all that differs from its beginning, and from each start.

    Args:
        now: Of this start.
        file: The lock of the start before.
    """
    before = find(file)
    if before is None:
        return now.model_copy(update={"changed": ["an earlier start left no lock that can be read"]})
    told = [f"{key} {text}" for key, text in drift.between(before, now)]
    return now.model_copy(update={"changed": [*before.changed, *told]})
