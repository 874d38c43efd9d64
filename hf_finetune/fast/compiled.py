"""The layers of a model, compiled by torch where they train: one graph, made once, for all layers of a kind."""

from __future__ import annotations

import os
import shutil
from functools import partial
from typing import Any

import torch


def fits(base: Any) -> bool:
    """Make sure that compiled layers of a pretrained model, with its adapter's inside, would learn the same."""
    # Dropout would break the graph into pieces, and draw other random numbers.
    layers = _layers(base)
    drops = any(module.p for layer in layers for module in layer.modules() if isinstance(module, torch.nn.Dropout))
    config = base.config.get_text_config()
    names = ("attention_dropout", "attention_probs_dropout_prob", "hidden_dropout", "resid_pdrop")
    return bool(layers) and not drops and not any(getattr(config, name, 0.0) for name in names)


def has_compiler() -> bool:
    """Look for a C++ compiler, which torch needs to compile for a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX"), "g++", "clang++", "c++") if name)


def install(base: Any) -> list[torch.nn.Module]:
    """Let the layers of a pretrained model be compiled at their next training step; those that are.

    Evaluation and generation take the plain way: they would each need graphs of their own.
    """

    def either(layer: torch.nn.Module, plain: Any, compiled: Any, *arguments: Any, **options: Any) -> Any:
        trains = layer.training and torch.is_grad_enabled()
        return (compiled if trains else plain)(*arguments, **options)

    layers = _layers(base)
    for layer in layers:
        plain = layer.forward
        layer.forward = partial(either, layer, plain, torch.compile(plain, dynamic=True))
    return layers


def _layers(base: Any) -> list[torch.nn.Module]:
    """The modules that transformers never splits among devices: the repeated layers."""
    kinds = set(base._no_split_modules or ())
    found = [module for module in base.modules() if type(module).__name__ in kinds]
    return found if len(found) > 1 else []
