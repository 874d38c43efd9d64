"""Executors: one file for each kind of place that jobs run in."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_finetune.service.executors.base import Executor
    from hf_finetune.service.settings import Settings


def make(settings: Settings, root: Path) -> Executor:
    """Make the executor that the settings name.

    Raises:
        RecipeError: It can't be used as it is set up.
    """
    if settings.executor == "slurm":
        from hf_finetune.service.executors.slurm import Slurm

        return Slurm(settings.slurm)
    if settings.executor == "kubernetes":
        from hf_finetune.service.executors.kubernetes import Kubernetes

        return Kubernetes(settings.kubernetes, root)
    from hf_finetune.service.executors.local import Local

    return Local()
