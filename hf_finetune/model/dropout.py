"""Sets every dropout of a model, wherever its architecture keeps it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig

MARKS = ("dropout", "pdrop", "drop_rate", "drop_path")
"""Parts of the names of dropout probabilities."""


def set_in_config(config: PreTrainedConfig, p: float) -> None:
    """Set every dropout probability of a config and of the configs inside it, before the model is built.

    A null one (BERT's `classifier_dropout`) is set too. LayerDrop, which skips whole layers, is only ever set to 0.
    """
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            set_in_config(value, p)
        elif _is_probability(name, value) or (value is None and "dropout" in name):
            setattr(config, name, p)
        elif "layerdrop" in name and isinstance(value, float) and p == 0.0:
            setattr(config, name, 0.0)


def set_in_modules(model: nn.Module, p: float) -> None:
    """Set every dropout layer, and every attribute of a module that is a dropout probability."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = p
            continue
        for name, value in list(vars(module).items()):
            if _is_probability(name, value):
                setattr(module, name, p)


def _is_probability(name: str, value: Any) -> bool:
    number = isinstance(value, float | int) and not isinstance(value, bool)
    return number and any(mark in name for mark in MARKS)
