"""Full weights of an adapter: merged by PEFT in fp32, written as a model folder, and loaded as anyone loads it.

A quantised base is dequantised first, and the adapter merged into that: the adapter was trained on these very weights,
rounding included, and the result gives the run's logits. Merged into the unquantised checkpoint, it would give others
(docs/merge-and-export.md has the figures).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from accelerate.hooks import remove_hook_from_module
from transformers import GenerationConfig, PreTrainedModel

from hf_finetune.adapters import _peft as peft
from hf_finetune.device import DTYPES, Precision
from hf_finetune.errors import ModelError, Problem, StorageError
from hf_finetune.inference import merge_check
from hf_finetune.inference.load import Finished
from hf_finetune.inference.merge_check import Rows
from hf_finetune.inference.saving import TOLERANCES
from hf_finetune.log import phase, say
from hf_finetune.models import load as models_load
from hf_finetune.models.pretrained import read_config, silence
from hf_finetune.run.files import free_bytes, writing
from hf_finetune.tasks import _generation as generation
from hf_finetune.tasks.base import pad_token_of

# Largest difference of logits that merging may make in fp32, as a share of the largest.
TOLERANCE = TOLERANCES["fp32"]
# A GPU must have this multiple of the weights free: activations need memory, too.
ROOM = 1.5
# Values of a generation config that decide which others have an effect.
MODES = {"do_sample", "num_beams", "use_cache", "return_dict_in_generate", "max_new_tokens", "max_length"}


@dataclass(frozen=True)
class Merged:
    """Full weights, and the model that they were made of."""

    network: PreTrainedModel  # in fp32, in eval mode; no trace of PEFT
    into: str  # the base that the adapter was merged into, in words
    difference: float  # between the logits before and after, as a share of the largest
    before: list[torch.Tensor]  # logits of the probes before merging, in fp32: everything is compared with them
    metrics: dict[str, float]  # of the adapter's model before merging, in fp32


def merged(rows: Rows) -> Merged:
    """Load base and adapter, merge, and compare logits before and after."""
    run, probes = rows.run, rows.probes()
    recipe = run.recipe
    if refusals := models_load.unmergeable(recipe, models_load.skeleton(recipe, run.targets, run.tokenizer)):
        raise ModelError(refusals)
    with phase("loading the model in fp32"):
        options = recipe.task.model_options(run.targets)
        if recipe.model.quantization is None:
            # Weights as the checkpoint has them: a run in bf16 saw them rounded, which is no reason to keep that.
            base = models_load.fresh_base(recipe, options, replace(run.machine, precision="fp32"))
            into = "the base"
        else:
            # In the run's precision: another one would round before it quantises, and so give other weights.
            base = _dequantised(models_load.fresh_base(recipe, options, run.machine))
            into = f"the base, dequantised from {recipe.model.quantization}"
        base = _placed(base, run.machine.device)
        if (pad := pad_token_of(run.tokenizer)) is not None:
            base.config.pad_token_id = pad
        adapted: Any = recipe.adapter.load(base, str(run.folder.adapter))
        adapted.eval().requires_grad_(False)
    before = merge_check.logits(merge_check.logits_of(adapted), probes)
    metrics = merge_check.metrics("the adapter in fp32", rows, merge_check.plain(adapted, run))
    if not hasattr(adapted, "merge_and_unload"):
        return Merged(adapted, "nothing: every weight was trained", 0.0, before, metrics)
    with phase("merging"):
        network = _unloaded(adapted)
    apart = merge_check.difference(before, merge_check.logits(merge_check.logits_of(network), probes))
    hint = f"this combination of base and {recipe.adapter.kind} can't be merged by PEFT; report it"
    merge_check.refuse(apart, TOLERANCE, "the merged weights are not the adapter's model", hint)
    return Merged(network, into, apart, before, metrics)


def _dequantised(quantised: Any) -> Any:
    """Unpack a model to fp32 on the CPU, layer by layer, so that its device holds one of them at a time."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    # `PreTrainedModel.dequantize` unpacks all layers on the device, which has room for the packed ones alone.
    for path, layer in [*quantised.named_modules()]:
        if not hasattr(layer, "weight") or type(layer.weight).__name__ not in {"Params4bit", "Int8Params"}:
            continue
        bias = layer.bias
        whole = torch.nn.Linear(layer.in_features, layer.out_features, bias=bias is not None, device="meta")
        weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
        whole.weight = torch.nn.Parameter(weight.to("cpu", torch.float32), requires_grad=False)
        if bias is not None:
            whole.bias = torch.nn.Parameter(bias.detach(), requires_grad=False)
        quantised.set_submodule(path, whole)
    quantised.hf_quantizer.remove_quantization_config(quantised)
    if hasattr(quantised.config, "_pre_quantization_dtype"):
        del quantised.config._pre_quantization_dtype
    return remove_hook_from_module(quantised, recurse=True).to("cpu").float()


def _unloaded(adapted: Any) -> PreTrainedModel:
    """Merge, and take PEFT away."""
    with peft.quiet(), torch.no_grad():
        try:
            network = adapted.merge_and_unload(safe_merge=True)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ModelError(f"PEFT can't merge this adapter: {peft.one_line(error)}") from error
    unwrapped: PreTrainedModel = network.eval().requires_grad_(False)
    return unwrapped


# The folder that transformers, vLLM and llama.cpp read.


def stored_dtype(run: Finished) -> Precision:
    """Return the dtype of the base's checkpoint; fp32 where it does not say, or says something else."""
    stored = getattr(read_config(run.recipe.model), "dtype", None)
    return next((name for name in get_args(Precision) if DTYPES[name] is stored), "fp32")


def check_space(folder: Path, network: PreTrainedModel, dtype: Precision) -> None:
    """Refuse weights that will not fit, before anything is written."""
    needed = sum(parameter.numel() for parameter in network.parameters()) * DTYPES[dtype].itemsize
    free = free_bytes(folder.parent)
    if free < needed:
        message = f"the weights need {needed:,} bytes, {free:,} are free; make room, or name a folder elsewhere"
        raise StorageError(Problem(message, file=str(folder)))


def write(network: PreTrainedModel, run: Finished, dtype: Precision, shard_size: str, folder: Path) -> None:
    """Write weights, config, generation config, tokenizer, chat template and labels.

    Args:
        network: Full weights; they are cast in place.
        run: Its tokenizer and labels.
        dtype: For the weights.
        shard_size: Most bytes of one weight file.
        folder: An empty folder.
    """
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(DTYPES[dtype])
        if not bool(torch.isfinite(parameter.data).all()):
            raise ModelError(f"{name} holds numbers that {dtype} can't; give --dtype bf16 or fp32")
    network.config.dtype = DTYPES[dtype]
    if run.recipe.task.generates:
        _settle_generation(network, run.tokenizer)
    if getattr(network.config, "use_cache", None) is False:
        network.config.use_cache = True  # it was off for training
    with writing(folder), silence():
        network.save_pretrained(folder, max_shard_size=shard_size)
        add_tokenizer(run, folder)


def add_tokenizer(run: Finished, folder: Path) -> None:
    """Write everything but weights: tokenizer, chat template, and the names of labels for programs."""
    run.tokenizer.save_pretrained(folder)
    peft.write_labels(folder, run.recipe.task.model_options(run.targets))


def _settle_generation(network: Any, tokenizer: Any) -> None:
    """Let the model stop where training taught it to stop, whatever program generates."""
    config = network.generation_config
    ends = generation.end_tokens(network, tokenizer)
    if ends:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if config.pad_token_id is None or config.pad_token_id < 0:
        config.pad_token_id = tokenizer.pad_token_id
    # Else transformers may make it anew from config.json, which knows one end only.
    config._from_model_config = False
    if left_out := _without_idle_values(config):
        say(f"note: {', '.join(left_out)}: left out of generation_config.json, where they have no effect")


def _without_idle_values(config: Any) -> list[str]:
    """Reset what contradicts the rest of a generation config, such as a temperature without sampling.

    Models are published with such values. Reading them is allowed, but transformers (5.23) refuses to write a config
    with them once it was changed. Generation stays as it was; returns the names.
    """
    make: Any = GenerationConfig  # untyped in transformers
    usual, left_out = make(), list[str]()
    while True:
        try:
            config.validate(strict=True)
        except ValueError as error:
            named = re.findall(r"`(\w+)`", str(error))
            idle = [name for name in named if name not in MODES and getattr(config, name, None) is not None]
            idle = [name for name in idle if getattr(config, name) != getattr(usual, name, None)]
            if not idle:
                raise ModelError(f"its generation_config.json is not valid: {peft.one_line(error)}") from error
            for name in dict.fromkeys(idle):
                setattr(config, name, getattr(usual, name, None))
                left_out.append(name)
        else:
            return left_out


def load(folder: Path, run: Finished, **options: Any) -> Any:
    """Load the model of a folder with plain transformers, in eval mode, on the run's device where it fits there.

    Args:
        folder: A model folder.
        run: Says which class, and where to put it.
        **options: More of `from_pretrained`.
    """
    auto = getattr(transformers, run.recipe.task.auto_model)
    with silence():
        try:
            network, info = auto.from_pretrained(
                str(folder),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            reason = f"what was written does not load in transformers: {peft.one_line(error)}"
            raise ModelError(f"{reason}; report it") from error
    lost = sorted({*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if lost:
        raise ModelError(f"what was written does not load whole in transformers, e.g. {lost[0]}; report it")
    return _placed(network, run.machine.device).eval()


def _placed(network: Any, device: str) -> Any:
    """Move a model to the device, or leave it on the CPU where a GPU has no room for it."""
    needed = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    if device == "cuda" and torch.cuda.mem_get_info()[0] <= ROOM * needed:
        return network.to("cpu")
    return network.to(device)
