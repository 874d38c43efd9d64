"""Save what was trained: written, read back, and compared with the model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_finetune import export, memory, targetsfile, zero
from hf_finetune.errors import DivergedError, ModelError, Problem
from hf_finetune.resources import is_out_of_memory
from hf_finetune.runfolder import RunFolder
from hf_finetune.terminal import say
from hf_finetune.trainer import FinetuneTrainer


def save(trainer: FinetuneTrainer, folder: RunFolder) -> float | None:
    """Write `adapter/` and `targets.json`, read the adapter back, and compare; every rank calls it.

    Returns:
        The largest difference of logits, as a share of the largest; None where every bit was compared instead.

    Raises:
        ModelError: What was saved is not the model in memory.
        DivergedError: It can't be, because training has blown the model up.
    """
    job, trained = trainer.job, trainer.bare_model
    recipe, machine = job.recipe, job.machine
    with divergence_named(trainer):
        # Weights that are divided among ranks are gathered by all of them; what follows is the first rank's alone.
        state = gathered(trainer) if machine.is_sharded or machine.zero_stage else None
        if not machine.is_main:
            return None
        targetsfile.write(folder.targets, job.targets)
        export.save(trained, recipe, job.targets, job.tokenizer, folder.adapter, state=state)
        if not machine.reloads(recipe):
            export.compare(trained, recipe, folder.adapter, state)
            return None
        batch = job.probe(next(trained.parameters()).device)
        memory.give_back()  # a second model follows, and what training left free would lie beside it
        try:
            return export.verify(trained, recipe, machine, batch, folder.adapter)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        say("note: a second model does not fit in memory: saved weights are compared bit by bit, not by their logits")
        export.compare(trained, recipe, folder.adapter)
    return None


def gathered(trainer: FinetuneTrainer) -> dict[str, torch.Tensor]:
    """Collect the trained weights in one piece, on the CPU of the first rank; every rank takes part.

    Raises:
        ModelError: One was not given back.
    """
    trained = trainer.bare_model
    if trainer.is_deepspeed_enabled:
        return zero.trained(trained, keeps=trainer.args.process_index == 0)
    wanted = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    state: Any
    if trainer.accelerator.is_fsdp2:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = get_model_state_dict(trainer.model_wrapped, options=options)
    else:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.args.process_index == 0 and (missing := wanted - state.keys()):
        raise ModelError(f"sharded training did not give back {len(missing)} trained weights, e.g. {min(missing)}")
    return dict(state)


@contextmanager
def divergence_named(trainer: FinetuneTrainer) -> Iterator[None]:
    """Blame training, not the saved file, where the two disagree because training has blown the model up.

    Raises:
        DivergedError: The last loss is over twice the first. Then rounding decides what the model says.
    """
    try:
        yield
    except ModelError as error:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if not losses or losses[-1] <= 2 * losses[0]:
            raise
        rose = f"the loss rose from {losses[0]:.4g} to {losses[-1]:.4g}, and the model's answers hang on rounding"
        problem = Problem(f"training diverged: {rose}; lower it and give --restart", key="training.learning_rate")
        raise DivergedError(problem) from error
