"""DeepSpeed's ZeRO: the launcher's choice, recipes that it can't train, its steps and its weights.

DeepSpeed's engine takes the optimiser's step inside accelerate's `backward`, clips, and divides the state among the
ranks. Here the step is held back until the loss has been looked at; DeepSpeed itself looks at the gradients before it
changes a weight. Checkpoints are its own: each rank writes its part of the optimiser.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import torch

from hf_finetune import hardware
from hf_finetune.errors import CheckpointError, ModelError, Problem
from hf_finetune.hardware import Machine
from hf_finetune.recipe import Recipe


def check(recipe: Recipe, machine: Machine) -> list[Problem]:
    """Find settings of a recipe that do not work under DeepSpeed, or would be another optimisation."""
    config, problems = hardware.deepspeed_config(), list[Problem]()
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
            problems.append(Problem(message, file=os.environ[hardware.DEEPSPEED_CONFIG]))
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
    """Refuse a checkpoint that this launch can't go on from.

    Args:
        checkpoint: Its folder.
        ranks: How many wrote it.
        machine: Of this launch.

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
    """Have torch refuse what is neither a number nor a record of DeepSpeed in a checkpoint.

    DeepSpeed reads its files with `weights_only=False`, which would run any code that somebody has put there.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address])
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"


def hold_back(accelerator: Any) -> None:
    """Have backward passes leave the optimiser's step to `step`, and have DeepSpeed look at gradients of any dtype.

    Args:
        accelerator: With a prepared model.
    """
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
        Whether the step was taken, and the norm of the gradient before clipping; not a number where DeepSpeed was
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
    """The trained weights whole, in fp32 and on the CPU, and what buffers are saved; all ranks gather together.

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
