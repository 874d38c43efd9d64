"""A finished run, opened for use: its recipe, its labels, its tokenizer, and its model with or without the adapter.

run = open_run("runs/sst2_lora", ["training.precision=fp32"])
network = run.model()
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from hf_finetune import hardware, hubreach, model, opening, quiet, runlock
from hf_finetune.errors import CheckpointError, Problem, RecipeError
from hf_finetune.finished import loading, samebase
from hf_finetune.finished.serving import Serving
from hf_finetune.tasks.base import State, pad_token_of
from hf_finetune.terminal import warn

if TYPE_CHECKING:
    from torch import nn

    from hf_finetune.hardware import Machine
    from hf_finetune.recipe import Recipe
    from hf_finetune.runfolder import RunFolder
    from hf_finetune.targetsfile import Kept

__all__ = ["Finished", "Serving", "open_run"]


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    folder: RunFolder
    recipe: Recipe
    """As resolved, with the overrides of whoever opened it."""
    machine: Machine
    """This one, with the precision and the attention that the run was made with, where it has them."""
    targets: State
    """What the training data said about the labels."""
    tokenizer: Any
    """What prepares rows: a tokenizer, an image processor or the like."""

    def model(self) -> nn.Module:
        """The base with the adapter (or the full model), in eval mode, on the device.

        Raises:
            ModelError: The base or the adapter can't be loaded.
        """
        pad, folder = pad_token_of(self.tokenizer), str(self.folder.adapter)
        return loading.adapted(self.recipe, self.machine, pad, folder)

    def base(self) -> nn.Module:
        """The same without what was trained; a head that the base lacks is the trained one.

        Raises:
            ModelError: The base can't be loaded, or lacks something that was not trained either.
        """
        pad, folder = pad_token_of(self.tokenizer), str(self.folder.adapter)
        return loading.base(self.recipe, self.machine, pad, folder)

    def serve(self, network: nn.Module) -> Serving:
        """The network with the fast paths of training's evaluation, so that it gives the same numbers.

        Args:
            network: What `model` or `base` returned; its modules are changed.
        """
        return Serving.of(network, self.recipe, self.machine, self.targets, self.tokenizer)


def open_run(place: str, overrides: Sequence[str] = ()) -> Finished:
    """Open a finished run; loads its tokenizer, but no weights.

    Args:
        place: The run folder.
        overrides: Each `key.path=value`; keys of which the trained model depends are refused.

    Raises:
        RecipeError: There is no run, it lies outside `HF_FINETUNE_ROOT`, an override is wrong, or this is one of
            several processes.
        CheckpointError: The run is not finished, its adapter is missing, it is of a version that kept no labels, or its
            base is another one now.
        ModelError: The tokenizer can't be had.
    """
    quiet.hush()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RecipeError("a finished run is used by one process; start it without `accelerate launch`")
    opened = opening.read(place, overrides)
    folder, kept = opened.folder, opened.kept
    recipe = runlock.as_trained(opened.recipe, folder.run_lock)
    hubreach.settle(recipe)
    machine = _as_in_training(folder, recipe, hardware.survey(recipe))
    targets, tokenizer = _targets(folder, recipe, kept), model.load_processor(recipe.model, recipe.task)
    samebase.check(recipe, folder)
    recipe = _dated(recipe, tokenizer)
    return Finished(folder, recipe, machine, targets, tokenizer)


def _dated(recipe: Recipe, tokenizer: Any) -> Recipe:
    """The recipe with the date that its chat template prints, where the run kept none."""
    today = date.today().isoformat()
    task = recipe.task.on(today, tokenizer)
    if task is not recipe.task:
        kept = "the chat template prints the date, and the run kept none"
        warn(f"{kept}: it prints {today}; give task.date=YYYY-MM-DD for another")
    return recipe.model_copy(update={"task": task})


def _targets(folder: RunFolder, recipe: Recipe, kept: Kept | None) -> State:
    if kept is not None:
        return kept.targets
    if not recipe.task.has_labels:
        return State()
    message = "is not there: an earlier version made this run, and did not keep its labels; train anew with --restart"
    raise CheckpointError(Problem(message, file=str(folder.targets)))


def _as_in_training(folder: RunFolder, recipe: Recipe, machine: Machine) -> Machine:
    """The machine with what was chosen for the run, so that the same rows give the same numbers."""
    choices = runlock.choices(folder.run_lock)
    if choices is None or choices.device != machine.device:
        where = (
            "run.lock.json is not there, or damaged" if choices is None else f"the run was made on a {choices.device}"
        )
        warn(f"{where}: precision and attention are those of this machine, numbers may differ in the last digits")
        return replace(machine, attention=model.attention(recipe, machine))
    if recipe.training.precision == "auto":
        machine = replace(machine, precision=choices.value("precision") or machine.precision)
    if recipe.model.attention == "auto":
        machine = replace(machine, attention=choices.value("attention") or machine.attention)
    return replace(machine, attention=model.attention(recipe, machine))
