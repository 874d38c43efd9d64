"""The base model: checked on the meta device, loaded, its fresh head drawn, its adapter applied."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import dataclass
from typing import Any, cast

import torch
import transformers
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.auto_factory import _get_model_class

from hf_finetune.adapters._targets import output_embedding
from hf_finetune.adapters.base import Setting
from hf_finetune.device import Machine
from hf_finetune.errors import Findings, ModelError, Problem, RecipeError
from hf_finetune.models import pretrained
from hf_finetune.models.pretrained import (
    commit,
    from_pretrained,
    load_processor,
    place_of,
    read_config,
    reading,
    silence,
)
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import State, pad_token_of, tokenizer_of

# Parts of the names of dropout probabilities, wherever an architecture keeps them.
DROPOUTS = ("dropout", "pdrop", "drop_rate", "drop_path")
# Labels of a model whose data could not be read: its body can be looked at all the same.
UNKNOWN = State(names=("first", "second"))
# Shares of a sound that are masked while a model is trained (SpecAugment).
MASKS = ("mask_time_prob", "mask_feature_prob")


def find_heads(model: PreTrainedModel) -> tuple[str, ...]:
    """Children outside the pretrained body that have weights, but not the output embedding of a language model."""
    if model.base_model is model:
        return ()
    if output_embedding(model) is not None:
        return ()
    return tuple(
        name
        for name, child in model.named_children()
        if name != model.base_model_prefix and any(True for _ in child.parameters())
    )


def named_heads(model: PreTrainedModel) -> tuple[str, ...]:
    """Heads that can be trained in full by their names; any other is adapted like the layers of the body.

    PEFT (0.21) compares names by `str.endswith`: `proj` of a decision model would also take each `q_proj`.
    """
    heads = find_heads(model)
    # One head may end as another does, as DistilBERT's `pre_classifier`: both are trained in full.
    body = [path for path, _ in model.named_modules() if path.partition(".")[0] not in heads]
    return tuple(head for head in heads if not any(path.endswith(head) for path in body))


def never_quantised(model: PreTrainedModel) -> list[str]:
    """Return the paths of heads and output embedding: they are few weights, and much of an answer hangs on them."""
    output = output_embedding(model)
    return [*find_heads(model), *(path for path, module in model.named_modules() if module is output)]


def fresh_heads(recipe: Recipe, model: PreTrainedModel, missing: set[str]) -> tuple[str, ...]:
    """Return the paths of the modules with missing weights: a head, or a pooler; a ModelError where more is missing."""
    paths = [path for path, _ in model.named_modules() if any(key.rpartition(".")[0] == path for key in missing)]
    head_modules = named_heads(model)
    for path in paths:
        if path.partition(".")[0] not in head_modules and "pooler" not in path:
            reason = f"{recipe.model.name} holds no fitting weights for {path} ({len(missing)} are missing)"
            raise ModelError(Problem(f"{reason}; it is not a checkpoint for {recipe.task.kind}", key="model.name"))
    return tuple(paths)


def draw_missing(model: PreTrainedModel, missing: set[str]) -> None:
    """Draw missing weights again in fp32 on the CPU."""
    # Drawn in the base's dtype or on a GPU, they would be other numbers.
    initialise: Any = model._init_weights
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        drawn = {name for name in own if (f"{path}.{name}" if path else name) in missing}
        if not drawn:
            continue
        places = {name: (own[name].dtype, own[name].device) for name in drawn}
        for name, parameter in own.items():
            # transformers' initialisers leave alone what carries this mark.
            setattr(parameter, "_is_hf_initialized", name not in drawn)  # noqa: B010
            if name in drawn:
                parameter.data = torch.zeros(parameter.shape, dtype=torch.float32)
        initialise(module)
        for name, (dtype, device) in places.items():
            own[name].data = own[name].data.to(device=device, dtype=dtype)


def set_in_config(config: PreTrainedConfig, p: float) -> None:
    """Set every dropout probability of a config and of the configs inside it, before the model is built.

    A null one (BERT's `classifier_dropout`) is set too. LayerDrop, which skips whole layers, and the masks of
    sounds are only ever set to 0.
    """
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            set_in_config(value, p)
        elif _is_probability(name, value) or (value is None and "dropout" in name):
            setattr(config, name, p)
        elif ("layerdrop" in name or name in MASKS) and isinstance(value, float) and p == 0.0:
            setattr(config, name, 0.0)


def set_in_modules(model: nn.Module, p: float) -> None:
    """Set every dropout layer, and every attribute of a module that is a dropout probability."""
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = p
            continue
        for name, value in list(vars(module).items()):
            if _is_probability(name, value):
                setattr(module, name, p)


def _is_probability(name: str, value: Any) -> bool:
    number = isinstance(value, float | int) and not isinstance(value, bool)
    return number and any(mark in name for mark in DROPOUTS)


def check_length(recipe: Recipe, model: PreTrainedModel) -> None:
    """Refuse rows that are longer than the model has positions, with a ModelError."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for path, module in model.named_modules():
        # RoBERTa counts positions from its pad id + 1.
        if path.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            longest = module.num_embeddings - module.padding_idx - 1
    if isinstance(longest, int) and 0 < longest < recipe.data.max_length:
        reason = f"{recipe.data.max_length} is more than the {longest} positions of {recipe.model.name}; lower it"
        raise ModelError(Problem(reason, key="data.max_length"))


def check_attention(recipe: Recipe, config: PreTrainedConfig) -> None:
    """Refuse an attention that is not installed, or that the model does not know, with a ModelError."""
    asked = recipe.model.attention
    auto = getattr(transformers, recipe.task.auto_model)
    if asked != "flash_attention_2" or type(config) not in auto._model_mapping:
        return
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(recipe.training.precision, torch.bfloat16)
    try:
        with torch.device("meta"):
            # Of a copy: it would write what is asked for into the config, and so break what is made of that next.
            auto.from_config(copy.deepcopy(config), attn_implementation=asked, dtype=dtype, trust_remote_code=False)
    except (ImportError, ValueError) as error:
        how = "install flash-attn on a machine with a CUDA device, or write sdpa or auto"
        reason = f"{asked} can't be used: {' '.join(str(error).split())[:300]}; {how}"
        raise ModelError(Problem(reason, key="model.attention")) from error


def check_packages(recipe: Recipe) -> None:
    """Refuse a task, quantisation and the 8-bit optimiser without what they need, with a RecipeError."""
    problems = [
        Problem(f"{recipe.task.kind} needs {module}; pip install 'hf-finetune[{extra}]'", key="task.kind")
        for module, extra in recipe.task.needs.items()
        if importlib.util.find_spec(module) is None
    ]
    has_bitsandbytes = importlib.util.find_spec("bitsandbytes") is not None
    how = "needs bitsandbytes; pip install 'hf-finetune[quantization]', or"
    if recipe.training.optimizer == "adamw_8bit" and not has_bitsandbytes:
        problems.append(Problem(f"adamw_8bit {how} write adamw", key="training.optimizer"))
    if recipe.model.quantization is not None and not has_bitsandbytes:
        problems.append(Problem(f"{recipe.model.quantization} {how} remove it", key="model.quantization"))
    if problems:
        raise RecipeError(problems)


def check_targets(recipe: Recipe, model: PreTrainedModel, setting: Setting) -> None:
    """Refuse targets that do not exist, and an adapter that can't train the base.

    Raises:
        ModelError: A target matches no module, or the adapter that goes on is one of another model.
        RecipeError: The method can't work on quantised weights, or the adapter that goes on is another one.
    """
    refusal = recipe.adapter.why_not_quantized()
    if recipe.model.quantization is not None and refusal is not None:
        raise RecipeError(Problem(refusal, key="model.quantization"))
    recipe.adapter.check_targets(model, setting)


def unmergeable(recipe: Recipe, model: PreTrainedModel) -> list[Problem]:
    """Return the adapters of an embedding with tied weights, of which `merge` will not be able to make full weights."""
    found = recipe.adapter.tied_targets(model)
    if not found:
        return []
    what = f"{' and '.join(found)} shares its weights with the other embedding of {recipe.model.name}"
    how = "give it in adapter.modules_to_save instead, or use the adapter unmerged"
    return [Problem(f"{what}: `merge` can't make full weights of this adapter; {how}", key="adapter.target_modules")]


def check_vocabulary(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with tokens that have no embedding, with a ModelError."""
    embedding: Any = model.get_input_embeddings()
    rows: int = embedding.num_embeddings
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        reason = f"{recipe.model.name}: its tokenizer has a token {highest}, its embedding only {rows} rows"
        raise ModelError(Problem(f"{reason}; tokenizer and weights do not belong together", key="model.name"))


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
    """Return the model without weights (meta device), after every check that needs none; arguments as for `examine`.

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
    """Make every check of the model that needs no weights, without the tokenizer's where that could not be read.

    Returns:
        The model on the meta device; None where not even that can be made.
    """
    config = model = None
    with findings.collect():
        check_packages(recipe)
    with findings.collect():
        config = _config(recipe, targets)
    if config is None:
        return None
    with findings.collect():
        recipe.task.check_config(recipe.model.name, config)
    with findings.collect():
        check_attention(recipe, config)
    with findings.collect():
        pretrained.check(recipe.model)
    with findings.collect():
        model = _outline(recipe, config)
    if model is None:
        return None
    words = tokenizer_of(tokenizer)
    labels = () if targets is UNKNOWN else targets.names
    setting = Setting(recipe.task.peft_task, words, 0, named_heads(model), labels, commit(recipe.model))
    with findings.collect():
        check_length(recipe, model)
    with findings.collect():
        check_targets(recipe, model, setting)
    if not findings.blame("adapter"):
        findings.warn([*unmergeable(recipe, model), *recipe.adapter.remarks(model, setting)])
    # Where rows are not made of tokens, a tokenizer is for what the model writes.
    if recipe.task.token_ids is not None and words is not None:
        with findings.collect():
            check_vocabulary(recipe, model, words)
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

    Call `transformers.set_seed` before: one seed draws one head, whatever dtype, rank or quantisation. The outline is
    what `examine` returned, and is made here if not given.

    Raises:
        ModelError: The weights can't be loaded or lack more than a head, or `skeleton` finds something.
        RecipeError: See `skeleton`.
    """
    outline = outline or skeleton(recipe, targets, tokenizer)
    # Loading draws numbers, and how many depends on dtype and quantisation.
    state = torch.random.get_rng_state()
    model, missing = _weights(recipe, _config(recipe, targets), machine)
    head_modules = named_heads(outline)
    fresh = fresh_heads(recipe, model, missing)
    torch.random.set_rng_state(state)
    draw_missing(model, missing)
    if recipe.model.dropout is not None:
        set_in_modules(model, recipe.model.dropout)
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
        config.base_model_name_or_path = place_of(recipe.model.name)
        config.revision = commit(recipe.model) or recipe.model.revision
    return adapted


def enable_activation_checkpointing(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass."""
    # The reentrant kind gives adapters no gradient unless the inputs require one (peft issue #137).
    options = {"use_reentrant": False}
    # transformers 5.23 renamed it; 5.17 has only the old name.
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(options)
    else:
        enable: Any = model.gradient_checkpointing_enable
        enable(options)


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Return trainable and all parameters; quantised ones by the number of weights they stand for."""
    trained = total = 0
    for parameter in model.parameters():
        packed = getattr(getattr(parameter, "quant_state", None), "shape", None)
        size = getattr(parameter, "ds_numel", parameter.numel()) if packed is None else torch.Size(packed).numel()
        total += size
        trained += size if parameter.requires_grad else 0
    return trained, total


def attention(recipe: Recipe, machine: Machine) -> str:
    """The attention implementation for this model: what the machine prefers, or `eager` where the model lacks it.

    Raises:
        ModelError: The recipe asks for one that the model does not have, or that is not installed.
    """
    config = read_config(recipe.model)
    with silence():
        check_attention(recipe, config)
    mapping = getattr(transformers, recipe.task.auto_model)._model_mapping
    # A family may have several classes for one task, e.g. DeiT: the library's own function takes the right one.
    if machine.attention != "sdpa" or type(config) not in mapping:
        return machine.attention
    if cast("Any", _get_model_class)(config, mapping)._supports_sdpa:
        return machine.attention
    if recipe.model.attention == "auto":
        return "eager"
    reason = f"{config.model_type} models have no sdpa attention in transformers; write eager or auto"
    raise ModelError(Problem(reason, key="model.attention"))


def fresh_base(recipe: Recipe, options: dict[str, Any], machine: Machine) -> PreTrainedModel:
    """The base as anybody would load it from its name, with the task's options and nothing of this project's own."""
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
        set_in_config(config, recipe.model.dropout)
    return config


def _weights(recipe: Recipe, config: PreTrainedConfig, machine: Machine) -> tuple[PreTrainedModel, set[str]]:
    """Return the model, and the names of its parameters that the checkpoint does not hold or holds in another shape."""
    auto, dtype = getattr(transformers, recipe.task.auto_model), machine.base_dtype(frozen=recipe.adapter.freezes_base)
    options: dict[str, Any] = {}
    if recipe.model.quantization is not None:
        make = cast("Any", transformers.BitsAndBytesConfig)
        options["device_map"] = {"": machine.place}
        options["quantization_config"] = make(
            load_in_4bit=recipe.model.quantization == "nf4",
            load_in_8bit=recipe.model.quantization != "nf4",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            # FSDP2 shards floating point numbers only; accelerate would leave bytes whole on every rank.
            bnb_4bit_quant_storage=dtype if machine.is_sharded else torch.uint8,
            llm_int8_skip_modules=never_quantised(_outline(recipe, config)),
        )
    with reading(recipe.model), silence():
        model, info = from_pretrained(
            auto,
            place_of(recipe.model.name),
            config=config,
            revision=recipe.model.revision,
            dtype=dtype,
            attn_implementation=machine.attention,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            **options,
        )
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks 4-bit weights at the first forward in eval mode, and the
        # product with packed weights has no backward: after an evaluation, no gradient would pass the base.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model, {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
