"""The merged model as one ONNX file with fp32 weights, made by torch.onnx, and run by onnxruntime.

Inputs are what the run's batches have: `input_ids`, `attention_mask`, perhaps `token_type_ids`, each (batch, sequence)
of any size; the output is `logits`, of a language model without a cache.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hf_finetune.errors import ModelError
from hf_finetune.merging import folder as folders
from hf_finetune.merging import plain, scoring

if TYPE_CHECKING:
    from collections.abc import Sequence

    from hf_finetune.finished import Finished
    from hf_finetune.merging.scoring import Logits, Predict
    from hf_finetune.tasks.base import Batch

FILE = "onnx/model.onnx"
"""Where ONNX files of a model folder are looked for."""
AXES = ("batch", "sequence")
ONE_FILE = 1_500_000_000
"""Bytes of weights from which they lie in a file of their own: a protobuf holds 2 GiB."""
TOLERANCE = 1e-3
"""Largest difference of logits between torch and onnxruntime in fp32, as a share of the largest: sums run in other
orders, and some functions are other approximations."""


def write(source: Path, run: Finished, probes: Sequence[Batch], file: Path) -> float:
    """Export the model in a folder, run the file, and compare logits with torch's.

    Args:
        source: The merged model.
        run: Says which class.
        probes: Batches without labels; the first has the names of the inputs.
        file: Where to.

    Returns:
        The largest difference of logits, as a share of the largest.

    Raises:
        ModelError: torch.onnx can't export it, or onnxruntime gives other logits.
        StorageError: The disk does not take it.
    """
    # Eager attention is made of operations that every version of ONNX has.
    network = plain.load(source, run, dtype=torch.float32, attn_implementation="eager").to("cpu")
    expected = scoring.logits(plain.logits_of(network), probes)
    _export(network, list(probes[0]), file)
    del network
    apart = scoring.difference(expected, scoring.logits(session(file), probes))
    scoring.refuse(apart, TOLERANCE, "the ONNX file is not the merged model", "leave --onnx out, and report it")
    return apart


def session(file: Path) -> Logits:
    """How onnxruntime gives logits from a file, on the CPU.

    Raises:
        ModelError: onnxruntime does not take it.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as failures

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    try:
        made = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    except (failures.Fail, failures.InvalidGraph, failures.NotImplemented, failures.RuntimeException) as error:
        raise ModelError(f"onnxruntime does not take the ONNX file: {' '.join(str(error).split())[:300]}") from error
    names = [one.name for one in made.get_inputs()]

    def run(batch: Batch) -> torch.Tensor:
        return torch.from_numpy(made.run(None, {name: batch[name].cpu().numpy() for name in names})[0])

    return run


def predictor(file: Path, run: Finished) -> Predict:
    """Predictions by the file."""
    return scoring.predictor(session(file), run)


class _Positional(nn.Module):
    """The model with its inputs by position, as torch.onnx wants them, and logits alone."""

    def __init__(self, network: Any, names: list[str]) -> None:
        super().__init__()
        self.network, self.names = network, names
        self.options = {"use_cache": False} if network.can_generate() else {}

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits: torch.Tensor = self.network(**dict(zip(self.names, values, strict=True)), **self.options).logits
        return logits


def _export(network: Any, names: list[str], file: Path) -> None:
    # Two rows of another length each, so that no size is taken for a constant.
    example = {name: torch.ones(2, 9, dtype=torch.long) for name in names}
    example["attention_mask"][1, 5:] = 0
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    free = dict.fromkeys(range(len(AXES)), torch.export.Dim.DYNAMIC)
    size = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program: Any = torch.onnx.export(
                _Positional(network, names),
                tuple(example[name] for name in names),
                dynamo=True,
                dynamic_shapes={"values": tuple(dict(free) for _ in names)},
                input_names=names,
                output_names=["logits"],
                verbose=False,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            reason = " ".join(str(error.__cause__ or error).split())[:300]
            raise ModelError(f"torch.onnx can't export this model: {reason}; leave --onnx out") from error
    _name_axes(program)
    with folders.reported(file):
        file.parent.mkdir(parents=True)
        program.save(str(file), external_data=size > ONE_FILE)


def _name_axes(program: Any) -> None:
    """Call the free axes `batch` and `sequence`: torch names them by numbers of its own."""
    graph = program.model.graph
    known: dict[str, str] = {}
    for value in graph.inputs:
        known |= {str(axis): name for axis, name in zip(value.shape, AXES, strict=True)}
    for value in (*graph.inputs, *graph.outputs):
        for place, axis in enumerate(value.shape):
            if str(axis) in known:
                value.shape[place] = known[str(axis)]
