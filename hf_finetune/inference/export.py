"""More forms of a merged model: int8 or int4 weights by torchao, and one ONNX file by torch.onnx.

Only weights are quantised, activations are not. Inputs of the ONNX file are those of the run's batches: tokens are
(batch, sequence) of any size, images a batch of any size. Its output is `logits`, of a language model without a cache.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from hf_finetune.adapters import _peft as peft
from hf_finetune.errors import ModelError, RecipeError
from hf_finetune.inference import weights
from hf_finetune.inference.load import Finished
from hf_finetune.inference.weights import Logits
from hf_finetune.models import load
from hf_finetune.models.pretrained import silence
from hf_finetune.run.files import writing
from hf_finetune.tasks._shown import read_output
from hf_finetune.tasks.base import Batch

# The place in a model folder where programs look for it.
ONNX_FILE = "onnx/model.onnx"
AXES = ("batch", "sequence")
# More bytes of weights lie in a file of their own: a protobuf holds 2 GiB.
ONE_FILE = 1_500_000_000
# Largest difference of logits between torch and onnxruntime in fp32, as a share of the largest: sums run in other
# orders, and some functions are other approximations.
ONNX_TOLERANCE = 1e-3
# Weights that share one scale in int4: the first that divides every row.
GROUPS = (128, 64, 32)


def check_kernels(bits: str, device: str) -> None:
    """Refuse weights that torchao can't run on this machine."""
    if bits == "int4" and device != "cuda":
        # torchao 0.18: each packing of Int4WeightOnlyConfig needs CUDA or XPU, and what packs 4 bits on a CPU
        # (IntxWeightOnlyConfig) stores them in 8.
        reason = f"torchao has kernels for int4 weights on CUDA only, and this machine has {device}"
        raise RecipeError(f"--quantize int4: {reason}; run this on a GPU, or write int8")


def quantise(source: Path, run: Finished, bits: str, folder: Path) -> None:
    """Quantise the merged model in `source`, and write it with its tokenizer to the new folder."""
    config = transformers.AutoConfig.from_pretrained(str(source), trust_remote_code=False)
    with torch.device("meta"), silence():
        outline = getattr(transformers, run.recipe.task.auto_model).from_config(config, trust_remote_code=False)
    kept = load.never_quantised(outline)
    settings = transformers.TorchAoConfig(_config(outline, bits), modules_to_not_convert=kept)
    options = {"dtype": torch.bfloat16} if bits == "int4" else {}
    network = weights.load(source, run, quantization_config=settings, **options)
    if not any("torchao" in type(parameter.data).__module__ for parameter in network.parameters()):
        raise ModelError(f"--quantize {bits}: torchao found no linear layer in this model to quantise")
    with writing(folder), silence():
        network.save_pretrained(folder)
        weights.add_tokenizer(run, network.config, folder)


def _config(outline: Any, bits: str) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    if bits == "int8":
        return Int8WeightOnlyConfig()
    widths = [module.in_features for module in outline.modules() if isinstance(module, nn.Linear)]
    group = next((size for size in GROUPS if all(width % size == 0 for width in widths)), None)
    if group is None:
        raise ModelError(f"--quantize int4: rows of {min(widths)} weights can't be divided into groups of {GROUPS[-1]}")
    return Int4WeightOnlyConfig(group_size=group, int4_packing_format="tile_packed_to_4d")


def write_onnx(source: Path, run: Finished, probes: Sequence[Batch], file: Path) -> float:
    """Export the merged model in `source`; returns the `weights.difference` of the file's logits from torch's.

    `probes` are batches without labels; the first shows names, types and shapes of the inputs.
    """
    # Eager attention is made of operations that every version of ONNX has.
    network = weights.load(source, run, dtype=torch.float32, attn_implementation="eager").to("cpu")
    expected = weights.logits(weights.logits_of(network, run.recipe.task.output), probes)
    _export(network, run.recipe.task.output, probes[0], file)
    del network
    return weights.difference(expected, weights.logits(session(file), probes))


def session(file: Path) -> Logits:
    """Make logits with onnxruntime from a file, on the CPU."""
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as failures

    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3  # errors alone
    try:
        made = onnxruntime.InferenceSession(str(file), settings, providers=["CPUExecutionProvider"])
    except (failures.Fail, failures.InvalidGraph, failures.NotImplemented, failures.RuntimeException) as error:
        raise ModelError(f"onnxruntime does not take the ONNX file: {peft.one_line(error)}") from error
    names = [one.name for one in made.get_inputs()]

    def run(batch: Batch) -> torch.Tensor:
        return torch.from_numpy(made.run(None, {name: batch[name].cpu().numpy() for name in names})[0])

    return run


class _Positional(nn.Module):
    """The model with its inputs by position, as torch.onnx wants them, and one output alone."""

    def __init__(self, network: Any, output: str | None, names: list[str]) -> None:
        super().__init__()
        self.network, self.output, self.names = network, output, names
        self.options = {"use_cache": False} if network.can_generate() else {}

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        """Logits, or another output."""
        inputs = dict(zip(self.names, values, strict=True))
        return read_output(self.network(**inputs, **self.options), self.output)


def _export(network: Any, output: str | None, probe: Batch, file: Path) -> None:
    names, example, free = list(probe), dict[str, torch.Tensor](), list[dict[int, Any]]()
    for name, value in probe.items():
        # Two rows, and several tokens: torch.export takes an axis of size 1 for a constant.
        is_tokens = value.ndim == len(AXES)
        shape = (2, 9) if is_tokens else (2, *value.shape[1:])
        example[name] = torch.ones(shape, dtype=value.dtype)
        # The height and width of images are the processor's, always the same.
        free.append(dict.fromkeys(range(len(AXES) if is_tokens else 1), torch.export.Dim.DYNAMIC))
    if "attention_mask" in example:
        example["attention_mask"][1, 5:] = 0
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    size = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program: Any = torch.onnx.export(
                _Positional(network, output, names),
                tuple(example[name] for name in names),
                dynamo=True,
                dynamic_shapes={"values": tuple(free)},
                input_names=names,
                output_names=[output or "logits"],
                verbose=False,
            )
        except (torch.onnx.errors.OnnxExporterError, RuntimeError) as error:
            reason = peft.one_line(error.__cause__ or error)
            raise ModelError(f"torch.onnx can't export this model: {reason}; leave --onnx out") from error
    # torch names the free axes by numbers of its own.
    graph, known = program.model.graph, dict[str, str]()
    for value in graph.inputs:
        free_axes = zip(value.shape, AXES, strict=False)
        known |= {str(axis): name for axis, name in free_axes if not isinstance(axis, int)}
    for value in (*graph.inputs, *graph.outputs):
        for place, axis in enumerate(value.shape):
            if str(axis) in known:
                value.shape[place] = known[str(axis)]
    with writing(file):
        file.parent.mkdir(parents=True)
        program.save(str(file), external_data=size > ONE_FILE)
