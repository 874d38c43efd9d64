"""A finished run becomes a model folder that needs neither PEFT nor this project, and what is made of that folder.

weights     the adapter merged into full weights, by PEFT
folder      the folder: shards, config, tokenizer; whole or not there
rows        real rows, on which everything is compared
scoring     how far logits are apart, and the task's metrics
plain       the folder as plain transformers loads it
quantised   the same with int8 or int4 weights (torchao)
onnxfile    the same as an ONNX file, run by onnxruntime
report      export.json, and what is said
story       all of it in order
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_finetune.merging.options import Options

if TYPE_CHECKING:
    from hf_finetune.merging.report import Report

__all__ = ["Options", "merge"]


def merge(place: str, options: Options, overrides: Sequence[str] = ()) -> Report:
    """Make a model folder of a finished run; see `story.merge`, for which alone torch is imported."""
    from hf_finetune.merging import story

    return story.merge(place, options, overrides)
