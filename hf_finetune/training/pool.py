"""The rows of a whole global batch for losses that contrast them, however the batch is cut: gradient caching.

The micro-batches of a step are embedded first, without gradients, and gathered from all ranks; then each runs again,
with gradients for its own rows. That is exact, and holds the activations of one micro-batch only (Gao et al. 2021:
Scaling deep contrastive learning batch size under memory limited setup, https://arxiv.org/abs/2101.06983).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import pad_across_processes
from torch.nn.parallel import DistributedDataParallel

from hf_finetune.data.job import COUNTS
from hf_finetune.tasks.base import IGNORE, Batch, State, Task
from hf_finetune.tracking.throughput import FORWARD


def pooled(
    task: Task,
    model: Callable[..., Any],
    batches: Sequence[Batch],
    state: State,
    *,
    gathered: Callable[[torch.Tensor], torch.Tensor] = lambda rows: rows,
) -> list[Batch]:
    """Return what each micro-batch of a global batch needs to know of all of its rows; see `Task.loss`.

    Args:
        task: One that `contrasts`.
        model: As for `Task.embed`.
        batches: The micro-batches of this rank, as collated, on the device.
        state: Of the task.
        gathered: Makes of the rows of this rank (R, ...) those of all ranks. `own` counts from this rank's first one.
    """
    with torch.no_grad():
        found = [task.embed(model, batch, state) for batch in batches]
    pool, sizes = dict[str, torch.Tensor](), list[int]()
    for name in found[0]:
        parts = [rows[name] for rows in found]
        # Each micro-batch is as wide as its widest row.
        width, sizes = max(part.shape[1] for part in parts), [len(part) for part in parts]
        pads = [[0, 0] * (part.ndim - 2) + [0, width - part.shape[1]] for part in parts]
        own = [torch.nn.functional.pad(part, pad, value=IGNORE) for part, pad in zip(parts, pads, strict=True)]
        pool[f"pool.{name}"] = gathered(torch.cat(own))
    device, ends = next(iter(pool.values())).device, list(itertools.accumulate(sizes, initial=0))
    return [{**pool, "own": torch.arange(*pair, device=device)} for pair in itertools.pairwise(ends)]


def fill(trainer: Any, batch_samples: list[Any]) -> None:
    """Put the rows of the global batch into each micro-batch of a `FinetuneTrainer`'s step."""
    job, arguments = trainer.job, trainer.args

    def gathered(rows: torch.Tensor) -> torch.Tensor:
        # Of each rank equally many rows, with equally many columns.
        for dimension in (1, 0):
            rows = pad_across_processes(rows, dim=dimension, pad_index=IGNORE)
        whole: torch.Tensor = trainer.accelerator.gather(rows)
        return whole

    forward = trainer.paths.forward(trainer.model_wrapped.train())
    bare = [{name: value for name, value in batch.items() if name not in COUNTS} for batch in batch_samples]
    batches, devices = trainer._prepare_inputs(bare), [arguments.device] if arguments.n_gpu else []
    # The passes with gradients will draw the same random numbers once more, in the same order.
    with trainer.times.part(FORWARD), torch.random.fork_rng(devices), trainer.compute_loss_context_manager():
        pools = pooled(job.task, forward, batches, job.targets, gathered=gathered)
    for batch, pool in zip(batch_samples, pools, strict=True):
        pool["own"] = pool["own"] + arguments.process_index * (len(next(iter(pool.values()))) // arguments.world_size)
        batch |= pool


def keep_constants(model: torch.nn.Module) -> None:
    """Have torch leave buffers of integers alone, such as positions, which never change.

    It would broadcast them before each of several forward passes of one loss, and the backward pass of the first would
    refuse them as changed.
    """
    wrapper: Any = DistributedDataParallel  # untyped
    constant = [name for name, buffer in model.named_buffers() if not buffer.is_floating_point()]
    wrapper._set_params_and_buffers_to_ignore_for_model(model, constant)
