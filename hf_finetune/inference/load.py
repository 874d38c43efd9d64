"""A finished run, opened for use: its recipe, its labels, its tokenizer, and its model with or without the adapter.

run = open_run("runs/sst2_lora", ["training.precision=fp32"])
network = run.model()
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_finetune import device as device_module
from hf_finetune.adapters import _peft as peft
from hf_finetune.data import sources
from hf_finetune.device import Machine
from hf_finetune.errors import CheckpointError, ModelError, Problem, RecipeError
from hf_finetune.inference import opening
from hf_finetune.log import libraries, phase, warn
from hf_finetune.models import load, pretrained
from hf_finetune.models import paths as models_paths
from hf_finetune.models.paths import Paths
from hf_finetune.recipe import Recipe
from hf_finetune.run import lock as run_lock
from hf_finetune.run.folder import Kept, RunFolder
from hf_finetune.run.lock import File, Input
from hf_finetune.tasks.base import Batch, State, pad_token_of
from hf_finetune.training import locking

# The weights of a finished run: the base with what was trained, or without.

PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's parameters."""


def adapted(recipe: Recipe, machine: Machine, pad: int | None, folder: str) -> nn.Module:
    """The base with the adapter, in eval mode, on the device.

    Args:
        recipe: Names the base.
        machine: Precision, attention and device.
        pad: Id of the pad token.
        folder: The adapter's.

    Raises:
        ModelError: Base or adapter can't be loaded.
    """
    with phase("loading the model"):
        base = load.fresh_base(recipe, _label_options(recipe, folder), machine)
        network = recipe.adapter.load(base, folder)
        _restore_precision(network, folder)
        return _settled(recipe, network, machine, pad)


def base(recipe: Recipe, machine: Machine, pad: int | None, folder: str) -> nn.Module:
    """The base without what was trained; weights that its checkpoint lacks are the trained ones.

    Raises:
        ModelError: It can't be loaded, or lacks something that was not trained.
    """
    with phase("loading the base model"):
        network, gaps = load.fresh_base_and_gaps(recipe, _label_options(recipe, folder), machine)
        found = dict(_trained(folder, gaps))
        lost = sorted(gaps - found.keys())
        if lost:
            message = f"{recipe.model.name} holds no {lost[0]}, and the run did not train it: there is no base to use"
            raise ModelError(Problem(message, key="model.name"))
        with torch.no_grad():
            parameters = dict(network.named_parameters())
            for name, tensor in found.items():
                parameters[name].data = tensor.to(parameters[name].device)
        for path in {name.rpartition(".")[0] for name in found}:
            _cast_to_own_dtype(network.get_submodule(path), machine.base_dtype(frozen=True))
        return _settled(recipe, network, machine, pad)


def _settled(recipe: Recipe, network: nn.Module, machine: Machine, pad: int | None) -> nn.Module:
    """As training evaluates it: eval mode, frozen, on the device, and padding known to a decoder's head."""
    inner: Any = getattr(network, "get_base_model", lambda: network)()
    inner.config.use_cache = False
    if pad is not None:
        inner.config.pad_token_id = pad
    network.requires_grad_(False)
    if recipe.model.quantization is None:
        network.to(machine.device)
    return network.eval()


def _label_options(recipe: Recipe, folder: str) -> dict[str, Any]:
    """What the task gave `from_pretrained`: names and kind of the labels.

    Raises:
        ModelError: The folder does not say.
    """
    found = peft.label_options(folder)
    if recipe.task.has_labels and not found:
        message = f"is not there, and {recipe.task.kind} needs it; train the run anew with --restart"
        raise ModelError(Problem(message, file=str(Path(folder) / peft.LABELS)))
    return found


def _restore_precision(network: nn.Module, folder: str) -> None:
    """Heads as they were trained, in fp32: PEFT rounds them to the dtype of the base when it loads them."""
    from peft.utils import ModulesToSaveWrapper

    wrapped = [(path, module) for path, module in network.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    if not wrapped:
        return
    peft.heads_in_fp32(network)
    stored = dict(_tensors(folder))
    for path, module in wrapped:
        copy = module.modules_to_save[peft.ADAPTER]
        own = {name: stored[f"{path}.{name}"] for name, _ in copy.named_parameters() if f"{path}.{name}" in stored}
        copy.load_state_dict(own, strict=False)


def _trained(folder: str, names: Iterable[str]) -> Iterable[tuple[str, torch.Tensor]]:
    """Those of the parameters that the run trained in full, by their name in the base."""
    wanted = set(names)
    for name, tensor in _tensors(folder):
        plain = name.removeprefix(PREFIX)
        if plain in wanted:
            yield plain, tensor


def _tensors(folder: str) -> Iterable[tuple[str, torch.Tensor]]:
    """Everything in the folder's weight files.

    Raises:
        ModelError: A file can't be read.
    """
    from safetensors import SafetensorError, safe_open

    for file in sorted(Path(folder).glob("*.safetensors")):
        try:
            with safe_open(str(file), "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    yield name, opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(Problem(f"can't be read: {error}", file=str(file))) from error


def _cast_to_own_dtype(module: nn.Module, outer: torch.dtype) -> None:
    """Let an fp32 module take and give the dtype of the model around it, also where there is no autocast."""
    if outer != torch.float32 and next(module.parameters()).dtype == torch.float32:
        peft.bridge(module, outer)


# Whether the base of a finished run is still the one that it was trained on: an adapter fits no other.

KEY = "model.name"
SHOWN = 3
"""Names of files in a message, at most."""


def locked(folder: RunFolder) -> Input | None:
    """The base that a run was trained on; None where its lock can't be read.

    Args:
        folder: The run.
    """
    lock = run_lock.find(folder.run_lock)
    return None if lock is None else lock.model


def check(recipe: Recipe, folder: RunFolder) -> None:
    """Compare the base with the run's lock: local files by content, wherever they lie; the Hub's by name and commit.

    Args:
        recipe: Names the base as it is now; its config is cached where it is the Hub's.
        folder: The run.

    Raises:
        CheckpointError: It is another one.
    """
    was = locked(folder)
    if was is None:
        warn("run.lock.json is not there, or can't be read: whether the base is still the same could not be compared")
        return
    now = locking.of_model(recipe, pretrained.commit(recipe.model))
    if bool(was.source) != bool(now.source):
        kinds = [f"{one.source} on the Hub" if one.source else "a local folder" for one in (was, now)]
        warn(f"the run was trained on {kinds[0]}, and this is {kinds[1]}: whether it is the same could not be compared")
    elif was.source and was.commit and now.source == was.source and not now.commit:
        warn(f"the commit of {now.source} is not known: whether it is still {was.commit[:12]} could not be compared")
    elif (what := _on_hub(was, now) if was.source else _files(was.files, now.files)) is not None:
        raise CheckpointError(Problem(f"the base is not the one that the run was trained on: {what}", key=KEY))


def _on_hub(was: Input, now: Input) -> str | None:
    """What differs between two bases of the Hub; None where nothing that is known does."""
    if was.source != now.source:
        return f"it was {was.source}, is {now.source}; leave model.name out"
    if was.commit and was.commit != now.commit:
        return f"its commit was {was.commit[:12]}, is {str(now.commit)[:12]}; leave model.revision out"
    return None


def _files(was: list[File], now: list[File]) -> str | None:
    """What differs between two folders; None where they hold the same, whatever the files' names."""
    if sorted(file.sha256 for file in was) == sorted(file.sha256 for file in now):
        return None
    before, after = {file.name: file.sha256 for file in was}, {file.name: file.sha256 for file in now}
    differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    shown = ", ".join(f"{name} {_fate(name, before, after)}" for name in differing[:SHOWN])
    more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
    return f"{shown}{more}; put it back, or give model.name= the folder with the same files"


def _fate(name: str, before: dict[str, str], after: dict[str, str]) -> str:
    return "is gone" if name not in after else "is new" if name not in before else "changed"


# A model that answers as it did in the evaluations of its training: the same precision, the same fast paths.

PROBE = (6, 16)
"""Sizes of two rows with which the model is compared with itself, with and without fast paths."""


@dataclass(frozen=True)
class Serving:
    """A network and how it is run."""

    network: Any
    machine: Machine
    paths: Paths

    @classmethod
    def of(cls, network: Any, recipe: Recipe, machine: Machine, targets: State, tokenizer: Any) -> Serving:
        """Install the fast paths that training's evaluation had; see `fast.take`."""
        sizes = [min(size, recipe.data.max_length) for size in PROBE]
        batch = {k: v.to(network.device) for k, v in recipe.task.probe(sizes, tokenizer, targets).items()}
        return cls(network, machine, models_paths.take(network, recipe, machine, targets, batch))

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the network runs without gradients, in the run's precision."""
        with torch.no_grad(), self.machine.autocast():
            yield

    def predict(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Predictions of a batch, as training's evaluation makes them; it may lie anywhere."""
        device, paths = self.network.device, self.paths
        moved = {name: value.to(device) for name, value in batch.items() if name != "row_ids"}
        with self.running():
            return paths.task.predict(paths.forward(self.network), moved, paths.targets)


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
        return adapted(self.recipe, self.machine, pad, folder)

    def base(self) -> nn.Module:
        """The same without what was trained; a head that the base lacks is the trained one.

        Raises:
            ModelError: The base can't be loaded, or lacks something that was not trained either.
        """
        pad, folder = pad_token_of(self.tokenizer), str(self.folder.adapter)
        return base(self.recipe, self.machine, pad, folder)

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
    libraries.hush()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RecipeError("a finished run is used by one process; start it without `accelerate launch`")
    opened = opening.read(place, overrides)
    folder, kept = opened.folder, opened.kept
    recipe = run_lock.as_trained(opened.recipe, folder.run_lock)
    sources.settle(recipe)
    machine = _as_in_training(folder, recipe, device_module.survey(recipe))
    targets, tokenizer = _targets(folder, recipe, kept), pretrained.load_processor(recipe.model, recipe.task)
    check(recipe, folder)
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
    choices = run_lock.choices(folder.run_lock)
    if choices is None or choices.device != machine.device:
        where = (
            "run.lock.json is not there, or damaged" if choices is None else f"the run was made on a {choices.device}"
        )
        warn(f"{where}: precision and attention are those of this machine, numbers may differ in the last digits")
        return replace(machine, attention=load.attention(recipe, machine))
    if recipe.training.precision == "auto":
        machine = replace(machine, precision=choices.value("precision") or machine.precision)
    if recipe.model.attention == "auto":
        machine = replace(machine, attention=choices.value("attention") or machine.attention)
    return replace(machine, attention=load.attention(recipe, machine))
