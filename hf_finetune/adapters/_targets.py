"""Modules of a model that an adapter's `target_modules` stands for, checked name by name; weights may be on meta."""

from __future__ import annotations

import copy
import difflib
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from hf_finetune.adapters import _peft as peft
from hf_finetune.errors import ModelError, Problem, RecipeError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

# Every linear layer but the heads.
ALL_LINEAR = "all-linear"


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from None
    return pattern


# `all-linear`, or a regular expression that a module's whole path must match.
Pattern = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_compiles)]
# Last parts of module paths, e.g. `q_proj`.
Names = Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(min_length=1)]
Spec = Pattern | Names


def matched(model: nn.Module, spec: str | list[str], skip: Iterable[str], key: str) -> dict[str, nn.Module]:
    """The modules that a target specification stands for, by their path.

    PEFT is content when one name of a list matches; here each name must.

    Args:
        model: The model, heads included.
        spec: `all-linear`, a pattern, or names.
        skip: Modules that are trained in full and therefore get no adapter, by path or last part of it.
        key: The recipe key to blame.

    Raises:
        ModelError: A name or the pattern matches nothing, or something that is no linear or embedding layer.
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    # The rule by which PEFT keeps adapters out of `modules_to_save`.
    barred = [re.compile(rf"(^|.*\.){re.escape(name)}($|\..*)") for name in skip]
    outside = {path: module for path, module in model.named_modules() if not any(b.match(path) for b in barred)}
    output = output_embedding(model)
    is_linear = {path: isinstance(module, nn.Linear | Conv1D) for path, module in outside.items()}
    linear = {path: module for path, module in outside.items() if is_linear[path] and module is not output}
    if spec == ALL_LINEAR:
        if not linear:
            raise ModelError(Problem("the model has no linear layer outside its heads", key=key))
        return linear
    leaves = Counter(path.rpartition(".")[2] for path in linear)
    found: dict[str, nn.Module] = {}
    problems = []
    for name in [spec] if isinstance(spec, str) else spec:
        hits = {path: module for path, module in outside.items() if _matches(path, name, isinstance(spec, str))}
        wrong = [
            f"{path!r} is a {type(module).__name__}, which takes no adapter"
            for path, module in hits.items()
            if not isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | Conv1D)
        ]
        if wrong or not hits:
            near = difflib.get_close_matches(name.rpartition(".")[2], list(leaves), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            listed = ", ".join(f"{leaf} ({count})" for leaf, count in leaves.items())
            what = wrong[0] if wrong else f"{name!r} matches no module"
            problems.append(Problem(f"{what}{hint}; linear layers: {listed}", key=key))
        found |= hits
    if problems:
        raise ModelError(problems)
    return found


def base_model(adapted: Any) -> Any:
    """The transformers model below PEFT's wrapping, or the model itself."""
    return adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted


def output_embedding(model: Any) -> nn.Module | None:
    """The layer that turns the last hidden states of a language model into logits, if there is one."""
    layer: nn.Module | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return layer


def tied(model: Any, spec: str | Iterable[str], full: Iterable[str]) -> list[str]:
    """Targets that share their weight with the other embedding, which an update merged into it would change as well.

    Args:
        model: The model; weights may be on the meta device.
        spec: `all-linear`, which takes neither embedding, a pattern, or names.
        full: Names of modules that are trained in full: with one of the two among them, they share nothing any more.
    """
    ends: list[Any] = [model.get_input_embeddings(), output_embedding(model)]
    if spec == ALL_LINEAR or None in ends or ends[0].weight is not ends[1].weight:
        return []
    found = [path for path, module in model.named_modules() if any(module is end for end in ends)]
    if any(_matches(path, name, is_pattern=False) for path in found for name in full):
        return []
    names = [spec] if isinstance(spec, str) else list(spec)
    return [path for path in found if any(_matches(path, name, isinstance(spec, str)) for name in names)]


def in_full(model: nn.Module, head_modules: Iterable[str], names: Iterable[str] | None) -> list[str]:
    """Full paths of the modules that are trained in full: the heads, and those of `modules_to_save`.

    PEFT compares `modules_to_save` by `str.endswith`, so that `norm` also takes `layernorm`: full paths avoid that.

    Raises:
        ModelError: A name matches no module with weights.
    """
    own = [path for path, module in model.named_modules() if path and any(True for _ in module.parameters())]
    found, problems = list(head_modules), []
    for name in names or ():
        hits = [path for path in own if _matches(path, name, is_pattern=False)]
        if not hits:
            leaves = sorted({path.rpartition(".")[2] for path in own if not path.rpartition(".")[2].isdecimal()})
            near = difflib.get_close_matches(name, leaves, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(leaves[:30])}"
            problems.append(Problem(f"{name!r} matches no module with weights{hint}", key="adapter.modules_to_save"))
        found += hits
    if problems:
        raise ModelError(problems)
    return list(dict.fromkeys(found))


def by_pattern(modules: dict[str, nn.Module], values: dict[str, Any], default: float, key: str) -> dict[str, float]:
    """Each module's value: that of the first pattern which matches the end of its path, as in PEFT.

    Raises:
        ModelError: A pattern matches none of the modules.
    """
    found: dict[str, float] = {}
    for pattern, value in values.items():
        hits = [path for path in modules if re.match(rf"(.*\.)?({pattern})$", path)]
        if not hits:
            raise ModelError(Problem(f"{pattern!r} matches none of the target modules", key=key))
        for path in hits:
            found.setdefault(path, value)
    return {path: found.get(path, default) for path in modules}


def check_rank(path: str, module: nn.Module, rank: int, key: str) -> None:
    """Refuse a rank that is larger than the matrix it is to factorise.

    Raises:
        ModelError: `rank` is more than the smaller side of the module's weight.
    """
    # Quantised weights are packed: their stored shape says nothing.
    sides = [("in_features", "out_features"), ("num_embeddings", "embedding_dim"), ("nx", "nf")]
    names = next((names for names in sides if all(hasattr(module, name) for name in names)), None)
    weight: Any = module.weight
    smaller = min(weight.shape[:2] if names is None else [int(getattr(module, name)) for name in names])
    if rank > smaller:
        reason = f"{rank} is more than the smaller side ({smaller}) of {path!r}; choose at most {smaller}"
        raise ModelError(Problem(reason, key=key))


def _matches(path: str, name: str, is_pattern: bool) -> bool:
    return bool(re.fullmatch(name, path)) if is_pattern else path == name or path.endswith(f".{name}")


# Initialisations of LoRA that look at the base weights or at data, and saving after them.

# Initialisations that take the first product of the matrices out of the base weights.
MUTATING = ("pissa", "olora")
# Initialisations for linear layers only.
FACTORISING = (*MUTATING, "eva")
# Batches after which EVA gives up.
EVA_PASSES = 400

# Rows that are kept of layers which see one vector a row.
EVA_ROWS = 4_096


def check_layers(modules: dict[str, nn.Module], init: str) -> None:
    """Refuse layers that an initialisation does not know.

    Raises:
        RecipeError: A layer is not linear, or for OLoRA a transposed one (PEFT factorises it the wrong way round).
    """
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    allowed = nn.Linear if init == "olora" else nn.Linear | Conv1D
    for path, module in modules.items():
        if not isinstance(module, allowed):
            reason = f"{init} does not work on {path!r}, a {type(module).__name__}; use another init or other targets"
            raise RecipeError(Problem(reason, key="adapter.init"))


def factorise_base(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Wrap with PiSSA or OLoRA and remember the first matrices.

    The residual is computed again in fp32 from the weights as they were: PEFT rounds the matrices to the dtype of the
    base *after* it took their unrounded product out of it.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    originals = {path: module.weight for path, module in model.named_modules() if hasattr(module, "weight")}
    originals = {path: weight.detach().clone() for path, weight in originals.items() if weight.ndim == 2}
    adapted: Any = peft.wrap(model, config)
    with torch.no_grad():
        for path, layer in adapted.base_model.model.named_modules():
            if isinstance(layer, LoraLayer):
                linear: Any = layer
                residual = originals[path].float() - linear.get_delta_weight(peft.ADAPTER).float()
                linear.get_base_layer().weight.copy_(residual)
    first = {name: value.detach().clone() for name, value in peft.weights(adapted).items() if ".lora_" in name}
    adapted.first_matrices = {name: value for name, value in first.items() if "magnitude" not in name}
    result: PeftModel = adapted
    return result


def changed_base(adapted: nn.Module) -> bool:
    """Tell a model of which part of the base weights was moved into its adapter."""
    return hasattr(adapted, "first_matrices")


def eva(adapted: PeftModel, batches: Callable[[], Iterable[dict[str, Any]]]) -> None:
    """Set the A matrices to the principal directions of the layers' inputs (https://arxiv.org/abs/2410.07170).

    Ranks move between layers; the configuration keeps where they went.

    Raises:
        RecipeError: There are no batches, or the directions do not settle.
    """
    from peft import initialize_lora_eva_weights

    inputs = _Inputs(list(batches()))
    with peft.quiet():
        initialize_lora_eva_weights(
            adapted,
            inputs,
            prepare_model_inputs_fn=_mask,
            prepare_layer_inputs_fn=_Tokens(),
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    peft.train_in_fp32(adapted)


def for_unmodified_base(
    adapted: nn.Module, state: dict[str, torch.Tensor] | None = None
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Configuration and tensors of this adapter as plain LoRA on the base as it was before `apply`.

    With first matrices A0, B0 the base holds W - s B0 A0, so the update of W is s (B A - B0 A0) = s [B | -B0] [A ; A0].
    PEFT's own conversion (`subtract_mutated_init`) drops all but these matrices from the file: DoRA's magnitudes, fully
    trained modules and trained tokens; and it refuses rsLoRA with patterns.

    Args:
        adapted: The trained model.
        state: See `peftio.weights`.
    """
    import torch

    config = copy.deepcopy(peft.adapter_config(adapted))
    config.init_lora_weights = True
    config.eva_config = None
    tensors = peft.weights(adapted, state)
    first: dict[str, torch.Tensor] = getattr(adapted, "first_matrices", {})
    for name, before in first.items():
        sign, dim = (1, 0) if ".lora_A" in name else (-1, 1)
        tensors[name] = torch.cat([tensors[name], sign * before.to(tensors[name])], dim=dim)
    if first:
        # Twice the rank under the same scale: alpha / r, or alpha / sqrt(r).
        factor = math.sqrt(2) if config.use_rslora else 2
        config.r *= 2
        config.lora_alpha *= factor
        config.rank_pattern = {name: 2 * rank for name, rank in config.rank_pattern.items()}
        config.alpha_pattern = {name: factor * alpha for name, alpha in config.alpha_pattern.items()}
    return config, tensors


def _mask(inputs: dict[str, Any], config: Any) -> torch.Tensor | None:
    """Row and position of every token that is no padding, (N, 2); PEFT's own also reads `labels` as token labels."""
    mask = inputs.get("attention_mask")
    return None if mask is None or mask.ndim != 2 else mask.nonzero()


class _Tokens:
    """Inputs of a layer as (tokens, features), without padding.

    PEFT's own fails on layers that see one vector a row (BERT's pooler). Of those, earlier batches are kept: one alone
    has fewer rows than EVA needs.
    """

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def __call__(self, layer_input: Any, mask: torch.Tensor | None, name: str) -> torch.Tensor:
        import torch

        values: torch.Tensor = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
        if values.ndim == 2:
            self.kept[name] = torch.cat([self.kept.get(name, values[:0]), values])[-EVA_ROWS:]
            return self.kept[name]
        if mask is not None and values.ndim == 3:
            return values[mask.T.unbind()]
        return values.reshape(-1, values.shape[-1])


class _Inputs:
    """The batches over and over, without labels; ends in an error instead of never."""

    def __init__(self, batches: list[dict[str, Any]]) -> None:
        if not batches:
            raise RecipeError(Problem("eva needs training batches, and there are none", key="adapter.init"))
        self.batches = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step in range(EVA_PASSES):
            yield self.batches[step % len(self.batches)]
        reason = f"eva did not settle in {EVA_PASSES} batches; use larger batches or a smaller r"
        raise RecipeError(Problem(reason, key="adapter.init"))
