"""AdaLoRA: LoRA whose rank is moved to the layers that need it (https://arxiv.org/abs/2303.10512)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from hf_finetune.adapters import _peft as peft
from hf_finetune.adapters import _targets as targets
from hf_finetune.adapters.base import Adapter, Rates, Setting, State
from hf_finetune.config.blocks import Count, Share
from hf_finetune.config.section import TEXT
from hf_finetune.errors import DivergedError, Problem, RecipeError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, TrainerCallback

# The memory of PEFT's rank allocator of each weight.
SCORES = ("ipt", "exp_avg_ipt", "exp_avg_unc")
Rank = Annotated[int, Field(ge=1, le=65_536)]


class AdaLora(Adapter):
    """Low-rank updates in SVD form; unimportant ranks are pruned while training."""

    usual_rates: ClassVar[Rates | None] = (
        5e-4,
        2.2e-3,
        "Zhang et al. 2023, arXiv 2303.10512, appendix",
    )
    default_rates: ClassVar[tuple[float, float, float]] = (5e-4, 1e-3, 2e-3)

    init_r: Rank = 12
    """Rank of every layer at the start."""
    target_r: Rank = 8
    """Mean rank of the layers at the end."""
    alpha: Annotated[float, Field(gt=0.0, le=1e6)] = 32.0
    """Scale of the update."""
    dropout: Share = 0.0
    """Dropout on the adapters' input."""
    target_modules: Annotated[targets.Spec, TEXT] = targets.ALL_LINEAR
    """`all-linear`, names, or a pattern over module paths."""
    warmup_share: Share = 0.1
    """Share of all steps before the first rank is pruned (`tinit`)."""
    final_share: Share = 0.2
    """Share of all steps at the end in which the ranks stay (`tfinal`)."""
    interval: Count = 10
    """Steps between two prunings (`deltaT`)."""
    beta1: Share = 0.85
    """Decay of the mean of the importance scores."""
    beta2: Share = 0.85
    """Decay of their uncertainty."""
    orthogonal_weight: Annotated[float, Field(ge=0.0, le=1e3)] = 0.5
    """Weight of the penalty that keeps the factors orthogonal."""
    modules_to_save: Annotated[targets.Names | None, TEXT] = None
    """More modules that are trained in full and saved; a new classification head is always among them."""

    @model_validator(mode="after")
    def _ranks_and_phases(self) -> Self:
        if self.target_r >= self.init_r:
            raise ValueError(f"target_r {self.target_r} must be less than init_r {self.init_r}: ranks are only pruned")
        if self.warmup_share + self.final_share >= 1.0:
            raise ValueError("warmup_share and final_share leave no steps to prune in; their sum must be below 1")
        return self

    @property
    def is_saved_as_trained(self) -> bool:
        """Pruned ranks are left out of what is saved."""
        return False

    def check_targets(self, model: PreTrainedModel, setting: Setting) -> None:
        """Every name must match, and `init_r` must fit the matrices."""
        skip = targets.in_full(model, setting.head_modules, self.modules_to_save)
        found = targets.matched(model, self.target_modules, skip, "adapter.target_modules")
        for path, module in found.items():
            targets.check_rank(path, module, self.init_r, "adapter.init_r")

    def apply(self, model: PreTrainedModel, setting: Setting) -> torch.nn.Module:
        """Add the factors and freeze the base.

        Raises:
            RecipeError: A target does not exist, or the run has too few steps for the three phases.
        """
        from peft import AdaLoraConfig

        self.check_targets(model, setting)
        first = int(setting.total_steps * self.warmup_share)
        last = int(setting.total_steps * self.final_share)
        if first >= setting.total_steps - last:
            reason = f"{setting.total_steps} steps are too few for AdaLoRA's phases; train longer"
            raise RecipeError(Problem(reason, key="training"))
        with peft.quiet():
            make: Any = AdaLoraConfig  # PEFT declares alpha an int; it divides by r all the same
            config = make(
                task_type=setting.peft_type,
                init_r=self.init_r,
                target_r=self.target_r,
                lora_alpha=self.alpha,
                lora_dropout=self.dropout,
                target_modules=self.target_modules,
                total_step=setting.total_steps,
                tinit=first,
                tfinal=last,
                deltaT=self.interval,
                beta1=self.beta1,
                beta2=self.beta2,
                orth_reg_weight=self.orthogonal_weight,
                modules_to_save=targets.in_full(model, setting.head_modules, self.modules_to_save) or None,
            )
        return peft.wrap(model, config)

    def finish(self, adapted: torch.nn.Module) -> None:
        """Set pruned ranks to 0."""
        # They drift off between two prunings, and PEFT leaves them out of the file.
        config, tuner = peft.adapter_config(adapted), _tuner(adapted)
        if config.rank_pattern:
            tuner.rankallocator.mask_using_rank_pattern(tuner.model, config.rank_pattern)

    def state(self, adapted: torch.nn.Module) -> State:
        """Return importance scores, their means and uncertainties, and which ranks are left."""
        import torch

        allocator, pattern = _tuner(adapted).rankallocator, peft.adapter_config(adapted).rank_pattern or {}
        scores = {f"{kind} {name}": value for kind in SCORES for name, value in getattr(allocator, kind, {}).items()}
        return scores | {f"ranks {name}": torch.tensor(ranks) for name, ranks in pattern.items()}

    def load_state(self, adapted: torch.nn.Module, state: State) -> None:
        """Put them back."""
        device = next(adapted.parameters()).device
        found: dict[str, dict[str, Any]] = {kind: {} for kind in (*SCORES, "ranks")}
        for key, value in state.items():
            kind, _, name = key.partition(" ")
            # The allocator computes with scores where the gradients lie; its pattern is plain lists.
            found[kind][name] = value.tolist() if kind == "ranks" else value.to(device)
        peft.adapter_config(adapted).rank_pattern = found.pop("ranks")
        for kind, scores in found.items():
            setattr(_tuner(adapted).rankallocator, kind, scores)

    def penalty(self, adapted: torch.nn.Module) -> torch.Tensor | None:
        """Return the mean distance of the factors from orthogonality, weighted (equation 4 of the paper)."""
        # `AdaLoraModel.forward` of PEFT adds it only where the model itself computed a loss.
        import torch

        if not self.orthogonal_weight:
            return None
        terms = []
        for name, factor in adapted.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = factor @ factor.T if "lora_A" in name else factor.T @ factor
                terms.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
        return self.orthogonal_weight * torch.stack(terms).mean()

    def callbacks(self) -> list[TrainerCallback]:
        """Update importance scores and prune ranks after each optimiser step, while the gradients are still there.

        Raises:
            DivergedError: (The callback.) No step before the last pruning was taken.
        """
        from transformers import TrainerCallback

        class Prune(TrainerCallback):
            def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                model = kwargs["model"]
                tuner = _tuner(getattr(model, "module", model))
                config = tuner.peft_config[tuner.trainable_adapter_name]
                step = state.global_step + 1  # it still counts the steps before this one
                last = config.total_step - config.tfinal
                if step == last and not tuner.rankallocator.exp_avg_ipt:
                    reason = f"the optimiser took none of the first {step - 1} steps, so there is nothing to prune by"
                    raise DivergedError(Problem(f"{reason}; lower training.learning_rate, or train in bf16 or fp32"))
                # A step that was not taken has no gradient, or one that is not finite, which would stay in the running
                # means for ever. Only the last pruning can't wait for another step, and takes the scores as they are.
                is_skipped = getattr(kwargs.get("optimizer"), "step_was_skipped", False)  # accelerate's optimisers
                if step == last or not is_skipped:
                    tuner.update_and_allocate(step)

        return [Prune()]


def _tuner(adapted: Any) -> Any:
    return adapted.base_model
