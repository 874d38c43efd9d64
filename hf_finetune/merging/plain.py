"""The folder as anyone loads it: plain transformers, nothing of this project's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from hf_finetune.errors import ModelError
from hf_finetune.merging import scoring
from hf_finetune.model.pretrained import silence

if TYPE_CHECKING:
    from hf_finetune.finished import Finished
    from hf_finetune.merging.scoring import Logits, Predict
    from hf_finetune.tasks.base import Batch

ROOM = 1.5
"""Memory that a GPU must have free, as a multiple of the weights: activations need some, too."""


def load(folder: Path, run: Finished, **options: Any) -> Any:
    """The model in the folder, in eval mode, on the run's device where it fits there.

    Args:
        folder: A model folder.
        run: Says which class, and where to put it.
        options: More of `from_pretrained`.

    Raises:
        ModelError: It does not load, or not from this folder alone.
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
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"what was written does not load in transformers: {reason}; report it") from error
    lost = sorted({*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if lost:
        raise ModelError(f"what was written does not load whole in transformers, e.g. {lost[0]}; report it")
    return put(network, run.machine.device).eval()


def put(network: Any, device: str) -> Any:
    """Move a model to the device, or leave it on the CPU where a GPU has no room for it."""
    needed = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    if device == "cuda" and torch.cuda.mem_get_info()[0] <= ROOM * needed:
        return network.to("cpu")
    return network.to(device)


def logits_of(network: Any) -> Logits:
    """How a network gives logits: without gradients, in its own dtype, no cache kept."""
    options = {"use_cache": False} if hasattr(network.config, "use_cache") and _caches(network) else {}

    def run(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            inputs = {name: value.to(network.device) for name, value in batch.items()}
            logits: torch.Tensor = network(**inputs, **options).logits
            return logits

    return run


def predictor(network: Any, run: Finished) -> Predict:
    """Predictions by a network."""
    logits, device = logits_of(network), network.device
    predict = scoring.predictor(logits, run)
    return lambda batch: predict({name: value.to(device) for name, value in batch.items()})


def _caches(network: Any) -> bool:
    """Whether it is a decoder, whose forward takes `use_cache`."""
    inner = network.get_base_model() if hasattr(network, "get_base_model") else network
    return bool(inner.can_generate())
