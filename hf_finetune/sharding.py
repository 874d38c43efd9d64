"""FSDP2: the way of the weights onto the ranks, the units that are sharded together, and the precision of sums.

Rank 0 alone reads the weights, where nothing is against it; the others hold the same modules around memory that was not
written to, which the system does not provide before. accelerate hands out the shards.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.constants import FSDP_MODEL_NAME
from torch import distributed, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_finetune import hardware, model, zero
from hf_finetune.adaptation import peftio, targets
from hf_finetune.errors import CheckpointError, Problem, RecipeError
from hf_finetune.hardware import Machine
from hf_finetune.model import LoadedModel
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import State

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
"""Key -> values that FSDP2 can't train, and why."""


T = TypeVar("T")
READS_ONCE = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""accelerate's variable for `fsdp_cpu_ram_efficient_loading`; transformers and accelerate read it as well."""
LONGEST = timedelta(days=1)
"""For reading the weights; a rank that dies meanwhile is noticed by `peers`."""
POLL_S = 0.05


def load(
    recipe: Recipe,
    targets: State,
    machine: Machine,
    tokenizer: PreTrainedTokenizerBase,
    outline: PreTrainedModel,
) -> LoadedModel:
    """Load the base on every rank: see `model.load`; each rank calls it at the same moment."""

    def read() -> LoadedModel:
        loaded = model.load(recipe, targets, machine, tokenizer, outline)
        if recipe.data.packing:
            recipe.task.check_packing(loaded.model)
        return loaded

    if not reads_once(recipe, machine, outline):
        return read()
    whole: list[LoadedModel] = []

    def shell() -> LoadedModel:
        whole.append(read())
        base = whole[0].model
        # Parameters on the meta device, each under the names that it has; buffers are copied.
        kept = {id(p): nn.Parameter(p.to("meta"), requires_grad=p.requires_grad) for p in base.parameters()}
        return replace(whole[0], model=copy.deepcopy(base, kept), is_shell=True)

    received = _from_rank_0(shell, machine.rank)
    if whole:
        return whole[0]
    _allocate(received.model)
    return received


def check_launch(recipe: Recipe, machine: Machine) -> None:
    """Refuse recipes that can't be trained with weights or state divided as the launcher says.

    Raises:
        RecipeError: It carries every problem.
    """
    problems = zero.check(recipe, machine)
    if hardware.uses_fsdp():
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
    output = targets.output_embedding(outline)
    is_tied = output is not None and output.weight is outline.get_input_embeddings().weight
    if not (uses_fsdp(machine) and is_tied):
        return
    adapter: Any = recipe.adapter
    keys = ["adapter.trainable_tokens"] if getattr(adapter, "trainable_tokens", None) else []
    if getattr(adapter, "continue_from", None):
        stored = peftio.stored_config(peftio.find(adapter.continue_from, "adapter.from"))
        keys += ["adapter.from"] if getattr(stored, "trainable_token_indices", None) else []
    why = "single tokens can't be trained where input and output embedding are one sharded weight"
    if keys:
        raise RecipeError(
            [Problem(f"{why}; remove it, use modules_to_save, or train with DDP", key=key) for key in keys]
        )


def refuse_other_format(checkpoint: Path, machine: Machine) -> None:
    """FSDP writes and reads checkpoints of its own.

    Raises:
        CheckpointError: It was written with FSDP and this run is without, or the other way round.
    """
    has_shards = any(checkpoint.glob(f"{FSDP_MODEL_NAME}*"))
    if has_shards != uses_fsdp(machine):
        was, now = ("with", "without") if has_shards else ("without", "with")
        message = f"was written {was} FSDP, and this run is {now}; start it as it was, or give --restart to start anew"
        raise CheckpointError(Problem(message, file=str(checkpoint)))


def uses_fsdp(machine: Machine) -> bool:
    """The weights are sharded, by FSDP and not by DeepSpeed."""
    return machine.is_sharded and hardware.uses_fsdp()


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

    Args:
        accelerator: Of a trainer that has not begun.
        adapted: The model with its adapter.
        machine: Its precision.
    """
    plugin: Any = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    untie(adapted)
    base = targets.base_model(adapted)
    if plugin.auto_wrap_policy is transformer_auto_wrap_policy:
        plugin.transformer_cls_names_to_wrap = units(base, plugin.transformer_cls_names_to_wrap)
    if machine.precision != "fp32":
        # accelerate would add up gradients in half precision, over micro-batches and over ranks.
        half = hardware.DTYPES[machine.precision]
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=half, reduce_dtype=torch.float32, output_dtype=half
        )


def untie(adapted: nn.Module) -> None:
    """Give input and output embedding frozen weights of their own, where an adapter works on one of them.

    accelerate 1.15 ties weights again after it has sharded them, as the config says and by names that an adapter's
    layers have changed: that fails, or trains something else. Each rank calls it.
    """
    base = targets.base_model(adapted)
    embeddings = (base.get_input_embeddings(), targets.output_embedding(base))
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
    sharded inside one that is already (`BertEmbeddings` and its kind).

    Args:
        base: The pretrained model.
        asked: What the launcher's configuration names.
    """
    embedding, lists = base.get_input_embeddings(), [m for m in base.modules() if isinstance(m, nn.ModuleList)]
    layers = max(lists, key=len, default=nn.ModuleList())
    kinds = set(asked or base._no_split_modules or ()) or {type(module).__name__ for module in layers}
    found = {type(module).__name__ for module in base.modules()} & kinds
    return sorted(found - {type(module).__name__ for module in base.modules() if embedding in set(module.modules())})


def _allocate(base: nn.Module) -> None:
    """Give parameters of the meta device memory of the CPU, which is only addresses until it is written to.

    On the meta device they would all have the address 0, by which accelerate tells them apart for the optimiser.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module, name, parameter in _places(base):
        if parameter not in made:
            made[parameter] = nn.Parameter(torch.empty_like(parameter, device="cpu"), parameter.requires_grad)
        module._parameters[name] = made[parameter]


def _places(base: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Every module with its own parameters, tied ones as often as they are used."""
    for module in base.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                yield module, name, parameter


def _from_rank_0(make: Callable[[], T], rank: int) -> T:
    """Make something on rank 0, and return it on every rank, however long that takes."""
    group = distributed.new_group(backend="gloo", timeout=LONGEST)
    made: list[Any] = [make() if rank == 0 else None]
    is_made: Any = distributed.broadcast(torch.zeros(1), src=0, group=group, async_op=True)
    # The others look again and again: in a collective, they would count as ranks that wait for one that hangs.
    while not is_made.is_completed():
        time.sleep(POLL_S)
    distributed.broadcast_object_list(made, src=0, group=group)
    result: T = made[0]
    return result
