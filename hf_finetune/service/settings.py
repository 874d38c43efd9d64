"""`ROOT/service.yaml`: where jobs run, how many side by side, what is tried again, and what answers.

And `ROOT/models.yaml`: the base models that jobs may name. An operator edits it, like `limits.yaml`, at any time.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import ByteSize, Field

from hf_finetune.config import reading, yamlfile
from hf_finetune.config.section import Section
from hf_finetune.errors import Problem, RecipeError

Kept = TypeVar("Kept")
Count = Annotated[int, Field(ge=1, le=10_000)]
Seconds = Annotated[float, Field(ge=0, le=86_400)]
ENGINE = r"vllm=(https?://[^\s/]+(?:/\S*)?)"
"""Anything but the own engine."""


class Slurm(Section):
    """Jobs go to Slurm; the service runs where its commands are, and ROOT is on storage that all nodes see."""

    options: list[str] = Field(default_factory=list)
    """Of sbatch, for each job: `[--partition=gpu, --gpus=1, --time=8:00:00]`."""
    script: str | None = None
    """Instead of `deploy/slurm/finetune.sbatch`."""


class Kubernetes(Section):
    """Jobs are Jobs of a cluster, or TrainJobs of Kubeflow's Trainer in it."""

    template: str = "job.yaml"
    """Manifest of a Job or a TrainJob, below ROOT or absolute, as in `deploy/kubernetes/queue`; a Job's first container
    is the worker."""
    namespace: str = "default"
    queue: str | None = None
    """LocalQueue of Kueue, which then decides when a job starts."""


class Settings(Section):
    """Settings of the queue and of the answers; all servers of one ROOT read the same."""

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
    engine: Annotated[str, Field(pattern=f"^(own|{ENGINE})$")] = "own"
    """`vllm=URL`: that server generates the answers of LoRA adapters whose base it serves."""
    memory: ByteSize | None = None
    """Weights that stay loaded for answers, e.g. `8GB`; null is 40 % of the memory of the GPU, or of the machine."""
    slurm: Slurm = Slurm()
    kubernetes: Kubernetes = Kubernetes()

    @property
    def engine_url(self) -> str | None:
        """Address of the server that generates answers, where there is one."""
        found = re.fullmatch(ENGINE, self.engine)
        return None if found is None else found[1]


def reread(read: Callable[[Path], Kept]) -> Callable[[Path], Kept]:
    """Let a function read a file that an operator edits only once it has changed; nobody changes what it returns."""

    @lru_cache(maxsize=8)
    def kept(file: Path, *_: int) -> Kept:
        return read(file)

    def looked(file: Path) -> Kept:
        try:
            state = file.stat()
        except FileNotFoundError:
            return read(file)
        return kept(file, state.st_mtime_ns, state.st_size, state.st_ino)

    return looked


@reread
def models(file: Path) -> dict[str, dict[str, Any]]:
    """Read base models: name -> `name` (Hub id or folder), and the defaults of its jobs, `recipe` and `devices`.

    Raises:
        RecipeError: The file is wrong.
    """
    if not file.exists():
        return {}
    found = yamlfile.parse(file.read_text(encoding="utf-8"), str(file)).value
    if not isinstance(found, dict):
        raise RecipeError(Problem("must map names to models, e.g. `tiny: {name: models/tiny}`", file=str(file)))
    made = {}
    for name, value in found.items():
        entry = {"name": value} if isinstance(value, str) else value
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not entry["name"].strip():
            raise RecipeError(Problem("must have a name: a Hub id or a folder", key=str(name), file=str(file)))
        if entry.keys() - {"name", "recipe", "devices"}:
            raise RecipeError(Problem("takes name, recipe and devices, nothing else", key=str(name), file=str(file)))
        if not isinstance(entry.get("devices", 1), int) or entry.get("devices", 1) < 1:
            raise RecipeError(Problem("must be a whole number, from 1", key=f"{name}.devices", file=str(file)))
        made[str(name)] = entry
    return made


def load(root: Path) -> Settings:
    """Read the settings of a service; where there is no file, the defaults.

    Raises:
        RecipeError: The file is wrong; each problem has key and line.
    """
    file = root / "service.yaml"
    return reading.read(Settings, str(file), []).checked() if file.exists() else Settings()
