"""(IA)3: learned vectors that scale keys, values and feed-forward inputs (https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Self

from pydantic import model_validator

from hf_finetune.adapters import _peft as peft
from hf_finetune.adapters import _targets as targets
from hf_finetune.adapters._continued import Continued
from hf_finetune.adapters.base import Rates, Setting
from hf_finetune.config.section import TEXT
from hf_finetune.errors import Problem, RecipeError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


class IA3(Continued):
    """Scale activations by learned vectors; very few trained weights."""

    method: ClassVar[str] = "IA3"
    trained: ClassVar[frozenset[str]] = frozenset(
        {"target_modules", "feedforward_modules", "exclude_modules", "fan_in_fan_out", "modules_to_save"}
    )
    usual_rates: ClassVar[Rates | None] = (3e-3, 3e-3, "Liu et al. 2022, arXiv 2205.05638")
    default_rates: ClassVar[tuple[float, float, float]] = (3e-3, 3e-3, 3e-3)

    target_modules: Annotated[targets.Names | None, TEXT] = None
    """Layers that get a vector, by the last part of their path; null takes PEFT's choice for the model type."""
    feedforward_modules: Annotated[targets.Names | None, TEXT] = None
    """Those of `target_modules` whose *input* is scaled instead of the output; null takes PEFT's choice."""
    modules_to_save: Annotated[targets.Names | None, TEXT] = None
    """More modules that are trained in full and saved; a new classification head is always among them."""

    @model_validator(mode="after")
    def _subset(self) -> Self:
        if (self.target_modules is None) != (self.feedforward_modules is None):
            raise ValueError("give target_modules and feedforward_modules together, or neither")
        extra = sorted(set(self.feedforward_modules or ()) - set(self.target_modules or ()))
        if extra:
            raise ValueError(f"feedforward_modules: {', '.join(extra)} must be among target_modules")
        if self.continue_from is not None and (self.target_modules or self.modules_to_save):
            raise ValueError("from: the adapter brings its modules; remove target_modules and modules_to_save")
        return self

    def check_targets(self, model: PreTrainedModel, setting: Setting) -> None:
        """Every name must match, and the model type must be known where there are no names."""
        if self.continue_from is not None:
            self.check_continued(model, setting)
            return
        chosen, feedforward = self._choice(model)
        skip = targets.in_full(model, setting.head_modules, self.modules_to_save)
        targets.matched(model, chosen, skip, "adapter.target_modules")
        targets.matched(model, feedforward, skip, "adapter.feedforward_modules")

    def apply(self, model: PreTrainedModel, setting: Setting) -> torch.nn.Module:
        """Add the vectors, all ones, and freeze the base."""
        return self._wrap(model, setting, reads=True)

    def outline(self, model: PreTrainedModel, setting: Setting) -> torch.nn.Module:
        """Return the vectors; those of a stored adapter by its config."""
        return self._wrap(model, setting, reads=False)

    def _wrap(self, model: PreTrainedModel, setting: Setting, *, reads: bool) -> torch.nn.Module:
        from peft import IA3Config

        self.check_targets(model, setting)
        if self.continue_from is not None:
            return self._resume(model, setting, reads=reads)
        chosen, feedforward = self._choice(model)
        config = IA3Config(
            task_type=setting.peft_type,
            target_modules=chosen,
            feedforward_modules=feedforward,
            modules_to_save=targets.in_full(model, setting.head_modules, self.modules_to_save) or None,
        )
        return peft.wrap(model, config)

    def _choice(self, model: torch.nn.Module) -> tuple[list[str], list[str]]:
        from peft.utils import TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING as FEEDFORWARD
        from peft.utils import TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING as TARGETS

        if self.target_modules is not None and self.feedforward_modules is not None:
            return list(self.target_modules), list(self.feedforward_modules)
        model_type = str(getattr(model.config, "model_type", ""))
        if model_type not in TARGETS or model_type not in FEEDFORWARD:
            reason = f"PEFT knows no (IA)3 targets for {model_type!r}; give these and feedforward_modules"
            raise RecipeError(Problem(reason, key="adapter.target_modules"))
        return list(TARGETS[model_type]), list(FEEDFORWARD[model_type])
