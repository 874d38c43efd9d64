"""Modules of a model that an adapter's `target_modules` stands for, checked name by name; weights may be on meta."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field

from hf_finetune.errors import ModelError, Problem

if TYPE_CHECKING:
    from torch import nn

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
    """Return the modules that a target specification stands for, by their path.

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
            how = "name convolutions in adapter.target_modules, or train all of it: adapter: full"
            raise ModelError(Problem(f"the model has no linear layer outside its heads; {how}", key=key))
        return linear
    leaves = Counter(path.rpartition(".")[2] for path in linear)
    found: dict[str, nn.Module] = {}
    problems = []
    # PEFT is content when one name of a list matches; here each name must.
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


def check_parameters(model: nn.Module, names: Iterable[str], key: str) -> None:
    """Refuse names that are the end of no parameter's path, or of one that an adapter of modules reaches.

    Raises:
        ModelError: That is so.
    """
    from torch import nn

    fused = fused_parameters(model)
    plain = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    problems = []
    for name in names:
        if any(_matches(path, name, is_pattern=False) for path in fused):
            continue
        there = f"there are {', '.join(ends(fused))}" if fused else "the model has none: all are in layers"
        is_layers = any(f"{path}.weight".endswith(f".{name}") for path in plain)
        what = (
            "is the weight of a layer; name that in adapter.target_modules" if is_layers else f"matches none; {there}"
        )
        problems.append(Problem(f"{name!r} {what}", key=key))
    if problems:
        raise ModelError(problems)


def fused_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return weights that hold a matrix for each expert, (experts, ...), by path."""
    from torch import nn

    layers = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return {
        f"{path}.{name}": parameter
        for path, module in model.named_modules()
        if not isinstance(module, layers)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    }


def ends(paths: Iterable[str]) -> list[str]:
    """Return the ends of paths of parameters, as `target_parameters` names them, each once."""
    return sorted({".".join(path.split(".")[-3:]) for path in paths})


def unreached(adapted: nn.Module) -> dict[str, nn.Parameter]:
    """Return the fused parameters that no adapter of PEFT stands around, by path."""
    from peft.tuners.lora.layer import ParamWrapper

    wrappers: list[Any] = [module for module in adapted.modules() if isinstance(module, ParamWrapper)]
    reached = {id(wrapper.get_param()) for wrapper in wrappers}
    return {path: found for path, found in fused_parameters(adapted).items() if id(found) not in reached}


def base_model(adapted: Any) -> Any:
    """Return the transformers model below PEFT's wrapping, or the model itself."""
    return adapted.get_base_model() if hasattr(adapted, "get_base_model") else adapted


def input_embedding(model: Any) -> nn.Module | None:
    """Return the layer that turns ids, or patches, into the first hidden states, if there is one."""
    try:
        layer: nn.Module = model.get_input_embeddings()
    except NotImplementedError:  # transformers finds none in most convolutional models
        return None
    return layer


def output_embedding(model: Any) -> nn.Module | None:
    """Return the layer that turns the last hidden states of a language model into logits, if there is one."""
    layer: nn.Module | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return layer


def tied(model: Any, spec: str | Iterable[str], full: Iterable[str]) -> list[str]:
    """Targets that share their weight with the other embedding, which an update merged into it would change as well.

    Args:
        model: The model; weights may be on the meta device.
        spec: `all-linear`, which takes neither embedding, a pattern, or names.
        full: Names of modules that are trained in full: with one of the two among them, they share nothing any more.
    """
    ends: list[Any] = [input_embedding(model), output_embedding(model)]
    if spec == ALL_LINEAR or None in ends or ends[0].weight is not ends[1].weight:
        return []
    found = [path for path, module in model.named_modules() if any(module is end for end in ends)]
    if any(_matches(path, name, is_pattern=False) for path in found for name in full):
        return []
    names = [spec] if isinstance(spec, str) else list(spec)
    return [path for path in found if any(_matches(path, name, isinstance(spec, str)) for name in names)]


def in_full(model: nn.Module, head_modules: Iterable[str], names: Iterable[str] | None) -> list[str]:
    """Full paths of the modules that are trained in full: the heads, and those of `modules_to_save`.

    Raises:
        ModelError: A name matches no module with weights.
    """
    # PEFT compares `modules_to_save` by `str.endswith`, so that `norm` also takes `layernorm`: full paths avoid that.
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
    """Return each module's value: that of the first pattern which matches the end of its path, as in PEFT.

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
