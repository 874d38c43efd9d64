"""What a whole recipe tells about a run that may train and yet come to nothing; warnings, as nobody can be sure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from hf_finetune.errors import Problem

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe

ABOVE, BELOW = 20, 100
"""How many times the largest published rate counts as too high, and how small a part of the smallest as too low: far
outside of what can be a matter of model and data. The two numbers are ours, the rates are the adapters'."""
LIKE_ADAM = ("adamw", "adamw_8bit", "adafactor")
"""Optimisers whose steps have the size of the learning rate, whatever that of the gradient."""


def of(recipe: Recipe) -> Iterator[Problem]:
    """Warnings about a recipe that is right in itself."""
    yield from _rate(recipe)
    if not recipe.data.has_validation:
        message = "is not given, so nothing will show whether the model learns or only memorises; name a split, or set "
        yield Problem(message + "data.validation_share: 0.1", key="data.validation")


def _rate(recipe: Recipe) -> Iterator[Problem]:
    rate, usual = recipe.training.learning_rate, recipe.adapter.usual_rates
    if usual is None or recipe.training.optimizer not in LIKE_ADAM:
        return
    spread = _plain(usual.least) if usual.least == usual.most else f"{_plain(usual.least)} to {_plain(usual.most)}"
    told = f"for adapter.kind {recipe.adapter.kind}, published with {spread} ({usual.source})"
    first = f"start with {_plain(usual.most)}"
    if rate > ABOVE * usual.most:
        fault = f"{_plain(rate)} is too high {told}; the loss will hardly fall, {first}"
    elif rate < usual.least / BELOW:
        fault = f"{_plain(rate)} is too low {told}; the model will hardly change, {first}"
    else:
        return
    yield Problem(fault, key="training.learning_rate")


def _plain(rate: float) -> str:
    """`6e-5`, `0.0005`."""
    return f"{rate:g}".replace("e-0", "e-")
