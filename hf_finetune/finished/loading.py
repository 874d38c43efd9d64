"""The weights of a finished run: the base with what was trained, or without."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hf_finetune import model
from hf_finetune.adaptation import labelfile, peftio
from hf_finetune.errors import ModelError, Problem
from hf_finetune.terminal import phase

if TYPE_CHECKING:
    from torch import nn

    from hf_finetune.hardware import Machine
    from hf_finetune.recipe import Recipe

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
        base = model.fresh_base(recipe, _label_options(recipe, folder), machine)
        network = recipe.adapter.load(base, folder)
        _restore_precision(network, folder)
        return _settled(recipe, network, machine, pad)


def base(recipe: Recipe, machine: Machine, pad: int | None, folder: str) -> nn.Module:
    """The base without what was trained; weights that its checkpoint lacks are the trained ones.

    Raises:
        ModelError: It can't be loaded, or lacks something that was not trained.
    """
    with phase("loading the base model"):
        network, gaps = model.fresh_base_and_gaps(recipe, _label_options(recipe, folder), machine)
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
    found = labelfile.options(folder)
    if recipe.task.has_labels and not found:
        message = f"is not there, and {recipe.task.kind} needs it; train the run anew with --restart"
        raise ModelError(Problem(message, file=str(Path(folder) / labelfile.FILE)))
    return found


def _restore_precision(network: nn.Module, folder: str) -> None:
    """Heads as they were trained, in fp32: PEFT rounds them to the dtype of the base when it loads them."""
    from peft.utils import ModulesToSaveWrapper

    wrapped = [(path, module) for path, module in network.named_modules() if isinstance(module, ModulesToSaveWrapper)]
    if not wrapped:
        return
    peftio.heads_in_fp32(network)
    stored = dict(_tensors(folder))
    for path, module in wrapped:
        copy = module.modules_to_save[peftio.ADAPTER]
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
        peftio.bridge(module, outer)
