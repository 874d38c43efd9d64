"""The model folder: what transformers, vLLM and llama.cpp read, staged beside its place and renamed into it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from transformers import GenerationConfig, PreTrainedModel

from hf_finetune.adapters import _peft as peft
from hf_finetune.device import DTYPES
from hf_finetune.errors import ModelError, Problem, StorageError
from hf_finetune.inference import merge_check
from hf_finetune.inference.load import Finished
from hf_finetune.inference.merge_check import Rows, logits_of, predictor_plain
from hf_finetune.inference.merge_options import Dtype
from hf_finetune.inference.saving import TOLERANCES
from hf_finetune.log import phase, say
from hf_finetune.models import load
from hf_finetune.models.load import unmergeable
from hf_finetune.models.pretrained import silence
from hf_finetune.run.files import discard, free_bytes, put_in_place
from hf_finetune.tasks import _generation as generation
from hf_finetune.tasks.base import pad_token_of

MODES = {"do_sample", "num_beams", "use_cache", "return_dict_in_generate", "max_new_tokens", "max_length"}
"""Values of a generation config that decide which others have an effect."""


@contextmanager
def staged(place: str) -> Iterator[Path]:
    """A folder to write into; it takes its place when the body is through, and is gone if it raises.

    Raises:
        StorageError: The disk does not take it.
    """
    final = Path(place)
    staging = final.with_name(f".{final.name}.partial")
    try:
        with reported(final):
            discard(staging)
            staging.mkdir(parents=True)
        yield staging
        with reported(final):
            put_in_place(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """Turn what a file system refuses into one line.

    Raises:
        StorageError: Instead.
    """
    from safetensors import SafetensorError

    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
        raise StorageError(Problem(f"can't be written: {reason}", file=str(folder))) from error


def check_space(folder: Path, network: PreTrainedModel, dtype: Dtype) -> None:
    """Refuse before anything is written what will not fit.

    Raises:
        StorageError: There is too little room.
    """
    needed = sum(parameter.numel() for parameter in network.parameters()) * DTYPES[dtype].itemsize
    free = free_bytes(folder.parent)
    if free < needed:
        message = f"the weights need {needed:,} bytes, {free:,} are free; make room, or name a folder elsewhere"
        raise StorageError(Problem(message, file=str(folder)))


def write(network: PreTrainedModel, run: Finished, dtype: Dtype, shard_size: str, folder: Path) -> None:
    """Write weights, config, generation config, tokenizer, chat template and labels.

    Args:
        network: Full weights; they are cast in place.
        run: Its tokenizer and labels.
        dtype: Of the weights.
        shard_size: Most bytes of one weight file.
        folder: An empty folder.

    Raises:
        ModelError: A weight is too large for the dtype.
        StorageError: The disk does not take it.
    """
    _cast(network, dtype)
    if run.recipe.task.generates:
        _generation(network, run.tokenizer)
    if getattr(network.config, "use_cache", None) is False:
        network.config.use_cache = True  # off in training only, where it has no use
    with reported(folder), silence():
        network.save_pretrained(folder, max_shard_size=shard_size)
        add_tokenizer(run, folder)


def add_tokenizer(run: Finished, folder: Path) -> None:
    """Write what is not weights: tokenizer, chat template, and the names of labels for programs."""
    run.tokenizer.save_pretrained(folder)
    peft.write_labels(folder, run.recipe.task.model_options(run.targets))


def _cast(network: PreTrainedModel, dtype: Dtype) -> None:
    wanted = DTYPES[dtype]
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(wanted)
        if not bool(torch.isfinite(parameter.data).all()):
            raise ModelError(f"{name} holds numbers that {dtype} can't; give --dtype bf16 or fp32")
    network.config.dtype = wanted


def _generation(network: Any, tokenizer: Any) -> None:
    """Stop where training taught the model to stop, whoever generates."""
    config = network.generation_config
    ends = generation.end_tokens(network, tokenizer)
    if ends:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if config.pad_token_id is None or config.pad_token_id < 0:
        config.pad_token_id = tokenizer.pad_token_id
    config._from_model_config = False  # else transformers may make it anew from config.json, which knows one end only
    left_out = _without_idle_values(config)
    if left_out:
        say(f"note: {', '.join(left_out)}: left out of generation_config.json, where they have no effect")


def _without_idle_values(config: Any) -> list[str]:
    """Reset what contradicts the rest of a generation config, such as a temperature without sampling.

    Models are published with such values. Reading them is allowed, but transformers (5.23) refuses to write a config
    with them once it was changed. Generation stays as it was; returns the names.
    """
    make: Any = GenerationConfig  # transformers leaves it untyped
    usual, left_out = make(), list[str]()
    while True:
        try:
            config.validate(strict=True)
        except ValueError as error:
            named = re.findall(r"`(\w+)`", str(error))
            idle = [name for name in named if name not in MODES and getattr(config, name, None) is not None]
            idle = [name for name in idle if getattr(config, name) != getattr(usual, name, None)]
            if not idle:
                raise ModelError(
                    f"its generation_config.json is not valid: {' '.join(str(error).split())[:300]}"
                ) from error
            for name in dict.fromkeys(idle):
                setattr(config, name, getattr(usual, name, None))
                left_out.append(name)
        else:
            return left_out


# The adapter merged into full weights: PEFT merges, in fp32, whatever the dtype that is written in the end.
#
# A quantised base is dequantised first, and the adapter merged into that: the adapter was trained on these very
# weights, rounding included, and what comes out gives the run's logits. Merged into the unquantised checkpoint, it
# would give others (docs/merge-and-export.md has the figures).

TOLERANCE = TOLERANCES["fp32"]
"""Largest difference of logits that merging may make in fp32, as a share of the largest."""


@dataclass(frozen=True)
class Merged:
    """Full weights."""

    network: PreTrainedModel
    """In fp32, in eval mode; no trace of PEFT."""
    into: str
    """What the adapter was merged into."""
    difference: float
    """Between the logits before and after, as a share of the largest."""
    before: list[torch.Tensor]
    """Logits of the probes before merging, in fp32: what everything is compared with."""
    metrics: dict[str, float]
    """Of the adapter's model before merging, in fp32."""


def merged(rows: Rows) -> Merged:
    """Load base and adapter, merge, and compare logits before and after.

    Args:
        rows: What the model is run on.

    Raises:
        ModelError: Base or adapter can't be loaded, PEFT can't merge them, or merging changes what the model says.
    """
    run, probes = rows.run, rows.probes()
    recipe = run.recipe
    if refusals := unmergeable(recipe, load.skeleton(recipe, run.targets, run.tokenizer)):
        raise ModelError(refusals)
    with phase("loading the model in fp32"):
        base, into = _base(run)
        if (pad := pad_token_of(run.tokenizer)) is not None:
            base.config.pad_token_id = pad
        adapted: Any = recipe.adapter.load(base, str(run.folder.adapter))
        adapted.eval().requires_grad_(False)
    before = merge_check.logits(logits_of(adapted), probes)
    metrics = merge_check.metrics("the adapter in fp32", rows, predictor_plain(adapted, run))
    if not hasattr(adapted, "merge_and_unload"):
        return Merged(adapted, "nothing: every weight was trained", 0.0, before, metrics)
    with phase("merging"):
        network = _unloaded(adapted)
    apart = merge_check.difference(before, merge_check.logits(logits_of(network), probes))
    hint = f"this combination of base and {recipe.adapter.kind} can't be merged by PEFT; report it"
    merge_check.refuse(apart, TOLERANCE, "the merged weights are not the adapter's model", hint)
    return Merged(network, into, apart, before, metrics)


def _base(run: Finished) -> tuple[Any, str]:
    """The base in fp32, and what it is."""
    recipe = run.recipe
    options = recipe.task.model_options(run.targets)
    if recipe.model.quantization is None:
        # Weights as the checkpoint has them: a run in bf16 saw them rounded, which is no reason to keep that.
        whole = load.fresh_base(recipe, options, replace(run.machine, precision="fp32"))
        return merge_check.put(whole, run.machine.device), "the base"
    # In the run's precision: another one would round before it quantises, and so give other weights.
    base = _dequantised(load.fresh_base(recipe, options, run.machine))
    return merge_check.put(base, run.machine.device), f"the base, dequantised from {recipe.model.quantization}"


def _dequantised(quantised: Any) -> Any:
    """The model in fp32 on the CPU: unpacked layer by layer, so that its device holds one of them at a time.

    `PreTrainedModel.dequantize` unpacks all of them on the device, which has room for the packed ones alone.
    """
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

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
    """The model without PEFT.

    Raises:
        ModelError: PEFT refuses; a merged weight is not finite.
    """
    with peft.quiet(), torch.no_grad():
        try:
            network = adapted.merge_and_unload(safe_merge=True)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ModelError(f"PEFT can't merge this adapter: {' '.join(str(error).split())[:300]}") from error
    unwrapped: PreTrainedModel = network.eval().requires_grad_(False)
    return unwrapped
