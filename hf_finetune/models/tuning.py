"""Chosen for this machine by measuring, once a run: the attention, and compiled layers.

`run.lock.json` keeps the choices, so that a resumed run measures nothing and goes on with the same. Runs that are too
short to earn the measuring back go by fixed rules and look at nothing that was measured before: they are the same
everywhere.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers.utils.import_utils import is_flash_attn_2_available

from hf_finetune import __version__
from hf_finetune.adapters._targets import base_model
from hf_finetune.config.paths import cache_folder
from hf_finetune.data.job import Job
from hf_finetune.device import Machine, is_out_of_memory, processor, wait
from hf_finetune.errors import ModelError
from hf_finetune.models import attention
from hf_finetune.models.paths import Paths, can_compile, has_compiler
from hf_finetune.recipe import Recipe
from hf_finetune.run.files import write_atomically
from hf_finetune.run.lock import Choice
from hf_finetune.tasks.base import Batch

# Micro-batches that are timed: of short, middling and long rows.
SHAPES = 3
# Timings of each; the fastest counts.
ROUNDS = 2
# Tokens of a row that count as the same shape.
STEP = 32
# Micro-batches of a run from which on it earns the measuring back: that takes about 15.
WORTH = 400
# Length of a run from which on compiling is tried: it takes about a minute, and saves a tenth to a fifth.
WORTH_SECONDS = 900.0
# Share of the plain time below which compiled layers are kept.
GAIN = 0.97
# Largest relative difference of a batch's loss or gradient norm: bf16 rounds in another order.
TOLERANCE = 2e-2
# Keys that change how long a step takes, or what it may be made of.
RECIPE: Any = {
    "adapter": True,
    "speed": True,
    "model": {"quantization", "dropout"},
    "data": {"packing"},
    "training": {"deterministic"},
}


@dataclass(frozen=True)
class Bench:
    """One run before its first step."""

    recipe: Recipe
    machine: Machine
    adapted: Any
    """The model with its adapter, on its device."""
    job: Job
    micro_batches: int
    """Forward passes that are before this rank."""

    @property
    def base(self) -> Any:
        """The pretrained model, with the adapter's layers inside."""
        return base_model(self.adapted)

    def agreed(self, choice: Choice) -> Choice:
        """Return the choice of rank 0; every rank comes here once for each question."""
        choices = [choice]
        if self.machine.world_size > 1:
            broadcast_object_list(choices)
        return choices[0]

    @cached_property
    def batches(self) -> list[Batch]:
        """Micro-batches as this run will see them, on the device; the same on every rank."""
        return self.job.typical(next(self.adapted.parameters()).device, SHAPES)

    def seconds(self, loss_sum: Callable[..., torch.Tensor]) -> float:
        """Return the mean time of a forward and backward pass, each batch once.

        Args:
            loss_sum: Like `Paths.loss_sum`.
        """
        wait(self.machine.device)
        began = time.perf_counter()
        self.outcomes(loss_sum)
        wait(self.machine.device)
        return (time.perf_counter() - began) / len(self.batches)

    def outcomes(self, loss_sum: Callable[..., torch.Tensor]) -> torch.Tensor:
        """Return loss and gradient norm of each batch, (batches, 2); `loss_sum` as for `seconds`."""
        made = []
        for batch in self.batches:
            with self.machine.autocast():
                loss = loss_sum(self.adapted, batch)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.adapted.parameters() if p.grad is not None])
            self.adapted.zero_grad(set_to_none=True)
            made.append(torch.stack([loss.detach().float(), norm.float()]))
        return torch.stack(made)

    @contextmanager
    def trial(self) -> Iterator[None]:
        """Train without leaving a trace: random numbers, mode and gradients are as before."""
        devices = [torch.cuda.current_device()] if self.machine.device == "cuda" else []
        was_training = self.adapted.training
        self.adapted.train()
        try:
            with torch.random.fork_rng(devices=devices):
                yield
        finally:
            self.adapted.zero_grad(set_to_none=True)
            self.adapted.train(was_training)

    def recall(self, question: str) -> dict[str, float] | None:
        """Seconds by name that an earlier run measured on such a machine, model and shapes; None where none did."""
        try:
            kept: Any = json.loads(self._memo(question).read_text(encoding="utf-8"))
            return {str(name): float(seconds) for name, seconds in kept.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return None

    def keep(self, question: str, seconds: dict[str, float]) -> dict[str, float]:
        """Keep them for later runs; return those that count.

        Of runs that measure at the same time, the first to end is believed by all: the same recipe must not give other
        bits because two of its runs began together. Where nothing can be written, the next run measures again.
        """
        file = self._memo(question)
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            with (file.parent / "lock").open("a") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if (known := self.recall(question)) is not None:
                    return known
                write_atomically(file, json.dumps(seconds) + "\n")
        return seconds

    def _memo(self, question: str) -> Path:
        """Return a small file beside the cache of tokenised data."""
        shapes = [next(iter(batch.values())).shape[:2] for batch in self.batches]
        facts = {
            "question": question,
            "processor": processor(self.machine.device),
            "threads": self.machine.threads,
            "ranks": self.machine.local_world_size,
            "precision": self.machine.precision,
            "versions": [__version__, *(version(package) for package in ("torch", "transformers", "peft"))],
            "model": self.base.config.to_json_string(use_diff=False),
            "recipe": self.recipe.model_dump(mode="json", include=RECIPE),
            "task": self.recipe.task.kind,
            "checkpointing": self.machine.activation_checkpointing,
            "shapes": [(rows, -(-tokens // STEP) * STEP) for rows, tokens in shapes],
        }
        key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
        return cache_folder(None) / "tuning" / f"{question}-{key[:32]}.json"


def choose_attention(bench: Bench) -> Choice:
    """Choose the attention that is fastest here, forward and backward, on this run's shapes; the model then has it.

    The rule of `device` stands where the recipe names one, the run is short, the weights are sharded, or the model
    knows only one.
    """
    choice = bench.agreed(_choose_attention(bench))
    if choice.value != bench.machine.attention:
        bench.base.set_attn_implementation(choice.value)
    return choice


def _choose_attention(bench: Bench) -> Choice:
    ruled, device, base = bench.machine.attention, bench.machine.device, bench.base
    if bench.recipe.model.attention != "auto":
        return Choice(ruled, "asked for")
    names = ["eager", "sdpa"] if device == "cpu" else ["sdpa"]
    is_half = bench.machine.precision != "fp32"
    if device == "cuda" and not bench.recipe.data.packing and is_half and is_flash_attn_2_available():
        names.append("flash_attention_2")
    supports = {"sdpa": base._supports_sdpa, "flash_attention_2": base._supports_flash_attn}
    names = [name for name in names if supports.get(name, True)]
    if bench.machine.is_sharded or device == "mps" or not base._can_set_attn_implementation():
        names = []
    if len(names) < 2:
        return Choice(ruled, "by rule: no other fits")
    if bench.micro_batches < WORTH:
        return Choice(ruled, "by rule: the run is too short to measure")
    seconds, how = bench.recall("attention"), "measured earlier"
    if seconds is None:
        seconds, how = bench.keep("attention", _measure(bench, names)), "measured"
    best = min(seconds, key=lambda name: seconds[name], default=ruled)
    ratios = [f"{name} takes {seconds[name] / seconds[best]:.2f} x the time" for name in seconds if name != best]
    return Choice(best, ", ".join([how, *ratios]))


def _measure(bench: Bench, names: list[str]) -> dict[str, float]:
    """Return the seconds of a pass by name, in turns; without those that fail on this model."""
    paths, before = Paths(bench.job.task, bench.job.targets), bench.machine.attention
    seconds: dict[str, float] = {}
    with bench.trial():
        paths.install(bench.adapted, bench.recipe, bench.machine)
        try:
            for name in names * ROUNDS:
                bench.base.set_attn_implementation(name)
                try:
                    if bench.recipe.data.packing:
                        bench.job.task.check_packing(bench.base)
                    if name == "eager" and bench.machine.device == "cpu" and bench.recipe.speed.plain_attention:
                        attention.install(bench.base)
                    seconds[name] = min(seconds.get(name, math.inf), bench.seconds(paths.loss_sum))
                except ModelError:  # it can't keep packed documents apart
                    continue
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
        finally:
            paths.remove()
            bench.base.set_attn_implementation(before)
    return seconds


def choose_compilation(bench: Bench, paths: Paths) -> Choice:
    """Compile the layers where that pays within this run; `paths` are its fast paths, installed."""
    with bench.trial():
        choice = bench.agreed(_choose_compilation(bench, paths))
    if choice.value:
        paths.compile(bench.base)
    else:
        paths.plain_layers()
    return choice


def _choose_compilation(bench: Bench, paths: Paths) -> Choice:
    asked = bench.recipe.speed.compile
    if reason := "asked for" if asked is False else why_not_compiled(bench):
        return Choice(value=False, why=reason)
    if asked is True:
        return Choice(value=True, why="asked for")
    if bench.machine.device != "cpu":
        return Choice(value=False, why="by rule: on a CPU alone it was tried out")
    if bench.micro_batches < WORTH:
        return Choice(value=False, why="by rule: the run is too short")
    known, how = bench.recall("compile"), "measured earlier"
    if known is None:
        plain = min(bench.seconds(paths.loss_sum) for _ in range(ROUNDS))
        if plain * bench.micro_batches < WORTH_SECONDS:
            return Choice(value=False, why="by rule: the run is too short")
        known, how = bench.keep("compile", {"plain": plain} | _compile(bench, paths)), "measured"
    cost = 0.0 if paths.is_compiled else known["cost"]
    saved = (known["plain"] - known["compiled"]) * bench.micro_batches - cost
    pays = saved > 0 and known["compiled"] < GAIN * known["plain"]
    ratio = known["compiled"] / known["plain"]
    return Choice(value=pays, why=f"{how}: {ratio:.2f} x the time of a step, {known['cost']:.0f} s to compile")


def why_not_compiled(bench: Bench) -> str:
    """Return the reason why layers can't be compiled; empty where they can."""
    if bench.machine.is_sharded or bench.machine.activation_checkpointing:
        return "by rule: not with sharded weights or activation checkpointing"
    if not can_compile(bench.base):
        return "by rule: the model has dropout in its layers, or no layers that repeat"
    if bench.machine.device == "cpu" and not has_compiler():
        return "by rule: there is no C++ compiler"
    return ""


def _compile(bench: Bench, paths: Paths) -> dict[str, float]:
    """Compile, compare, time; an endless time where that fails, or learns something else."""
    before = bench.outcomes(paths.loss_sum)
    paths.compile(bench.base)
    began = time.perf_counter()
    try:
        after = bench.outcomes(paths.loss_sum)
        bench.seconds(paths.loss_sum)
        cost = time.perf_counter() - began
        seconds = min(bench.seconds(paths.loss_sum) for _ in range(ROUNDS))
    except RuntimeError:  # of torch's compilers, too
        return {"compiled": math.inf, "cost": time.perf_counter() - began}
    is_same = torch.allclose(after, before, rtol=TOLERANCE, atol=0.0)
    return {"compiled": seconds if is_same else math.inf, "cost": cost}
