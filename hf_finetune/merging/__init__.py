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

from hf_finetune.merging.options import Options
from hf_finetune.merging.story import merge

__all__ = ["Options", "merge"]
