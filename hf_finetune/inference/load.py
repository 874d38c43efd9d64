"""Open a finished run: its recipe, its labels, its tokenizer, and its model with or without the adapter.

run = open_run("runs/sst2_lora", ["training.precision=fp32"])
served = run.serve(run.model())
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from hf_finetune import device
from hf_finetune.adapters import _peft as peft
from hf_finetune.adapters.base import Setting
from hf_finetune.data import batches, sources
from hf_finetune.data.job import eval_batch
from hf_finetune.device import Machine
from hf_finetune.errors import CheckpointError, ModelError, Problem, RecipeError
from hf_finetune.inference import opening
from hf_finetune.log import hush, phase, warn
from hf_finetune.models import load, pretrained
from hf_finetune.models import paths as models_paths
from hf_finetune.models.paths import Paths
from hf_finetune.recipe import Recipe
from hf_finetune.run import folder as run_folder
from hf_finetune.run import lock as run_lock
from hf_finetune.run import store
from hf_finetune.run.folder import RunFolder
from hf_finetune.run.lock import Input
from hf_finetune.run.ranks import Ranks
from hf_finetune.tasks.base import Batch, Predictions, State, pad_token_of
from hf_finetune.training import locking, resume, start

Predict = Callable[[Batch], dict[str, torch.Tensor]]  # predictions of a batch; see `Task.predict`
Base = Callable[[Recipe, dict[str, Any], Machine], Any]  # makes a fresh base model; see `models.load.fresh_base`

# PEFT puts this before the names of a model's parameters.
PREFIX = "base_model.model."
# Sizes of two rows on which the model is compared with itself, with and without fast paths; of another length, so that
# padding is seen.
PROBE = (6, 16)


@dataclass(frozen=True)
class Serving:
    """A model that answers as in the evaluations of its training: in the same precision, on the same fast paths."""

    network: Any
    machine: Machine
    paths: Paths

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the network without gradients, in the run's precision."""
        with torch.no_grad(), self.machine.autocast():
            yield

    def predict(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Predict a batch, which may lie on any device."""
        moved = {name: value.to(self.network.device) for name, value in batch.items()}
        with self.running():
            return self.paths.task.predict(self.paths.forward(self.network), moved, self.paths.targets)


@dataclass(frozen=True)
class Finished:
    """A finished run."""

    folder: RunFolder
    recipe: Recipe  # as resolved, with the overrides that it was opened with
    machine: Machine  # this one, with the precision and the attention that the run was made with, where it has them
    targets: State
    tokenizer: Any  # prepares rows: a tokenizer, an image processor or the like
    checkpoint: Path | None = None  # answers in place of what the run saved

    @property
    def place(self) -> Path:
        """The run folder, or the checkpoint in it."""
        return self.checkpoint or self.folder.path

    @property
    def shares_base(self) -> bool:
        """Tell that the model leaves the weights of its base alone, which others may then use, too."""
        adapter = self.recipe.adapter
        return adapter.freezes_base and (self.checkpoint is None or adapter.is_saved_as_trained)

    def model(self, base: Base | None = None) -> nn.Module:
        """Load the base with the adapter, or the full model, in eval mode, on the device.

        Args:
            base: Makes the fresh base; None loads it.

        Raises:
            CheckpointError: The checkpoint is damaged.
        """
        from peft.utils import ModulesToSaveWrapper

        with phase("loading the model"):
            fresh = (base or load.fresh_base)(self.recipe, self._options(), self.machine)
            if self.checkpoint is not None:
                return self._settled(self._of_checkpoint(fresh, self.checkpoint))
            network = self.recipe.adapter.load(fresh, str(self.folder.adapter))
            named = network.named_modules()
            heads = {path: module for path, module in named if isinstance(module, ModulesToSaveWrapper)}
            if heads:
                # Trained in fp32, but PEFT rounds them at load to the dtype of the base.
                peft.heads_in_fp32(network)
                stored = dict(_tensors(self.folder.adapter))
                for path, module in heads.items():
                    copy = module.modules_to_save[peft.ADAPTER]
                    names = {name: f"{path}.{name}" for name, _ in copy.named_parameters()}
                    own = {name: stored[whole] for name, whole in names.items() if whole in stored}
                    copy.load_state_dict(own, strict=False)
            return self._settled(network)

    def _of_checkpoint(self, fresh: Any, checkpoint: Path) -> nn.Module:
        """Put the trained weights of a checkpoint onto a fresh base: what the run would have saved at that step."""
        store.verify(checkpoint)
        adapter, saved = self.recipe.adapter, str(self.folder.adapter)
        if adapter.is_saved_as_trained:
            network = adapter.load(fresh, saved)
            with safe_open(checkpoint / store.TRAINED, "pt") as opened:
                trained = set(opened.keys())
            for name, parameter in network.named_parameters():
                parameter.requires_grad_(name in trained)
            peft.heads_in_fp32(network)
        else:
            steps = json.loads((checkpoint / "trainer_state.json").read_bytes())["max_steps"]
            heads = tuple(peft.stored_config(saved).modules_to_save or ())
            network = adapter.apply(fresh, Setting(self.recipe.task.peft_task, self.tokenizer, steps, heads))
        resume.load_trained(network, adapter, checkpoint)
        adapter.finish(network)
        return network

    def base(self) -> nn.Module:
        """Load the same without what was trained; weights that the base's checkpoint lacks are the trained ones."""
        with phase("loading the base model"):
            network, gaps = load.fresh_base_and_gaps(self.recipe, self._options(), self.machine)
            stored = ((name.removeprefix(PREFIX), tensor) for name, tensor in _tensors(self.folder.adapter))
            found = {name: tensor for name, tensor in stored if name in gaps}
            if lost := sorted(gaps - found.keys()):
                reason = f"{self.recipe.model.name} holds no {lost[0]}, and the run did not train it"
                raise ModelError(Problem(f"{reason}: there is no base to use", key="model.name"))
            parameters = dict(network.named_parameters())
            # A head that was drawn at random says nothing: the base is compared by the trained one.
            for name, tensor in found.items():
                parameters[name].data = tensor.to(parameters[name].device)
            outer = self.machine.base_dtype(frozen=True)
            for path in {name.rpartition(".")[0] for name in found}:
                module = network.get_submodule(path)
                # A head in fp32 has to take the dtype of the model around it, also where there is no autocast.
                if outer != torch.float32 and next(module.parameters()).dtype == torch.float32:
                    peft.bridge(module, outer)
            return self._settled(network)

    def serve(self, network: Any) -> Serving:
        """Install the fast paths of training's evaluation in what `model` or `base` returned, for the same numbers."""
        recipe = self.recipe
        sizes = [min(size, recipe.data.max_length) for size in PROBE]
        probe = recipe.task.probe(sizes, self.tokenizer, self.targets)
        batch = {name: value.to(network.device) for name, value in probe.items()}
        paths = models_paths.take(network, recipe, self.machine, self.targets, batch)
        return Serving(network, self.machine, paths)

    def collate(self, features: list[Any]) -> Batch:
        """Pad encoded rows to one batch."""
        return self.recipe.task.collate(features, self.tokenizer, self.targets)

    def batches(self, encoded: Any, *, all_logits: bool = False) -> Iterator[Batch]:
        """Cut encoded rows into batches as training's evaluation does, longest rows first, with their `row_ids`.

        Args:
            encoded: A list of `Features`, or a data set of them.
            all_logits: The logits of whole batches are held at once, which leaves room for fewer rows.
        """
        task, is_list = self.recipe.task, isinstance(encoded, list)
        most = eval_batch(self.recipe, self.machine, task.vocabulary(self.tokenizer), all_logits=all_logits)
        sizes: Any = [row["size"] for row in encoded] if is_list else batches.lengths_of(encoded)
        stored: Any = None if is_list else batches.Rows(encoded, task)
        for numbers in batches.by_length(sizes, *most):
            rows = [encoded[number] for number in numbers] if is_list else stored.__getitems__(numbers)
            yield {**self.collate(rows), "row_ids": torch.tensor(numbers)}

    def remembering(self, encoded: Any) -> Any:
        """Return a data set of rows that know what the model made of them as training began; see `training.start`."""
        task = self.recipe.task

        def compute(rows: Any) -> dict[str, Any]:
            with phase("loading the model that training began with"):
                began = self.recipe.adapter.start(load.fresh_base(self.recipe, self._options(), self.machine))
            served = self.serve(self._settled(began))

            def look(batch: Batch) -> Batch:
                moved = {name: value.to(served.network.device) for name, value in batch.items()}
                with served.running():
                    return task.start(served.paths.forward(served.network), moved, self.targets)

            made = batches.predicted(self.batches(rows, all_logits=True), look)
            return {name: made[name].astype("float32") for name in made}

        if not task.needs_start or isinstance(encoded, list):
            return encoded
        return start.with_start(encoded, self.recipe, self.machine, compute, Ranks())

    def predictions(
        self, encoded: Any, predict: Predict, shown: Any = None, *, all_logits: bool = False
    ) -> Predictions:
        """Run a model over encoded rows, which `shown` counts; predictions are in their order. See `batches`."""
        encoded = self.remembering(encoded)
        return batches.predicted(self.batches(encoded, all_logits=all_logits), predict, shown)

    def _options(self) -> dict[str, Any]:
        """Read how the task had the base loaded: names and kind of the labels."""
        found = peft.label_options(self.folder.adapter)
        if not found and "id2label" in self.recipe.task.model_options(self.targets):
            message = f"is missing, and {self.recipe.task.kind} needs it; train the run anew with --restart"
            raise ModelError(Problem(message, file=str(self.folder.adapter / peft.LABELS)))
        return found

    def _settled(self, network: nn.Module) -> nn.Module:
        """Prepare a network as training evaluates it: eval mode, frozen, on the device."""
        inner: Any = getattr(network, "get_base_model", lambda: network)()
        # One forward pass a row keeps nothing for the next token; generation asks for the cache by itself.
        inner.config.use_cache = False
        # The head of a decoder that classifies finds the last token by it.
        if (pad := pad_token_of(self.tokenizer)) is not None:
            inner.config.pad_token_id = pad
        network.requires_grad_(False)
        if self.recipe.model.quantization is None:  # bitsandbytes has placed the others
            network.to(self.machine.device)
        return network.eval()


def open_run(place: str, overrides: Sequence[str] = ()) -> Finished:
    """Open a finished run; loads its tokenizer, but no weights.

    Raises:
        RecipeError: See `opening.read`; or this is one of several processes.
        CheckpointError: See `opening.read`; or the run kept no labels, or its base has changed.
        ModelError: The tokenizer can't be had.
    """
    hush()
    # Each rank would answer all rows, and write the same file.
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise RecipeError("a finished run is used by one process; start it without `accelerate launch`")
    recipe, (folder, checkpoint) = opening.read(place, overrides), opening.split(place)
    kept = run_folder.read_targets(folder.targets)  # None in runs of a version that wrote none
    recipe = run_lock.as_trained(recipe, folder.run_lock)
    sources.settle(recipe)
    # The choices of the run's own machine, so that the same rows give the same numbers.
    machine, choices = device.survey(recipe), run_lock.choices(folder.run_lock)
    if choices is not None and choices.device == machine.device:
        machine = choices.onto(machine, recipe)
    else:
        reason = f"the run was made on a {choices.device}" if choices else "run.lock.json is missing or damaged"
        warn(f"{reason}: precision and attention are those of this machine, numbers may differ in the last digits")
    machine = replace(machine, attention=load.attention(recipe, machine))
    targets = State() if kept is None else kept[0]
    if kept is None and "id2label" in recipe.task.model_options(targets):
        message = "is missing: an earlier version made this run and kept no labels; train anew with --restart"
        raise CheckpointError(Problem(message, file=str(folder.targets)))
    tokenizer = pretrained.load_processor(recipe.model, recipe.task)
    check_base(recipe, folder)
    today = date.today().isoformat()
    task = recipe.task.on(today, tokenizer)
    if task is not recipe.task:
        reason = "the chat template prints the date, and the run kept none"
        warn(f"{reason}: it prints {today}; give task.date=YYYY-MM-DD for another")
    return Finished(folder, recipe.model_copy(update={"task": task}), machine, targets, tokenizer, checkpoint)


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Read everything in the folder's weight files."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(str(file), "pt") as opened:
                for name in opened.keys():  # noqa: SIM118 - it is no dict
                    yield name, opened.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise ModelError(Problem(f"can't be read: {error}", file=str(file))) from error


# Is the base still the one that the run was trained on? An adapter fits no other.


def locked(folder: RunFolder) -> Input | None:
    """Look up the base that a run was trained on; None where its lock can't be read."""
    lock = run_lock.find(folder.run_lock)
    return None if lock is None else lock.model


def check_base(recipe: Recipe, folder: RunFolder) -> None:
    """Compare the base with the run's lock: local files by content, wherever they lie; the Hub's by name and commit.

    Raises:
        CheckpointError: It is another one.
    """
    was = locked(folder)
    if was is None:
        warn("run.lock.json is missing or damaged: the base could not be compared with that of the training")
        return
    now = locking.of_model(recipe, pretrained.commit(recipe.model))
    if bool(was.source) != bool(now.source):
        kinds = [f"{one.source} on the Hub" if one.source else "a local folder" for one in (was, now)]
        warn(f"the run was trained on {kinds[0]}, and this is {kinds[1]}: they could not be compared")
    elif was.source and was.commit and now.source == was.source and not now.commit:
        warn(f"the commit of {now.source} is not known: it could not be compared with the run's {was.commit[:12]}")
    else:
        # Local files count by their contents, wherever they lie and whatever they are called.
        same = sorted(file.sha256 for file in was.files) == sorted(file.sha256 for file in now.files)
        known = was if was.commit else was.model_copy(update={"commit": now.commit})
        changes = [] if was.files and same else list(run_lock.changed_input(known, now))
        if changes:
            hint = (
                "leave model.name and model.revision out" if was.source else "or give model.name= the folder as it was"
            )
            reason = f"the base is not the one that the run was trained on: {'; '.join(changes)}, {hint}"
            raise CheckpointError(Problem(reason, key="model.name"))
