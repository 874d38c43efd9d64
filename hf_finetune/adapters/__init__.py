"""How the model is made trainable: one file a PEFT method, and the contract that every method keeps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from hf_finetune.plugins import Plugin

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

    from hf_finetune.tasks.base import Batch


@dataclass(frozen=True)
class Setting:
    """What an adapter needs to know of the run besides its own fields."""

    peft_type: str
    """PEFT's name of the task, e.g. `SEQ_CLS`."""
    tokenizer: PreTrainedTokenizerBase
    total_steps: int
    """Optimiser steps of the whole run."""
    head_modules: tuple[str, ...] = ()
    """Modules that the checkpoint did not hold (a fresh classification head): trained in full and saved."""
    labels: tuple[str, ...] = ()
    """Label names in the order of their ids; empty for a task without, and where nobody asks."""
    batches: Callable[[], Iterable[Batch]] = field(default=lambda: ())
    """A few training batches on the model's device, for data-driven initialisation."""


@dataclass(frozen=True)
class Rates:
    """Learning rates that a method was published with, for AdamW or Adafactor."""

    least: float
    most: float
    source: str


class Adapter(Plugin):
    """The contract. `model` is the pretrained model with its task head, `adapted` what `apply` made of it."""

    freezes_base: ClassVar[bool] = True
    """Whether the pretrained weights stay as they are; they may then be kept in a lower precision."""
    usual_rates: ClassVar[Rates | None] = None
    """What a learning rate is compared with before training; None compares with nothing."""

    def why_not_quantized(self) -> str | None:
        """Why this method can't work on quantised base weights, or None where it can."""
        return None

    @property
    def shapes_follow_data(self) -> bool:
        """Whether `outline` can't tell the shapes of what is trained, because data decide them."""
        return False

    @abstractmethod
    def check_targets(self, model: torch.nn.Module, head_modules: tuple[str, ...]) -> None:
        """Check every target name and pattern against the model's modules; weights may be on the meta device.

        Raises:
            ModelError: A target matches no module; the message lists the candidates.
        """

    @abstractmethod
    def apply(self, model: PreTrainedModel, setting: Setting) -> torch.nn.Module:
        """Make the model trainable by this method; the base weights end up frozen.

        Raises:
            RecipeError: A target or a token of the recipe does not exist in the model.
        """

    def outline(self, model: PreTrainedModel, setting: Setting) -> torch.nn.Module:
        """What `apply` would make of a model on the meta device: the same shapes and dtypes, no weights read."""
        return self.apply(model, setting)

    @abstractmethod
    def save(self, adapted: torch.nn.Module, folder: str, state: dict[str, torch.Tensor] | None = None) -> None:
        """Write what was trained into `folder` as safetensors; it loads on the *unmodified* base.

        The model stays as it is, in every bit: it may be in the middle of its training.

        Args:
            adapted: The trained model.
            folder: Where to.
            state: Its trained weights and buffers in one piece, by their names in it, where it holds parts of them;
                None takes them from it.
        """

    @abstractmethod
    def tensors(
        self, adapted: torch.nn.Module, state: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """What `save` writes as weights, by the names in its files; arguments as there."""

    @abstractmethod
    def load(self, model: PreTrainedModel, folder: str) -> torch.nn.Module:
        """Put what `save` wrote onto a fresh base model, for inference."""

    def optimizer(self, adapted: torch.nn.Module, cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> Any:
        """An optimiser with this method's own parameter groups, or None for the trainer's."""
        return None

    def state(self, adapted: torch.nn.Module) -> dict[str, torch.Tensor]:
        """What the next step depends on besides the trained weights, for a checkpoint; names are this method's own."""
        return {}

    def load_state(self, adapted: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
        """Bring back what `state` gave."""

    def penalty(self, adapted: torch.nn.Module) -> torch.Tensor | None:
        """A regularisation term that this method adds to the loss of every step, or None."""
        return None

    def finish(self, adapted: torch.nn.Module) -> None:
        """Make the model, after training and on every rank, exactly what `save` writes and `load` reads."""
        return

    def callbacks(self) -> list[TrainerCallback]:
        """What this method must do between steps."""
        return []
