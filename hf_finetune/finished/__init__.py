"""A finished run, opened for use: its recipe, its labels, its tokenizer, and its model with or without the adapter.

run = open_run("runs/sst2_lora", ["training.precision=fp32"])
network = run.model()
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING, Any

from hf_finetune import hardware, hubreach, model, quiet, runlock, targetsfile
from hf_finetune.errors import CheckpointError, Problem, RecipeError
from hf_finetune.finished import loading, places, samebase
from hf_finetune.finished.serving import Serving
from hf_finetune.recipe import Recipe
from hf_finetune.runfolder import RunFolder
from hf_finetune.schema.roots import outside
from hf_finetune.targetsfile import Kept
from hf_finetune.tasks import Targets
from hf_finetune.terminal import warn

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from hf_finetune.hardware import Machine

__all__ = ["Finished", "Serving", "open_run"]

OPEN = ("task.", "data.", "model.", "speed.", "training.precision=", "training.eval_batch=", "training.deterministic=")
"""Beginnings of overrides that make sense for a model that is trained already."""
FIXED = ("task.kind=", "task.problem=", "task.labels=", "task.label=[", "model.quantization=")
"""Those among them that would make another model, or other labels, of it; the label column counts in evaluation."""


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    folder: RunFolder
    recipe: Recipe
    """As resolved, with the overrides of whoever opened it."""
    machine: Machine
    """This one, with the precision and the attention that the run was made with, where it has them."""
    targets: Targets
    """What the training data said about the labels."""
    tokenizer: PreTrainedTokenizerBase

    def model(self) -> nn.Module:
        """The base with the adapter (or the full model), in eval mode, on the device.

        Raises:
            ModelError: The base or the adapter can't be loaded.
        """
        return loading.adapted(self.recipe, self.machine, self._pad_token(), str(self.folder.adapter))

    def base(self) -> nn.Module:
        """The same without what was trained; a head that the base lacks is the trained one.

        Raises:
            ModelError: The base can't be loaded, or lacks something that was not trained either.
        """
        return loading.base(self.recipe, self.machine, self._pad_token(), str(self.folder.adapter))

    def serve(self, network: nn.Module) -> Serving:
        """The network with the fast paths of training's evaluation, so that it gives the same numbers.

        Args:
            network: What `model` or `base` returned; its modules are changed.
        """
        return Serving.of(network, self.recipe, self.machine, self.targets, self.tokenizer)

    def _pad_token(self) -> int | None:
        token: Any = self.tokenizer.pad_token_id
        return None if token is None else int(token)


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
    if (why := outside(place)) is not None:
        raise RecipeError(Problem(why, file=place))
    folder = RunFolder(place)
    _refuse_unfinished(folder)
    _refuse_foreign(overrides)
    kept = targetsfile.read(folder.targets)
    recipe = places.read(folder, None if kept is None else kept.started_in, overrides)
    recipe = runlock.as_trained(recipe, folder.run_lock)
    hubreach.settle(recipe)
    machine = _as_in_training(folder, recipe, hardware.survey(recipe))
    targets, tokenizer = _targets(folder, recipe, kept), model.load_tokenizer(recipe.model)
    samebase.check(recipe, folder)
    recipe = _dated(recipe, tokenizer)
    return Finished(folder, recipe, machine, targets, tokenizer)


def _dated(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """The recipe with the date that its chat template prints, where the run kept none."""
    today = date.today().isoformat()
    task = recipe.task.on(today, tokenizer)
    if task is not recipe.task:
        warn(
            f"the chat template prints the date, and the run kept none: {today} is printed; task.date=DATE sets another"
        )
    return recipe.model_copy(update={"task": task})


def _refuse_unfinished(folder: RunFolder) -> None:
    if not folder.path.is_dir() or not folder.recipe.is_file():
        what = "holds no run: there is no recipe.yaml in it" if folder.path.is_dir() else "is not there"
        raise RecipeError(Problem(f"{what}; give the run folder, `output` of the recipe", file=str(folder.path)))
    status = _status(folder.status)
    state = status.get("state", "unknown")
    if state == "running":
        raise CheckpointError(Problem("the run is not finished (running); wait for it", file=str(folder.path)))
    if state != "done":
        why = str(status.get("reason") or "").partition("\n")[0]
        told = f"{state}: {why}" if why else state
        message = f"the run is not finished ({told}); the training command goes on with it"
        raise CheckpointError(Problem(message, file=str(folder.path)))
    if not any((folder.adapter / name).is_file() for name in ("adapter_config.json", "config.json")):
        message = "the adapter is not there, though the run is finished; bring it back, or train anew with --restart"
        raise CheckpointError(Problem(message, file=str(folder.adapter)))


def _status(file: Path) -> dict[str, Any]:
    try:
        status: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def _refuse_foreign(overrides: Sequence[str]) -> None:
    strange = [word for word in overrides if not word.startswith(OPEN) or word.startswith(FIXED)]
    if strange:
        key = strange[0].partition("=")[0]
        reason = "can't change once a model is trained; leave it out, or train anew" if key else "is no override"
        raise RecipeError(Problem(reason, file="command line", key=key))


def _targets(folder: RunFolder, recipe: Recipe, kept: Kept | None) -> Targets:
    if kept is not None:
        return kept.targets
    if recipe.task.peft_type != "SEQ_CLS":
        return Targets()
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
