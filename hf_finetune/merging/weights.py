"""The adapter merged into full weights: PEFT merges, in fp32, whatever the dtype that is written in the end.

A quantised base is dequantised first, and the adapter merged into that: the adapter was trained on these very weights,
rounding included, and what comes out gives the run's logits. Merged into the unquantised checkpoint, it would give
others (docs/merge-and-export.md has the figures).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from accelerate.hooks import remove_hook_from_module

from hf_finetune import model
from hf_finetune.adaptation import peftio
from hf_finetune.errors import ModelError
from hf_finetune.export import TOLERANCES
from hf_finetune.merging import plain, scoring
from hf_finetune.merging.plain import logits_of, predictor
from hf_finetune.model.checks import unmergeable
from hf_finetune.terminal import phase

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_finetune.finished import Finished
    from hf_finetune.merging.rows import Rows

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
    if refusals := unmergeable(recipe, model.skeleton(recipe, run.targets, run.tokenizer)):
        raise ModelError(refusals)
    with phase("loading the model in fp32"):
        base, into = _base(run)
        base.config.pad_token_id = run.tokenizer.pad_token_id
        adapted: Any = recipe.adapter.load(base, str(run.folder.adapter))
        adapted.eval().requires_grad_(False)
    before = scoring.logits(logits_of(adapted), probes)
    metrics = scoring.metrics("the adapter in fp32", rows, predictor(adapted, run))
    if not hasattr(adapted, "merge_and_unload"):
        return Merged(adapted, "nothing: every weight was trained", 0.0, before, metrics)
    with phase("merging"):
        network = _unloaded(adapted)
    apart = scoring.difference(before, scoring.logits(logits_of(network), probes))
    hint = f"this combination of base and {recipe.adapter.kind} can't be merged by PEFT; report it"
    scoring.refuse(apart, TOLERANCE, "the merged weights are not the adapter's model", hint)
    return Merged(network, into, apart, before, metrics)


def _base(run: Finished) -> tuple[Any, str]:
    """The base in fp32, and what it is."""
    recipe = run.recipe
    options = recipe.task.model_options(run.targets)
    if recipe.model.quantization is None:
        # Weights as the checkpoint has them: a run in bf16 saw them rounded, which is no reason to keep that.
        whole = model.fresh_base(recipe, options, replace(run.machine, precision="fp32"))
        return plain.put(whole, run.machine.device), "the base"
    # In the run's precision: another one would round before it quantises, and so give other weights.
    base = _dequantised(model.fresh_base(recipe, options, run.machine))
    return plain.put(base, run.machine.device), f"the base, dequantised from {recipe.model.quantization}"


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
    with peftio.quiet(), torch.no_grad():
        try:
            network = adapted.merge_and_unload(safe_merge=True)
        except (ValueError, TypeError, NotImplementedError) as error:
            raise ModelError(f"PEFT can't merge this adapter: {' '.join(str(error).split())[:300]}") from error
    unwrapped: PreTrainedModel = network.eval().requires_grad_(False)
    return unwrapped
