"""What a checkpoint holds: everything that the next step depends on, in the bits in which the last step left it.

    trained.safetensors     trained weights, by their names in the adapted model, and what the adapter keeps besides
    optimizer.pt scheduler.pt scaler.pt
    trainer_state.json      the Trainer's own counters and history
    progress.json           what the Trainer forgets: lines written, patience used up, ...
    rng_state_<rank>.pt     random number generators (python, numpy, torch, CUDA) and unlogged loss of every rank

Not PEFT's format: that would convert some initialisations, and round. torch files are read with `weights_only` alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_finetune.errors import CheckpointError, Problem

if TYPE_CHECKING:
    from hf_finetune.adapters import Adapter

TRAINED = "trained.safetensors"
OPTIMIZER, SCHEDULER, SCALER = "optimizer.pt", "scheduler.pt", "scaler.pt"
PROGRESS = "progress.json"
_EXTRA = "adapter state: "


@dataclass(frozen=True)
class Progress:
    """What the Trainer does not keep."""

    step: int
    world_size: int
    total_loss: float
    last_logged: int
    last_evaluated: int
    patience_used: int
    """Evaluations without improvement, where early stopping counts them."""
    skipped: int = 0
    """Steps that were left out because they were not finite."""
    overflowed: int = 0
    """Steps that the loss scaler of fp16 left out."""
    overflows_in_a_row: int = 0
    lines: dict[str, int] = field(default_factory=dict)
    """Lines of each journal at this moment, by file name."""
    throughput: dict[str, float] = field(default_factory=dict)
    """Rows, tokens, slots and seconds of the run so far."""
    stream: list[int] = field(default_factory=list)
    """Of streamed rows: how many each lane has used up, and what became of them; see `batching.Streamed`."""

    def write(self, folder: Path) -> None:
        """Write `progress.json`."""
        (folder / PROGRESS).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Progress:
        """Read what `write` wrote."""
        return cls(**json.loads((folder / PROGRESS).read_text(encoding="utf-8")))


def save_trained(adapted: nn.Module, adapter: Adapter, folder: Path) -> None:
    """Write the trained weights and the adapter's own state; one rank does it."""
    tensors = {name: p.detach().contiguous().cpu() for name, p in adapted.named_parameters() if p.requires_grad}
    tensors |= {f"{_EXTRA}{name}": value.contiguous().cpu() for name, value in adapter.state(adapted).items()}
    # Tied weights are one parameter under one name; a clone keeps safetensors from seeing views of one storage.
    save_file({name: value.clone() for name, value in tensors.items()}, folder / TRAINED)


def load_trained(adapted: nn.Module, adapter: Adapter, folder: Path) -> None:
    """Put the trained weights of a checkpoint into the model, bit for bit.

    Raises:
        CheckpointError: The checkpoint holds other weights than this model trains.
    """
    tensors = load_file(folder / TRAINED)
    extra = {name.removeprefix(_EXTRA): tensors.pop(name) for name in list(tensors) if name.startswith(_EXTRA)}
    own = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    odd = sorted(own.keys() ^ tensors.keys()) or [name for name, p in own.items() if p.shape != tensors[name].shape]
    if odd:
        message = f"holds other weights than this run trains, e.g. {odd[0]}; give --restart to start anew"
        raise CheckpointError(Problem(message, file=str(folder)))
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
    adapter.load_state(adapted, extra)


HYPERPARAMETERS = ("weight_decay", "betas", "initial_lr")
"""What the recipe says of each group of weights, and may say anew; the rest is state."""


def load_optimizer(optimizer: Any, scheduler: Any, load: Callable[[], object]) -> None:
    """Bring the optimiser and the schedule back, with the hyperparameters of the present recipe.

    Where these are what they were, the learning rate comes out as the same bits: it is the same product.

    Args:
        optimizer: New, as the recipe wants it.
        scheduler: The same.
        load: Brings back the state of both, with the hyperparameters that were.
    """
    wanted = [{key: group[key] for key in HYPERPARAMETERS if key in group} for group in optimizer.param_groups]
    rates = list(scheduler.base_lrs)
    load()
    scheduler.base_lrs = rates
    for group, own, rate, shape in zip(optimizer.param_groups, wanted, rates, scheduler.lr_lambdas, strict=True):
        group.update(own)
        group["lr"] = rate * shape(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def save_rank(folder: Path, rank: int, unlogged_loss: float) -> None:
    """Write what each rank has of its own: its random number generators, and its loss since the last log."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    states: dict[str, Any] = {
        "unlogged_loss": unlogged_loss,
        "python": [version, list(internal), gauss_next],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.random.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    torch.save(states, folder / _rng(rank))


def unlogged_loss(folder: Path, rank: int) -> float:
    """This rank's loss since the last log."""
    return float(torch.load(folder / _rng(rank), weights_only=True)["unlogged_loss"])


def load_rng(folder: Path, rank: int) -> None:
    """Bring this rank's generators back."""
    states = torch.load(folder / _rng(rank), weights_only=True)
    version, internal, gauss_next = states["python"]
    random.setstate((version, tuple(internal), gauss_next))
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.random.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.device_count() == len(states["cuda"]):
        torch.cuda.set_rng_state_all(states["cuda"])


def _rng(rank: int) -> str:
    return f"rng_state_{rank}.pt"
