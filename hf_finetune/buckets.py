"""The order in which DDP adds up gradients, as it was before a run was stopped.

DDP sends gradients in flat buckets. It lays them out anew after the first backward pass that is exchanged, in the order
in which gradients came (torch 2.13, `Reducer::rebuild_buckets`). Where in a bucket a number lies decides in which order
an all-reduce adds the ranks, and with three ranks or more the order decides the last bits. A process that goes on from
a checkpoint would take its first step in the layout that the run used for its very first step only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

ORDER_MATTERS = 3
"""Ranks; two numbers have the same sum in either order."""


def settle(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> None:
    """Have DDP lay out its buckets now, by a backward pass whose gradients are thrown away; every rank calls it.

    Args:
        model: As it is trained; without gradients yet. Nothing is done where it is not DDP's.
        loss: Computes a loss with the graph of training, from any rows.
    """
    if not isinstance(model, DistributedDataParallel) or distributed.get_world_size() < ORDER_MATTERS:
        return
    exchanges, model.require_backward_grad_sync = model.require_backward_grad_sync, True
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        loss().backward()  # type: ignore[no-untyped-call]
    model.require_backward_grad_sync = exchanges
    model.zero_grad(set_to_none=True)
