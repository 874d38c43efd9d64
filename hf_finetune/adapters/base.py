"""PEFT methods, one file each, and the contract that every method keeps."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from hf_finetune.adapters import _peft as peft
from hf_finetune.adapters import _targets as targets
from hf_finetune.config.section import Plugin
from hf_finetune.errors import Problem
from hf_finetune.tasks.base import Batch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

State = dict[str, "torch.Tensor"]
# Least and greatest learning rate that a method was published with, for AdamW or Adafactor, and where.
Rates = tuple[float, float, str]


@dataclass(frozen=True)
class Setting:
    """The run, as far as an adapter needs to know it besides its own fields."""

    peft_type: str | None
    """PEFT's name of the task, e.g. `SEQ_CLS`."""
    tokenizer: PreTrainedTokenizerBase | None
    """None where it could not be read, which is an error of its own."""
    total_steps: int = 0
    """Optimiser steps of the whole run; 0 where they are not known yet."""
    head_modules: tuple[str, ...] = ()
    """Modules that the checkpoint did not hold (a fresh classification head): trained in full and saved."""
    labels: tuple[str, ...] = ()
    """Label names in the order of their ids; empty for a task without, and where nobody asks."""
    base_commit: str | None = None
    """Of a base on the Hub."""
    batches: Callable[[], Iterable[Batch]] = field(default=lambda: ())
    """A few training batches on the model's device, for data-driven initialisation."""


class Adapter(Plugin):
    """The contract. `model` is the pretrained model with its task head, `adapted` what `apply` made of it."""

    freezes_base: ClassVar[bool] = True
    """The pretrained weights stay as they are, and may be kept in a lower precision."""
    usual_rates: ClassVar[Rates | None] = None
    """`check` warns of a learning rate far from these."""
    default_rates: ClassVar[tuple[float, float, float]]
    """The learning rate where the recipe gives none: of a language model, of a model with a new head, and of a small
    model."""

    def why_not_quantized(self) -> str | None:
        """Return the reason why this method can't work on quantised base weights, or None where it can."""
        return None

    @property
    def shapes_follow_data(self) -> bool:
        """Data decide the shapes of what is trained, so that `outline` can't tell them."""
        return False

    @property
    def is_saved_as_trained(self) -> bool:
        """Tell that `load` makes the very weights that were trained, so that those of a checkpoint fit into it."""
        return True

    @property
    def starts_at_base(self) -> bool:
        """A model whose adapter is taken out is the one that training began with."""
        return self.freezes_base

    def start(self, model: PreTrainedModel) -> torch.nn.Module:
        """Make a fresh base model the one that training began with."""
        return model

    @abstractmethod
    def check_targets(self, model: PreTrainedModel, setting: Setting) -> None:
        """Check every target name and pattern against the model's modules; weights may be on the meta device.

        Raises:
            ModelError: A target matches no module; the message lists the candidates.
            RecipeError: The adapter that goes on training is another one than the recipe says.
        """

    def remarks(self, model: PreTrainedModel, setting: Setting) -> list[Problem]:
        """Return what stops nothing, and is worth knowing before training; after `check_targets`."""
        return []

    @abstractmethod
    def apply(self, model: PreTrainedModel, setting: Setting) -> torch.nn.Module:
        """Make the model trainable by this method; the base weights end up frozen.

        Raises:
            RecipeError: A target or a token of the recipe does not exist in the model.
        """

    def outline(self, model: PreTrainedModel, setting: Setting) -> torch.nn.Module:
        """Like `apply`, on a model on the meta device: the same shapes and dtypes, no weights read."""
        return self.apply(model, setting)

    def plan(self) -> dict[str, str]:
        """Return sentences for the plan of a run, by name."""
        return {}

    def tied_targets(self, model: torch.nn.Module) -> list[str]:
        """Return targets that are one weight with the other embedding, so that `merge` can't write full weights."""
        return self._tied(model, self)

    def _tied(self, model: torch.nn.Module, config: Any) -> list[str]:
        spec, full = getattr(config, "target_modules", None), getattr(config, "modules_to_save", None)
        return targets.tied(model, spec or targets.ALL_LINEAR, full or ())

    def token_keys(self) -> list[str]:
        """Return the keys of the recipe by which single tokens are trained."""
        return ["adapter.trainable_tokens"] if getattr(self, "trainable_tokens", None) else []

    def save(self, adapted: torch.nn.Module, folder: str, state: State | None = None) -> None:
        """Write what was trained into `folder` as safetensors; it loads on the *unmodified* base.

        The model stays as it is, in every bit: it may be in the middle of its training.

        Args:
            adapted: The trained model.
            folder: Where to.
            state: Its trained weights and buffers in one piece, by their names in it, where it holds parts of them;
                None takes them from it.
        """
        peft.write(folder, peft.adapter_config(adapted), self.tensors(adapted, state))

    def tensors(self, adapted: torch.nn.Module, state: State | None = None) -> State:
        """Return the weights that `save` writes, by the names in its files; arguments as there."""
        return peft.weights(adapted, state)

    def load(self, model: PreTrainedModel, folder: str) -> torch.nn.Module:
        """Put what `save` wrote onto a fresh base model, for inference."""
        return peft.read(model, folder)

    def optimizer(self, adapted: torch.nn.Module, cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> Any:
        """Return an optimiser with this method's own parameter groups, or None for the trainer's."""
        return None

    def state(self, adapted: torch.nn.Module) -> State:
        """For a checkpoint, all that the next step depends on besides the trained weights; names are this method's."""
        return {}

    def load_state(self, adapted: torch.nn.Module, state: State) -> None:
        """Bring back what `state` gave."""

    def penalty(self, adapted: torch.nn.Module) -> torch.Tensor | None:
        """Return a regularisation term that this method adds to the loss of every step, or None."""
        return None

    def finish(self, adapted: torch.nn.Module) -> None:
        """Make the model, after training and on every rank, exactly what `save` writes and `load` reads."""
        return

    def callbacks(self) -> list[TrainerCallback]:
        """Return the method's work between steps."""
        return []
