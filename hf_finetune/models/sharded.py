"""Weights and optimiser state that ranks share out: PyTorch's FSDP2, and DeepSpeed's ZeRO.

With FSDP2, rank 0 alone reads the weights where nothing is against it. The others hold the same modules around memory
that was not written to, which the system does not provide before; accelerate hands out the shards.

DeepSpeed's engine takes the optimiser's step inside accelerate's `backward`, clips, and divides the state among the
ranks. Here the step is held back until the loss has been looked at; DeepSpeed itself looks at the gradients before it
changes a weight. Checkpoints are its own: each rank writes its part of the optimiser.
"""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch import distributed, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_finetune import device
from hf_finetune.adapters._targets import base_model, input_embedding, output_embedding
from hf_finetune.device import Machine
from hf_finetune.errors import CheckpointError, ModelError, Problem, RecipeError
from hf_finetune.models import load as models_load
from hf_finetune.models.load import LoadedModel
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import State

# Key -> values that FSDP2 can't train, and why.
NOT_WITH_FSDP = {
    "training.optimizer": {
        # bitsandbytes 0.50 has no sharding strategy for its update.
        "adamw_8bit": "adamw_8bit does not update sharded weights; write adamw, whose state is sharded too",
        # transformers 5.23 mixes its plain row and column means with sharded gradients.
        "adafactor": "adafactor does not update sharded weights; write adamw, whose state is sharded too",
    },
    # bitsandbytes 0.50: Int8Params can't be made from a shard.
    "model.quantization": {"int8": "int8 weights can't be sharded; write nf4 or remove it"},
    # PEFT 0.21 scores and prunes whole matrices, and a sharded checkpoint would lack its scores.
    "adapter.kind": {"adalora": "adalora needs whole matrices to prune them, and these are sharded; write lora"},
}

# accelerate's variable for `fsdp_cpu_ram_efficient_loading`; transformers and accelerate read it as well.
READS_ONCE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
# For reading the weights; a rank that dies meanwhile is noticed by `peers`.
LONGEST = timedelta(days=1)
POLL_S = 0.05


def check_zero(recipe: Recipe, machine: Machine) -> list[Problem]:
    """Find settings of a recipe that do not work under DeepSpeed, or would be another optimisation."""
    config, problems = device.deepspeed_config(), list[Problem]()
    if config is None:
        return []
    if machine.device == "cpu":
        # accelerate 1.15 would run plain DDP and say nothing.
        problems.append(Problem("DeepSpeed needs GPUs; take accelerate_configs/cpu_2_processes_fsdp2.yaml"))
    if not machine.zero_stage:
        problems.append(
            Problem("DeepSpeed without ZeRO is not supported; set zero_stage to 1, 2 or 3, or take ddp.yaml")
        )
    for section in ("optimizer", "scheduler"):
        if section in config:
            message = f"has a section {section!r}, but the recipe decides that; remove it from there"
            problems.append(Problem(message, file=os.environ[device.DEEPSPEED_CONFIG]))
    if recipe.adapter.kind == "adalora":
        message = "adalora needs whole gradients, which DeepSpeed divides; use lora, or ddp.yaml"
        problems.append(Problem(message, key="adapter.kind"))
    if recipe.training.optimizer == "adafactor":
        message = "adafactor factors matrices, which DeepSpeed flattens: it would be another optimiser; use adamw"
        problems.append(Problem(message, key="training.optimizer"))
    if machine.zero_stage == 3 and recipe.model.quantization is not None:
        message = f"ZeRO-3 can't divide {recipe.model.quantization} weights; take ddp.yaml or ZeRO-2, or remove it"
        problems.append(Problem(message, key="model.quantization"))
    return problems


def check_checkpoint(checkpoint: Path, ranks: int, machine: Machine) -> None:
    """Refuse a checkpoint of so many ranks that this launch can't go on from.

    Raises:
        CheckpointError: It was written with another way of dividing the state, or by another number of ranks.
    """
    names = {0: "without DeepSpeed", 2: "with DeepSpeed ZeRO-1 or 2", 3: "with DeepSpeed ZeRO-3"}
    files = {3: "zero_pp_rank_*_model_states.pt", 2: "mp_rank_*_model_states.pt"}
    written = next((stage for stage, name in files.items() if any(checkpoint.glob(f"global_step*/{name}"))), 0)
    own = 2 if machine.zero_stage == 1 else machine.zero_stage
    if written != own:
        how = "start it with the launcher configuration of its beginning, or give --restart to start anew"
        message = f"was written {names[written]}, this start is {names[own]}; {how}"
        raise CheckpointError(Problem(message, file=str(checkpoint)))
    if written and ranks != machine.world_size:
        how = f"start {ranks} processes, or give --restart to start anew"
        message = f"DeepSpeed divided it among {ranks} ranks, and can't go on with {machine.world_size}; {how}"
        raise CheckpointError(Problem(message, file=str(checkpoint)))


def read_no_code() -> None:
    """Have torch refuse what is neither a number nor a record of DeepSpeed in a checkpoint."""
    # DeepSpeed reads its files with `weights_only=False`, which would run any code that somebody has put there.
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def hold_back(accelerator: Any) -> None:
    """Have backward passes of a prepared model leave the step to `step`, and look at gradients of any dtype."""
    wrapper = accelerator.deepspeed_engine_wrapped
    engine = wrapper.engine

    def backward(loss: torch.Tensor, sync_gradients: bool = True, **options: Any) -> None:
        engine.set_gradient_accumulation_boundary(is_boundary=sync_gradients)
        engine.backward(loss, **options)

    wrapper.backward = backward
    if hasattr(engine.optimizer, "check_grad_overflow"):
        # ZeRO-1 and 2 look at fp16 and bf16 gradients alone (DeepSpeed 0.19.8, `_configure_zero_optimizer`).
        engine.optimizer.check_grad_overflow = True


def step(engine: Any) -> tuple[bool, float]:
    """Clip and take the optimiser's step, unless a gradient is not finite.

    Returns:
        True if the step was taken, and the norm of the gradient before clipping; not a number where DeepSpeed was
        told to compute none.

    Raises:
        ModelError: This DeepSpeed took a step with a gradient that is not finite.
    """
    engine.step()
    found = engine.get_global_grad_norm()
    norm, is_taken = math.nan if found is None else float(found), bool(engine.was_step_applied())
    if is_taken and found is not None and not math.isfinite(norm):
        raise ModelError("DeepSpeed took a step with a gradient that is not finite; install deepspeed 0.19.8 or newer")
    return is_taken, norm


def trained(model: Any, *, keeps: bool) -> dict[str, torch.Tensor]:
    """Return the trained weights whole, in fp32 and on the CPU, and what buffers are saved; all ranks gather together.

    Args:
        model: Below the engine.
        keeps: This rank wants them; the others give their parts, and hold one weight at a time.

    Raises:
        ModelError: DeepSpeed does not give one of them.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    found: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            whole = safe_get_full_fp32_param(parameter)
            if whole is None:
                raise ModelError(f"DeepSpeed did not give back the trained weight {name}; keep the checkpoints")
            if keeps:
                found[name] = whole.detach().to("cpu", copy=True).view(getattr(parameter, "ds_shape", parameter.shape))
    stored = model.state_dict().keys()
    return found | {name: value.cpu() for name, value in model.named_buffers() if name in stored}


def load(
    recipe: Recipe,
    targets: State,
    machine: Machine,
    tokenizer: PreTrainedTokenizerBase,
    outline: PreTrainedModel,
) -> LoadedModel:
    """Load the base on every rank: see `models.load.load`; each rank calls it at the same moment."""

    def read() -> LoadedModel:
        loaded = models_load.load(recipe, targets, machine, tokenizer, outline)
        if recipe.data.packing:
            recipe.task.check_packing(loaded.model)
        return loaded

    if not reads_once(recipe, machine, outline):
        return read()
    group = distributed.new_group(backend="gloo", timeout=LONGEST)
    sent: list[Any] = [None]
    if machine.rank == 0:
        loaded = read()
        # Parameters on the meta device, each under the names that it has; buffers are copied.
        kept = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in loaded.model.parameters()}
        sent = [replace(loaded, model=copy.deepcopy(loaded.model, kept), is_shell=True)]
    is_read: Any = distributed.broadcast(torch.zeros(1), src=0, group=group, async_op=True)
    # The others look again and again: in a collective, they would count as ranks that wait for one that hangs.
    while not is_read.is_completed():
        time.sleep(POLL_S)
    distributed.broadcast_object_list(sent, src=0, group=group)
    if machine.rank == 0:
        return loaded
    received: LoadedModel = sent[0]
    # Memory of the CPU, which is only addresses until it is written to. On the meta device all parameters have the
    # address 0, by which accelerate tells them apart for the optimiser.
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module, name, parameter in _places(received.model):
        if parameter not in made:
            made[parameter] = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
        module._parameters[name] = made[parameter]
    return received


def check_launch(recipe: Recipe, machine: Machine) -> None:
    """Refuse recipes that can't be trained with weights or state divided as the launcher says, with a RecipeError."""
    problems = check_zero(recipe, machine)
    if device.uses_fsdp():
        asked = {
            "training.optimizer": recipe.training.optimizer,
            "model.quantization": recipe.model.quantization,
            "adapter.kind": recipe.adapter.kind,
        }
        for key, value in asked.items():
            if value is not None and value in NOT_WITH_FSDP[key]:
                problems.append(Problem(NOT_WITH_FSDP[key][value], key=key))
        if "LOCAL_RANK" not in os.environ:
            # accelerate would train without FSDP and say nothing.
            problems.append(Problem("FSDP needs a launcher; start this with accelerate launch or torchrun"))
        if os.environ.get("FSDP_VERSION", "1") != "2":
            message = "FSDP 1 is not supported; set fsdp_version: 2, as in accelerate_configs/fsdp2.yaml"
            problems.append(Problem(message))
    if problems:
        raise RecipeError(problems)


def check(recipe: Recipe, machine: Machine, outline: PreTrainedModel) -> None:
    """Refuse what FSDP2 can't shard of this model.

    Raises:
        RecipeError: Single tokens of tied embeddings are to be trained: PEFT shares their rows between two layers.
    """
    output = output_embedding(outline)
    is_tied = output is not None and output.weight is outline.get_input_embeddings().weight
    if not (uses_fsdp(machine) and is_tied):
        return
    why = "single tokens can't be trained where input and output embedding are one sharded weight"
    if keys := recipe.adapter.token_keys():
        raise RecipeError(
            [Problem(f"{why}; remove it, use modules_to_save, or train with DDP", key=key) for key in keys]
        )


def refuse_other_format(checkpoint: Path, machine: Machine) -> None:
    """Refuse a checkpoint that was written with FSDP, if this run is without, and the other way round."""
    has_shards = any(checkpoint.glob(f"{FSDP_MODEL_NAME}*"))
    if has_shards != uses_fsdp(machine):
        was, now = ("with", "without") if has_shards else ("without", "with")
        message = f"was written {was} FSDP, and this run is {now}; start it as it was, or give --restart to start anew"
        raise CheckpointError(Problem(message, file=str(checkpoint)))


def uses_fsdp(machine: Machine) -> bool:
    """The weights are sharded, by FSDP and not by DeepSpeed."""
    return machine.is_sharded and device.uses_fsdp()


def reads_once(recipe: Recipe, machine: Machine, outline: PreTrainedModel) -> bool:
    """Decide if rank 0 alone reads the weights, and tell transformers and accelerate.

    accelerate 1.15 can't hand out quantised weights or persistent buffers, and an adapter whose shapes follow from data
    needs the weights on each rank.
    """
    if not uses_fsdp(machine):
        return False
    asked = os.environ.get(READS_ONCE, "").lower() in {"1", "true", "yes"} and machine.world_size > 1
    has_buffers = bool(
        outline.state_dict().keys() - {name for name, _ in outline.named_parameters(remove_duplicate=False)}
    )
    possible = recipe.model.quantization is None and not has_buffers and not recipe.adapter.shapes_follow_data
    os.environ[READS_ONCE] = str(asked and possible).lower()
    return asked and possible


def suit(accelerator: Accelerator, adapted: nn.Module, machine: Machine) -> None:
    """Make the model fit for FSDP2, and set all that a launcher's configuration can't know of it; nothing without FSDP.

    The trainer that the accelerator belongs to has not begun.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    untie(adapted)
    base = base_model(adapted)
    if plugin.auto_wrap_policy is transformer_auto_wrap_policy:
        plugin.transformer_cls_names_to_wrap = units(base, plugin.transformer_cls_names_to_wrap)
    if machine.precision != "fp32":
        # accelerate would add up gradients in half precision, over micro-batches and over ranks.
        half = device.DTYPES[machine.precision]
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=torch.float32, output_dtype=half
        )


def untie(adapted: nn.Module) -> None:
    """Give input and output embedding frozen weights of their own, where an adapter works on one of them.

    accelerate 1.15 ties weights again after it has sharded them, as the config says and by names that an adapter's
    layers have changed: that fails, or trains something else. Each rank calls it.
    """
    base = base_model(adapted)
    embeddings = (input_embedding(base), output_embedding(base))
    is_adapted = any(type(layer).__module__.startswith("peft.") for layer in embeddings)
    seen: set[nn.Parameter] = set()
    is_tied = False
    for module, name, parameter in _places(adapted):
        if parameter in seen and is_adapted and not parameter.requires_grad:
            module._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        else:
            is_tied = is_tied or parameter in seen
        seen.add(parameter)
    if not is_tied:
        # Also where a checkpoint holds two weights that its config calls tied.
        base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False


def units(base: PreTrainedModel, asked: list[str] | None = None) -> list[str]:
    """Class names of the modules that are gathered one at a time: those that a model never splits, or its layers.

    Without those that hold the input embedding, which accelerate 1.15 shards on its own afterwards: a module can't be
    sharded inside one that is already (`BertEmbeddings` and its kind). Asked for are those of the launcher's
    configuration.
    """
    embedding, lists = input_embedding(base), [m for m in base.modules() if isinstance(m, nn.ModuleList)]
    layers = max(lists, key=len, default=nn.ModuleList())
    kinds = set(asked or base._no_split_modules or ()) or {type(module).__name__ for module in layers}
    found = {type(module).__name__ for module in base.modules()} & kinds
    return sorted(found - {type(module).__name__ for module in base.modules() if embedding in set(module.modules())})


def _places(base: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yield every module with its own parameters, tied ones as often as they are used."""
    for module in base.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                yield module, name, parameter
