"""Initialisations of LoRA that look at the base weights or at data, and saving after them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from hf_finetune.adaptation import peftio
from hf_finetune.errors import Problem, RecipeError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from torch import nn
    from transformers import PreTrainedModel

MUTATING = ("pissa", "olora")
"""Initialisations that take the first product of the matrices out of the base weights."""
FACTORISING = (*MUTATING, "eva")
"""Initialisations for linear layers only."""
EVA_PASSES = 400
"""Batches after which EVA gives up."""

EVA_ROWS = 4_096
"""Rows that are kept of layers which see one vector a row."""


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
    adapted: Any = peftio.wrap(model, config)
    with torch.no_grad():
        for path, layer in adapted.base_model.model.named_modules():
            if isinstance(layer, LoraLayer):
                linear: Any = layer
                residual = originals[path].float() - linear.get_delta_weight(peftio.ADAPTER).float()
                linear.get_base_layer().weight.copy_(residual)
    first = {name: value.detach().clone() for name, value in peftio.weights(adapted).items() if ".lora_" in name}
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
    with peftio.quiet():
        initialize_lora_eva_weights(
            adapted,
            inputs,
            prepare_model_inputs_fn=_mask,
            prepare_layer_inputs_fn=_Tokens(),
            gather_distributed_inputs=False,
            show_progress_bar=False,
        )
    peftio.train_in_fp32(adapted)


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

    config = copy.deepcopy(peftio.adapter_config(adapted))
    config.init_lora_weights = True
    config.eva_config = None
    tensors = peftio.weights(adapted, state)
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
