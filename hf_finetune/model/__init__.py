"""The base model: checked on the meta device, loaded, its fresh head drawn, its adapter applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_finetune.adaptation.targets import output_embedding
from hf_finetune.adapters import Setting
from hf_finetune.errors import ModelError, Problem
from hf_finetune.findings import Findings
from hf_finetune.hardware import Machine
from hf_finetune.model import checks as modelchecks
from hf_finetune.model import dropout, heads, weights
from hf_finetune.model.pretrained import commit, load_processor, load_tokenizer, read_config, reading, silence
from hf_finetune.recipe import Recipe
from hf_finetune.schema.modelfolder import resolve
from hf_finetune.tasks.base import State, pad_token_of, tokenizer_of

__all__ = [
    "LoadedModel",
    "attention",
    "build",
    "enable_activation_checkpointing",
    "examine",
    "fresh_base",
    "fresh_base_and_gaps",
    "load",
    "load_processor",
    "load_tokenizer",
    "parameter_counts",
    "resolve",
    "skeleton",
]


@dataclass(frozen=True)
class LoadedModel:
    """A pretrained model with its task head."""

    model: PreTrainedModel
    head_modules: tuple[str, ...] = ()
    """Paths of the head's modules and of all others that the checkpoint did not hold: trained in full."""
    fresh: tuple[str, ...] = ()
    """Paths of the modules whose weights were drawn, because the checkpoint holds none or of another shape."""
    is_shell: bool = False
    """This rank has only the shapes; the weights come from rank 0 when they are sharded."""


def skeleton(recipe: Recipe, targets: State, tokenizer: Any = None) -> PreTrainedModel:
    """The model without weights (meta device), after every check that needs none; arguments as for `examine`.

    Raises:
        ModelError: The model does not fit the task, the length, the tokenizer or the adapter.
        RecipeError: A package is not installed, or the adapter can't train a quantised base.
    """
    findings = Findings()
    model = examine(recipe, targets, tokenizer or load_processor(recipe.model, recipe.task), findings)
    findings.raise_errors()
    if model is None:
        raise AssertionError("a model that can't be outlined has an error")
    return model


def examine(recipe: Recipe, targets: State, tokenizer: Any, findings: Findings) -> PreTrainedModel | None:
    """Make every check of the model that needs no weights.

    Args:
        recipe: Names model, task, adapter and `data.max_length`.
        targets: Labels, for the head.
        tokenizer: The model's; None where it could not be read.
        findings: Takes what is wrong.

    Returns:
        The model on the meta device; None where not even that can be made.
    """
    config = model = None
    with findings.collect():
        modelchecks.packages(recipe)
    with findings.collect():
        config = _config(recipe, targets)
    if config is None:
        return None
    with findings.collect():
        recipe.task.check_config(recipe.model.name, config)
    with findings.collect():
        modelchecks.attention(recipe, config)
    with findings.collect():
        weights.check(recipe.model)
    with findings.collect():
        model = _outline(recipe, config)
    if model is None:
        return None
    for fits in (modelchecks.length, modelchecks.targets):
        with findings.collect():
            fits(recipe, model)
    if not findings.blame("adapter"):
        findings.warn(modelchecks.unmergeable(recipe, model))
    if (words := tokenizer_of(tokenizer)) is not None:
        with findings.collect():
            modelchecks.vocabulary(recipe, model, words)
    return model


def _outline(recipe: Recipe, config: PreTrainedConfig) -> PreTrainedModel:
    auto = getattr(transformers, recipe.task.auto_model)
    with torch.device("meta"), silence():
        try:
            model: PreTrainedModel = auto.from_config(config, trust_remote_code=False)
        except ValueError as error:
            reason = f"{recipe.model.name} is a {config.model_type} model, which {recipe.task.kind} can't train"
            message = f"{reason}: transformers has no {recipe.task.auto_model} for it; name another model"
            raise ModelError(Problem(message, key="model.name")) from error
    return model


def load(
    recipe: Recipe,
    targets: State,
    machine: Machine,
    tokenizer: Any,
    outline: PreTrainedModel | None = None,
) -> LoadedModel:
    """Load the base with its task head, drawn anew where the checkpoint has none.

    Call `transformers.set_seed` before: one seed draws one head, whatever dtype, rank or quantisation.

    Args:
        recipe: Names model, task and adapter.
        targets: Labels, for the head.
        machine: Dtype, attention and device.
        tokenizer: The model's.
        outline: What `examine` returned; made here if not given.

    Raises:
        ModelError: The weights can't be loaded or lack more than a head, or `skeleton` finds something.
        RecipeError: See `skeleton`.
    """
    outline = outline or skeleton(recipe, targets, tokenizer)
    state = torch.random.get_rng_state()
    model, missing = _weights(recipe, _config(recipe, targets), machine)
    head_modules = heads.find(outline)
    fresh = heads.fresh(recipe, model, missing)
    torch.random.set_rng_state(state)
    heads.draw(model, missing)
    if recipe.model.dropout is not None:
        dropout.set_in_modules(model, recipe.model.dropout)
    model.config.use_cache = False
    if (pad := pad_token_of(tokenizer)) is not None:
        # A decoder's classification head finds the last token by the pad id of its config.
        model.config.pad_token_id = pad
    if not machine.is_sharded and recipe.model.quantization is None:
        # Before anything computes with it: initialisations and measurements would run on the CPU. Sharded weights are
        # moved as they are divided, quantised ones were loaded there.
        unplaced: Any = model  # torch's `to`, wrapped by transformers, has lost its type
        unplaced.to(machine.place)
    outside = tuple(path for path in fresh if not any(path == h or path.startswith(f"{h}.") for h in head_modules))
    return LoadedModel(model, head_modules + outside, fresh)


def build(recipe: Recipe, loaded: LoadedModel, setting: Setting) -> nn.Module:
    """Apply the adapter; `adapter_config.json` will name the base as `from_pretrained` finds it, and its commit.

    Raises:
        RecipeError: The adapter does not fit the model.
    """
    apply = recipe.adapter.outline if loaded.is_shell else recipe.adapter.apply
    adapted = apply(loaded.model, setting)
    for config in getattr(adapted, "peft_config", {}).values():
        config.base_model_name_or_path = resolve(recipe.model.name)
        config.revision = commit(recipe.model) or recipe.model.revision
    return adapted


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass.

    The reentrant kind gives adapters no gradient unless the inputs require one (peft issue #137); this is the other.
    """
    options = {"use_reentrant": False}
    # transformers 5.23 renamed it; 5.17 has only the old name.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        enable: Any = model.gradient_checkpointing_enable
        enable(options)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Trainable and all parameters; quantised ones by the number of weights they stand for."""
    counts = [(_logical_size(p), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in counts if trained), sum(size for size, _ in counts)


def attention(recipe: Recipe, machine: Machine) -> str:
    """The attention implementation for this model: what the machine prefers, or `eager` where the model lacks it.

    Raises:
        ModelError: The recipe asks for one that the model does not have, or that is not installed.
    """
    config = read_config(recipe.model)
    with silence():
        modelchecks.attention(recipe, config)
    mapping = getattr(transformers, recipe.task.auto_model)._model_mapping
    if machine.attention != "sdpa" or type(config) not in mapping or mapping[type(config)]._supports_sdpa:
        return machine.attention
    if recipe.model.attention == "auto":
        return "eager"
    reason = f"{config.model_type} models have no sdpa attention in transformers; write eager or auto"
    raise ModelError(Problem(reason, key="model.attention"))


def fresh_base(recipe: Recipe, options: dict[str, Any], machine: Machine) -> PreTrainedModel:
    """The base as anybody would load it from its name, with the task's options and nothing of this project's own.

    Raises:
        ModelError: The weights can't be loaded.
    """
    return fresh_base_and_gaps(recipe, options, machine)[0]


def fresh_base_and_gaps(
    recipe: Recipe, options: dict[str, Any], machine: Machine
) -> tuple[PreTrainedModel, frozenset[str]]:
    """`fresh_base`, and the names of its parameters that the checkpoint does not hold: those are random numbers."""
    model, missing = _weights(recipe, read_config(recipe.model, options), machine)
    return model, frozenset(missing)


def _config(recipe: Recipe, targets: State) -> PreTrainedConfig:
    config = read_config(recipe.model, recipe.task.model_options(targets))
    if recipe.model.dropout is not None:
        dropout.set_in_config(config, recipe.model.dropout)
    return config


def _weights(recipe: Recipe, config: PreTrainedConfig, machine: Machine) -> tuple[PreTrainedModel, set[str]]:
    """The model, and the names of its parameters that the checkpoint does not hold or holds in another shape."""
    auto, dtype = getattr(transformers, recipe.task.auto_model), machine.base_dtype(frozen=recipe.adapter.freezes_base)
    options: dict[str, Any] = {}
    if recipe.model.quantization is not None:
        outline, make = _outline(recipe, config), cast("Any", transformers.BitsAndBytesConfig)
        output = output_embedding(outline)
        options["device_map"] = {"": machine.place}
        options["quantization_config"] = make(
            load_in_4bit=recipe.model.quantization == "nf4",
            load_in_8bit=recipe.model.quantization != "nf4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # FSDP2 shards floating point numbers only; accelerate would leave bytes whole on every rank.
            bnb_4bit_quant_storage=dtype if machine.is_sharded else torch.uint8,
            llm_int8_skip_modules=[
                *heads.find(outline),
                *(name for name, module in outline.named_modules() if module is output),
            ],
        )
    with reading(recipe.model), silence():
        model, info = auto.from_pretrained(
            resolve(recipe.model.name),
            config=config,
            revision=recipe.model.revision,
            dtype=dtype,
            attn_implementation=machine.attention,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks 4-bit weights at the first forward in eval mode, and the
        # product with packed weights has no backward: after an evaluation, no gradient would pass the base.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}


def _logical_size(parameter: nn.Parameter) -> int:
    packed = getattr(parameter, "quant_state", None)
    if packed is not None and packed.shape is not None:
        return int(torch.Size(packed.shape).numel())
    return int(getattr(parameter, "ds_numel", parameter.numel()))
