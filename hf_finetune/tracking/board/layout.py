"""The Custom Scalars tab: curves that belong together on one chart."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from hf_finetune.tracking.board import margins, tags

if TYPE_CHECKING:
    from tensorboardX.proto.summary_pb2 import Summary

    from hf_finetune.recipe import Recipe

Charts = dict[str, list[str | list[str]]]
SECONDS = ("seconds_data", "seconds_forward", "seconds_backward", "seconds_optimizer")


def layout(recipe: Recipe) -> Summary:
    """Learning curves, the margin of the loss, speed, and classes; TensorBoard reads tags as regular expressions."""
    from tensorboardX import summary

    curves = {"loss (train, validation)": _lines("train/loss", "eval/loss", "final/loss")}
    for metric in headline(recipe):
        if metric != "loss":
            curves[f"{metric} (validation)"] = _lines(f"eval/{metric}", f"final/{metric}")
    margin: Charts = {"loss on validation, 95 % interval": ["Margin", [margins.VALUE, margins.LOWER, margins.UPPER]]}
    speed = {
        "seconds of a step": _lines(*(f"train/{name}" for name in SECONDS)),
        "gradient norm before and after clipping": _lines("train/grad_norm", "train/grad_norm_clipped"),
        "share of the peak, share of padding": _lines("train/matmul_share", "train/padding_share"),
    }
    classes: Charts = {name: ["Multiline", [f"eval_per_class/{name}/"]] for name in tags.PER_CLASS[:3]}
    return summary.custom_scalars(
        {"learning curves": curves, "margins": margin, "speed and stability": speed, "classes": classes}
    )


def headline(recipe: Recipe) -> list[str]:
    """The task's metrics that are worth a look, those that this problem has."""
    return [metric for metric in recipe.task.headline if metric in recipe.task.best_metrics]


def _lines(*names: str) -> list[str | list[str]]:
    return ["Multiline", [f"^{re.escape(name)}$" for name in names]]
