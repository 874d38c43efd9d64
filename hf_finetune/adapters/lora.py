"""LoRA and its variants: rsLoRA, DoRA, LoRA+, and the initialisations PiSSA, OLoRA and EVA."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from hf_finetune.adapters import _peft as peft
from hf_finetune.adapters import _targets as targets
from hf_finetune.adapters._continued import Continued, adapted_modules, is_covered
from hf_finetune.adapters.base import Rates, Setting, State
from hf_finetune.config.blocks import Share
from hf_finetune.config.section import TEXT
from hf_finetune.errors import Problem, RecipeError

if TYPE_CHECKING:
    import torch
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

Rank = Annotated[int, Field(ge=1, le=65_536)]
Alpha = Annotated[float, Field(gt=0.0, le=1e6)]
DEFAULT_RANK = 8

# Initialisations that take the first product of the matrices out of the base weights.
MUTATING = ("pissa", "olora")
# Initialisations for linear layers only.
FACTORISING = (*MUTATING, "eva")
# Batches after which EVA gives up.
EVA_PASSES = 400
# Rows that are kept of layers which see one vector a row.
EVA_ROWS = 4_096


class Lora(Continued):
    """Add a trained product of two thin matrices to frozen layers (https://arxiv.org/abs/2106.09685)."""

    method: ClassVar[str] = "LORA"
    trained: ClassVar[frozenset[str]] = frozenset({
        "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules",
        "layers_to_transform", "layers_pattern", "fan_in_fan_out", "use_rslora", "use_dora", "modules_to_save",
        "rank_pattern", "alpha_pattern", "trainable_token_indices",
    })  # fmt: skip
    usual_rates: ClassVar[Rates | None] = (
        6e-5,
        5e-4,
        "Hu et al. 2021, arXiv 2106.09685, appendix D",
    )
    default_rates: ClassVar[tuple[float, float, float]] = (2e-4, 5e-4, 1e-3)

    r: Rank | None = None
    """Rank of the update; null is 8, or what `from` has."""
    alpha: Alpha | None = None
    """Scale: the update is multiplied by alpha / r, with `rslora` by alpha / sqrt(r); null is 2 x r, or what `from`
    has."""
    dropout: Share = 0.0
    """Dropout on the adapters' input."""
    target_modules: Annotated[targets.Spec | None, TEXT] = None
    """`all-linear` (every linear layer but the heads), names such as [q_proj, v_proj], or a pattern that whole module
    paths must match; null is `all-linear`, or what `from` has."""
    target_parameters: Annotated[targets.Names | None, TEXT] = None
    """Weights that belong to no linear layer, by the end of their paths: the fused experts of a mixture-of-experts
    model, such as [mlp.experts.gate_up_proj, mlp.experts.down_proj]."""
    rslora: bool = False
    """Scale by alpha / sqrt(r), which suits large ranks (https://arxiv.org/abs/2312.03732)."""
    dora: bool = False
    """Train the magnitude of each weight column apart from its direction (https://arxiv.org/abs/2402.09353)."""
    init: Literal["default", "gaussian", "pissa", "olora", "eva"] = "default"
    """First values of the matrices. `pissa` and `olora` factorise the base weights, `eva` looks at training batches;
    what is saved is plain LoRA all the same, after `pissa` and `olora` of twice the rank."""
    loraplus_ratio: Annotated[float, Field(ge=1.0, le=1e6)] | None = None
    """LoRA+: learning rate of the B matrices over that of the A matrices (https://arxiv.org/abs/2402.12354)."""
    rank_pattern: Annotated[dict[targets.Pattern, Rank], TEXT] = Field(default_factory=dict)
    """Other ranks for some layers: pattern at the end of the module path -> r."""
    alpha_pattern: Annotated[dict[targets.Pattern, Alpha], TEXT] = Field(default_factory=dict)
    """Other alphas for some layers: pattern at the end of the module path -> alpha."""
    modules_to_save: Annotated[targets.Names | None, TEXT] = None
    """More modules that are trained in full and saved; a new classification head is always among them."""
    trainable_tokens: Annotated[targets.Names | None, TEXT] = None
    """Tokens whose embeddings are trained, as the tokenizer writes them, e.g. `<|im_end|>`; with an output layer of its
    own weights, its rows for them too."""

    @model_validator(mode="after")
    def _continuation(self) -> Self:
        if self.continue_from is not None and self.init != "default":
            raise ValueError(f"init {self.init!r} is for a new adapter; remove it or `from`")
        return self

    @model_validator(mode="after")
    def _plain_parameters(self) -> Self:
        if self.target_parameters is not None and (self.dropout or self.dora):
            raise ValueError("target_parameters take neither dropout nor dora; set dropout: 0.0 and dora: false")
        return self

    def why_not_quantized(self) -> str | None:
        """PiSSA and OLoRA move part of the base weights into the adapter."""
        if self.init not in MUTATING:
            return None
        return f"adapter.init {self.init} changes the base weights, and what is saved would miss the rounding; use eva"

    @property
    def starts_at_base(self) -> bool:
        """PiSSA and OLoRA take a part of the base weights away."""
        return super().starts_at_base and self.init not in MUTATING

    @property
    def shapes_follow_data(self) -> bool:
        """EVA moves ranks between layers."""
        return self.init == "eva"

    @property
    def is_saved_as_trained(self) -> bool:
        """PiSSA and OLoRA train on a base of which a part was taken out."""
        return self.init not in MUTATING

    def check_targets(self, model: PreTrainedModel, setting: Setting) -> None:
        """Every name and pattern must match, and every rank must fit its matrix."""
        if self.continue_from is not None:
            self.check_continued(model, setting)
            return
        skip, rank = targets.in_full(model, setting.head_modules, self.modules_to_save), self.r or DEFAULT_RANK
        found = targets.matched(model, self.target_modules or targets.ALL_LINEAR, skip, "adapter.target_modules")
        ranks = targets.by_pattern(found, self.rank_pattern, rank, "adapter.rank_pattern")
        targets.by_pattern(found, self.alpha_pattern, 0.0, "adapter.alpha_pattern")
        for path, module in found.items():
            key = "adapter.r" if ranks[path] == rank else "adapter.rank_pattern"
            targets.check_rank(path, module, int(ranks[path]), key)
        targets.check_parameters(model, self.target_parameters or (), "adapter.target_parameters")
        if self.init in FACTORISING:
            check_layers(found, self.init)

    def apply(self, model: PreTrainedModel, setting: Setting) -> torch.nn.Module:
        """Add the matrices, initialise them, and freeze the base."""
        self.check_targets(model, setting)
        if self.dora and getattr(model, "is_loaded_in_8bit", False) and model.device.type == "cpu":
            # PEFT's `dequantize_module_weight` loses the scales of 8-bit weights on a CPU.
            raise RecipeError(
                Problem("does not run on 8-bit weights on a CPU; use nf4 or turn it off", key="adapter.dora")
            )
        if self.continue_from is not None:
            return self._resume(model, setting, reads=True)
        with peft.quiet():
            config = self._config(model, setting)
        if self.init in MUTATING:
            return factorise_base(model, config)
        adapted = peft.wrap(model, config)
        if self.init == "eva":
            initialise_with_eva(adapted, setting.batches)
        return adapted

    def outline(self, model: PreTrainedModel, setting: Setting) -> torch.nn.Module:
        """The matrices without their first values, which weights or data decide; a stored adapter by its config."""
        if self.continue_from is not None:
            self.check_targets(model, setting)
            return self._resume(model, setting, reads=False)
        return self.model_copy(update={"init": "default"}).apply(model, setting)

    def save(self, adapted: torch.nn.Module, folder: str, state: State | None = None) -> None:
        """Write plain LoRA for the unmodified base, whatever the initialisation was."""
        peft.write(folder, *for_unmodified_base(adapted, state))

    def tensors(self, adapted: torch.nn.Module, state: State | None = None) -> State:
        """Return those of plain LoRA for the unmodified base."""
        return for_unmodified_base(adapted, state)[1]

    def optimizer(self, adapted: torch.nn.Module, cls: type[torch.optim.Optimizer], options: dict[str, Any]) -> Any:
        """Return PEFT's LoRA+ groups where `loraplus_ratio` is set."""
        if self.loraplus_ratio is None:
            return None
        from peft.optimizers import create_loraplus_optimizer

        options = dict(options)
        decay = options.pop("weight_decay", 0.0)
        create: Any = create_loraplus_optimizer
        return create(adapted, cls, loraplus_lr_ratio=self.loraplus_ratio, loraplus_weight_decay=decay, **options)

    def _config(self, model: PreTrainedModel, setting: Setting) -> LoraConfig:
        from peft import LoraConfig

        make: Any = LoraConfig  # PEFT declares alpha an int; it divides by r all the same
        rank = self.r or DEFAULT_RANK
        config: LoraConfig = make(
            task_type=setting.peft_type,
            r=rank,
            lora_alpha=self.alpha or 2 * rank,
            lora_dropout=self.dropout,
            target_modules=self.target_modules or targets.ALL_LINEAR,
            target_parameters=self.target_parameters,
            use_rslora=self.rslora,
            use_dora=self.dora,
            init_lora_weights=True if self.init == "default" else self.init,
            rank_pattern=dict(self.rank_pattern),
            alpha_pattern=dict(self.alpha_pattern),
            modules_to_save=targets.in_full(model, setting.head_modules, self.modules_to_save) or None,
            trainable_token_indices=self._tokens(model, setting),
        )
        return config

    def _tokens(self, model: PreTrainedModel, setting: Setting) -> dict[str, list[int]] | None:
        """Return module path -> token ids, for the input embedding and an output layer with weights of its own."""
        if self.trainable_tokens is None or setting.tokenizer is None:
            return None
        key, known = "adapter.trainable_tokens", setting.tokenizer.get_vocab()
        if unknown := [repr(token) for token in self.trainable_tokens if token not in known]:
            reason = f"{', '.join(unknown)}: not in the tokenizer's vocabulary; write tokens as it has them"
            raise RecipeError(Problem(reason, key=key))
        ids = sorted({known[token] for token in self.trainable_tokens})
        embedding: Any = model.get_input_embeddings()
        output: Any = targets.output_embedding(model)
        if ids[-1] >= embedding.num_embeddings:
            reason = f"token {ids[-1]} has no row in the embedding of {embedding.num_embeddings} rows"
            raise RecipeError(Problem(reason, key=key))
        layers = [embedding]
        # A tied output layer takes its rows from the embedding, so they are trained once.
        if output is not None and output.weight is not embedding.weight:
            layers.append(output)
        return {path: list(ids) for layer in layers for path, module in model.named_modules() if module is layer}

    @property
    def anew(self) -> dict[str, Any]:
        """The dropout; and first values are those of the file."""
        return {"lora_dropout": self.dropout, "init_lora_weights": True}

    def contradictions(self, model: PreTrainedModel, setting: Setting, stored: Any) -> Iterator[Problem]:
        """Find settings that are given and that the stored adapter has otherwise; a default contradicts nothing."""
        tokens, wanted_tokens = stored.trainable_token_indices, self._tokens(model, setting)
        if isinstance(tokens, list) and wanted_tokens:  # PEFT's short form: of the input embedding
            tokens = {next(iter(wanted_tokens)): sorted(tokens)}
        asked = {
            "r": (self.r, stored.r),
            "alpha": (self.alpha, stored.lora_alpha),
            "rslora": (self.rslora or None, stored.use_rslora),
            "dora": (self.dora or None, stored.use_dora),
            "rank_pattern": (self.rank_pattern or None, stored.rank_pattern),
            "alpha_pattern": (self.alpha_pattern or None, stored.alpha_pattern),
            "target_parameters": (self.target_parameters, stored.target_parameters),
            "trainable_tokens": (wanted_tokens, tokens),
        }
        for name, (wanted, has) in asked.items():
            if wanted is not None and wanted != has:
                reason = f"{wanted} contradicts the adapter in `from`, which has {has}; remove it"
                yield Problem(reason, key=f"adapter.{name}")
        full = list(stored.modules_to_save or ())
        for path in sorted(targets.in_full(model, (), self.modules_to_save)):
            if not is_covered(path, full):
                reason = f"{path} is not trained in full by the adapter in `from`; remove it"
                yield Problem(reason, key="adapter.modules_to_save")
        if self.target_modules is not None:
            # Modules, not spellings: `all-linear`, a pattern and a list of names may mean the same.
            skip = [*setting.head_modules, *full]
            wants = set(targets.matched(model, self.target_modules, skip, "adapter.target_modules"))
            has = adapted_modules(self.folder())
            sides = [("only the recipe", wants - has), ("only the adapter", has - wants)]
            if more := [f"{which} has {len(paths)}, e.g. {min(paths)}" for which, paths in sides if paths]:
                names = ", ".join(sorted({path.rpartition(".")[2] for path in has}))
                reason = f"differs from the adapter in `from`, which has {len(has)} modules ({names})"
                yield Problem(f"{reason}: {'; '.join(more)}; remove it", key="adapter.target_modules")


def check_layers(modules: dict[str, torch.nn.Module], init: str) -> None:
    """Refuse layers that an initialisation does not know.

    Raises:
        RecipeError: A layer is not linear, or for OLoRA a transposed one (PEFT factorises it the wrong way round).
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    allowed = torch.nn.Linear if init == "olora" else torch.nn.Linear | Conv1D
    for path, module in modules.items():
        if not isinstance(module, allowed):
            reason = f"{init} does not work on {path!r}, a {type(module).__name__}; use another init or other targets"
            raise RecipeError(Problem(reason, key="adapter.init"))


def factorise_base(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """Wrap with PiSSA or OLoRA and remember the first matrices."""
    import torch
    from peft.tuners.lora import LoraLayer

    originals = {path: module.weight for path, module in model.named_modules() if hasattr(module, "weight")}
    originals = {path: weight.detach().clone() for path, weight in originals.items() if weight.ndim == 2}
    adapted: Any = peft.wrap(model, config)
    # The residual is computed again in fp32 from the weights as they were: PEFT rounds the matrices to the dtype of the
    # base *after* it took their unrounded product out of it.
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


def changed_base(adapted: torch.nn.Module) -> bool:
    """Tell a model of which part of the base weights was moved into its adapter."""
    return hasattr(adapted, "first_matrices")


def initialise_with_eva(adapted: PeftModel, batches: Callable[[], Iterable[dict[str, Any]]]) -> None:
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
    adapted: torch.nn.Module, state: dict[str, torch.Tensor] | None = None
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Return the configuration and tensors of this adapter as plain LoRA on the base as it was before `apply`.

    With first matrices A0, B0 the base holds W - s B0 A0, so the update of W is s (B A - B0 A0) = s [B | -B0] [A ; A0].

    Args:
        adapted: The trained model.
        state: As for `Adapter.save`.
    """
    import torch

    # PEFT's own conversion (`subtract_mutated_init`) drops all but these matrices: DoRA's magnitudes, fully trained
    # modules and trained tokens. And it refuses rsLoRA with patterns.
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
    """Return the row and position of every token that is no padding, (N, 2)."""
    # PEFT's own function would also read `labels` as token labels.
    mask = inputs.get("attention_mask")
    return None if mask is None or mask.ndim != 2 else mask.nonzero()


class _Tokens:
    """Inputs of a layer as (tokens, features), without padding."""

    def __init__(self) -> None:
        self.kept: dict[str, torch.Tensor] = {}

    def __call__(self, layer_input: Any, mask: torch.Tensor | None, name: str) -> torch.Tensor:
        import torch

        values: torch.Tensor = layer_input[0] if isinstance(layer_input, tuple | list) else layer_input
        # PEFT's own function fails on layers that see one vector a row (BERT's pooler). Of those, earlier batches are
        # kept: one alone has fewer rows than EVA needs.
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
