"""Several LoRA adapters of one base become one: `hf-finetune merge RUN RUN ...`, by PEFT's own methods.

`cat` is the weighted sum of what the adapters add to the weights, exactly. `linear` sums their matrices, which is
another thing; `ties` (https://arxiv.org/abs/2306.01708) and `dare_*` (https://arxiv.org/abs/2311.03099) drop small or
random parts of the matrices first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hf_finetune.adapters import _peft as peft
from hf_finetune.errors import Findings, ModelError, RecipeError
from hf_finetune.inference.load import Finished

SPARSE = ("ties", "dare_linear", "dare_ties")
"""Methods that have a density."""
COMBINED = "combined"


def shares(weights: Sequence[float], others: Sequence[Finished]) -> list[float]:
    """Return the weight of each run; equal ones that sum to 1 where none are given."""
    return list(weights) or [1 / (len(others) + 1)] * (len(others) + 1)


def refuse_strangers(first: Finished, others: Sequence[Finished]) -> None:
    """Refuse runs that can't be joined.

    Raises:
        RecipeError: One differs in base, task or labels from the first; all differences are told.
        ModelError: One is no LoRA, or trains more than LoRA's matrices.
    """
    findings = Findings()
    for run in (first, *others) if others else ():
        for why in _unfit(run):
            findings.add(ModelError(f"{run.folder.path}: {why}; it can't be combined"))
    for run in others:
        for what, one, other in (
            ("task", first.recipe.task.kind, run.recipe.task.kind),
            ("base", first.recipe.model.name, run.recipe.model.name),
            ("revision of the base", first.recipe.model.revision, run.recipe.model.revision),
            ("quantisation", first.recipe.model.quantization, run.recipe.model.quantization),
        ):
            if one != other:
                where = f"{run.folder.path}: its {what} is {other}, that of {first.folder.path} is {one}"
                findings.add(RecipeError(f"{where}; only adapters of one base and task can be combined"))
    findings.raise_errors()


def _unfit(run: Finished) -> Iterator[str]:
    if not run.recipe.adapter.freezes_base:
        yield "it has no adapter, as it was trained in full"
        return
    config = peft.stored_config(str(run.folder.adapter))
    if config.peft_type.value != "LORA":
        yield f"its adapter is {config.peft_type.value.lower()}, no LoRA"
        return
    for field in ("modules_to_save", "trainable_token_indices", "target_parameters"):
        if getattr(config, field, None):
            yield f"it trains more than the matrices of layers ({field}), such as a head"
    if config.use_dora:
        yield "it is a DoRA"


def add(network: Any, others: Sequence[Finished], weights: Sequence[float], method: str, density: float) -> None:
    """Load further adapters beside the first one of a network, join them, and use the result.

    Args:
        network: The first run's base with its adapter.
        others: The other runs.
        weights: As `shares` takes them.
        method: PEFT's name of it.
        density: Share of the values of a matrix that stay, for methods in `SPARSE`.

    Raises:
        ModelError: PEFT refuses the combination, as `linear` does where ranks differ.
    """
    import torch

    names = [peft.ADAPTER, *(f"other{number}" for number in range(len(others)))]
    options = {"density": density} if method in SPARSE else {}
    torch.manual_seed(0)  # what `dare` drops is drawn
    with peft.quiet(), torch.no_grad():
        try:
            for name, run in zip(names[1:], others, strict=True):
                network.load_adapter(str(run.folder.adapter), name)
            network.add_weighted_adapter(names, shares(weights, others), COMBINED, method, **options)
        except (ValueError, RuntimeError, KeyError) as error:
            raise ModelError(f"PEFT can't combine these adapters by {method}: {peft.one_line(error)}") from error
    network.set_adapter(COMBINED)
    network.delete_adapter(peft.ADAPTER)
    for name in names[1:]:
        network.delete_adapter(name)
    network.eval().requires_grad_(False)
