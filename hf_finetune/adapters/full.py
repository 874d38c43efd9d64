"""Training every weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from hf_finetune.adapters import _peft as peft
from hf_finetune.adapters.base import Adapter, Rates, Setting, State
from hf_finetune.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class Full(Adapter):
    """Train the whole model; what is saved is a complete model folder."""

    freezes_base: ClassVar[bool] = False
    usual_rates: ClassVar[Rates | None] = (
        1e-5,
        5e-5,
        "BERT and RoBERTa, arXiv 1810.04805 and 1907.11692",
    )
    default_rates: ClassVar[tuple[float, float, float]] = (2e-5, 2e-5, 2e-4)

    def why_not_quantized(self) -> str | None:
        """Quantised weights take no gradient."""
        return "adapter.kind full trains the base weights, which quantised ones do not allow; use lora"

    def check_targets(self, model: PreTrainedModel, setting: Setting) -> None:
        """Nothing to check: there are no targets."""

    def apply(self, model: PreTrainedModel, setting: Setting) -> torch.nn.Module:
        """Make every weight trainable, in fp32."""
        adapted: torch.nn.Module = model
        return adapted.requires_grad_(True).float()

    def save(self, adapted: torch.nn.Module, folder: str, state: State | None = None) -> None:
        """Write the whole model as safetensors, in fp32."""
        model: Any = adapted
        in_training = getattr(model.config, "use_cache", None)
        if in_training is not None:
            # Off only because training has no use for it; whoever loads the folder generates with it.
            model.config.use_cache = True
        model.save_pretrained(folder, state_dict=state)
        if state is not None:
            # transformers writes the dtype in which this rank holds its part, not that of the weights in one piece.
            model.config.dtype = next(value.dtype for value in state.values() if value.is_floating_point())
            model.config.save_pretrained(folder)
        if in_training is not None:
            model.config.use_cache = in_training

    def tensors(self, adapted: torch.nn.Module, state: State | None = None) -> State:
        """Return every weight."""
        return adapted.state_dict() if state is None else state

    def load(self, model: PreTrainedModel, folder: str) -> torch.nn.Module:
        """Put the saved weights into `model`.

        Raises:
            ModelError: The folder holds another model, or none that can be read.
        """
        from safetensors import SafetensorError

        try:
            saved = type(model).from_pretrained(folder, use_safetensors=True, dtype=model.dtype)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelError(f"{folder}: the trained weights can't be read: {peft.one_line(error)}") from error
        result = model.load_state_dict(saved.state_dict(), strict=False)
        if others := [*result.missing_keys, *result.unexpected_keys]:
            raise ModelError(f"{folder}: holds other weights than this model, e.g. {others[0]}")
        model.requires_grad_(False)
        return model
