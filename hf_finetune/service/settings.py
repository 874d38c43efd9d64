"""`ROOT/service.yaml`: where jobs run, how many side by side, and what is tried again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from hf_finetune.config import reading
from hf_finetune.config.section import Section

Count = Annotated[int, Field(ge=1, le=10_000)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]


class Slurm(Section):
    """Jobs go to Slurm; the service runs where its commands are, and ROOT is on storage that all nodes see."""

    options: list[str] = Field(default_factory=list)
    """Of sbatch, for each job: `[--partition=gpu, --gpus=1, --time=8:00:00]`."""
    script: str | None = None
    """Instead of `deploy/slurm/finetune.sbatch`."""


class Kubernetes(Section):
    """Jobs are Jobs of a cluster."""

    template: str = "job.yaml"
    """Manifest of a Job, below ROOT or absolute, as in `deploy/kubernetes/queue`; its first container is the worker."""
    namespace: str = "default"
    queue: str | None = None
    """LocalQueue of Kueue, which then decides when a job starts."""


class Settings(Section):
    """Settings of the queue; all servers of one ROOT read the same."""

    executor: Literal["local", "slurm", "kubernetes"] = "local"
    """Jobs are processes of this machine, or go to a scheduler."""
    slots: Count | None = None
    """Jobs side by side where there is no GPU (1), or jobs that a scheduler has at the same time (16)."""
    jobs_per_device: Count = 1
    """So many jobs share a GPU or slot, where the memory that `check` estimates for all of them fits."""
    preempt: bool = True
    """A job of higher priority stops one of lower, which goes on later."""
    retry_seconds: Seconds = 10
    """Until a job whose worker was lost starts again; twice as long each time."""
    stop_seconds: Seconds = 600
    """Until a worker that was asked to stop is killed; it must suffice for a step and a checkpoint."""
    stop_jobs: bool = False
    """A server that is told to end first stops its jobs with a checkpoint: where they would be killed with it, as in a
    container. The next one resumes them."""
    slurm: Slurm = Slurm()
    kubernetes: Kubernetes = Kubernetes()


def load(root: Path) -> Settings:
    """Read the settings of a service; where there is no file, the defaults.

    Raises:
        RecipeError: The file is wrong; each problem has key and line.
    """
    file = root / "service.yaml"
    return reading.read(Settings, str(file), []).checked() if file.exists() else Settings()
