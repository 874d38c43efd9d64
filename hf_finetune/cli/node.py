"""The nodes and processes of a job, read from torchrun's own variables, without torch where they name a number."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from hf_finetune.errors import Problem, RecipeError

PORT = 29_500


@dataclass(frozen=True)
class Node:
    """This node and its place among the others."""

    processes: int
    """Of this node; each has as many."""
    nodes: int = 1
    rank: int = 0
    """Of this node, from 0."""
    address: str = ""
    """Of the first node; empty where there is no other."""
    port: int = PORT

    @property
    def all_processes(self) -> int:
        """Of all nodes."""
        return self.processes * self.nodes

    @classmethod
    def of(cls, variables: Mapping[str, str], processes: str | None = None) -> Node:
        """Read the variables that `hf_finetune.launch` names.

        Args:
            variables: Of the environment.
            processes: Given with `--processes`, which counts more than `PET_NPROC_PER_NODE`.

        Raises:
            RecipeError: One is no number, or does not fit the others; exit code 2.
        """

        def number(name: str, default: int) -> int:
            text = variables.get(name, "").strip() or str(default)
            if not text.isdecimal():
                raise RecipeError(Problem(f"{text!r} is no whole number", key=name))
            return int(text)

        if processes is not None:
            variables = {**variables, "PET_NPROC_PER_NODE": processes}
        # torchrun knows these words too, and Kubeflow's Trainer sets them.
        is_auto = variables.get("PET_NPROC_PER_NODE", "") in ("", "auto", "gpu", "cpu")
        count = visible_devices() if is_auto else number("PET_NPROC_PER_NODE", 0)
        nodes, rank = number("PET_NNODES", 1), number("PET_NODE_RANK", 0)
        address, port = variables.get("PET_MASTER_ADDR", ""), number("PET_MASTER_PORT", PORT)
        if count < 1 or nodes < 1:
            raise RecipeError("PET_NPROC_PER_NODE and PET_NNODES are 1 at least; `auto` counts the visible GPUs")
        if rank >= nodes:
            raise RecipeError(f"PET_NODE_RANK is {rank}, but of {nodes} nodes; it counts from 0")
        if nodes > 1 and not address:
            raise RecipeError("PET_MASTER_ADDR is not set; it names the first node, as every other one reaches it")
        return cls(count, nodes, rank, address if nodes > 1 else "", port)


def visible_devices() -> int:
    """Count the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` or the container shows them; 1 on a CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}:
        return 1
    import torch

    return max(1, torch.cuda.device_count())
