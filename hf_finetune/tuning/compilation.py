"""Compile the layers where that pays within this run."""

from __future__ import annotations

import time

import torch

from hf_finetune.fast import Paths, compiled
from hf_finetune.tuning.bench import ROUNDS, Bench
from hf_finetune.tuning.choices import Choice

WORTH_SECONDS = 900.0
"""Length of a run from which on compiling is tried: it takes about a minute, and saves a tenth to a fifth."""
WORTH = 400
"""Micro-batches below which nothing is timed at all."""
GAIN = 0.97
"""Share of the plain time below which compiled layers are kept."""
TOLERANCE = 2e-2
"""Largest relative difference of a batch's loss or gradient norm: bf16 rounds in another order."""


def choose_compilation(bench: Bench, paths: Paths) -> Choice:
    """Measure, or say why not; leaves the model with what was chosen.

    Args:
        bench: The run.
        paths: Its fast paths, installed.
    """
    with bench.trial():
        choice = bench.agreed(_choose(bench, paths))
    if choice.value:
        paths.compile(bench.base)
    else:
        paths.plain_layers()
    return choice


def _choose(bench: Bench, paths: Paths) -> Choice:
    asked = bench.recipe.speed.compile
    if reason := "asked for" if asked is False else hindrance(bench):
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
        known, how = {"plain": plain} | _compile(bench, paths), "measured"
        bench.keep("compile", known)
    cost = 0.0 if paths.is_compiled else known["cost"]
    saved = (known["plain"] - known["compiled"]) * bench.micro_batches - cost
    pays = saved > 0 and known["compiled"] < GAIN * known["plain"]
    ratio = known["compiled"] / known["plain"]
    return Choice(value=pays, why=f"{how}: {ratio:.2f} x the time of a step, {known['cost']:.0f} s to compile")


def hindrance(bench: Bench) -> str:
    """The reason why layers can't be compiled; empty where they can."""
    if bench.machine.is_sharded or bench.machine.activation_checkpointing:
        return "by rule: not with sharded weights or activation checkpointing"
    if not compiled.fits(bench.base):
        return "by rule: the model has dropout in its layers, or no layers that repeat"
    if bench.machine.device == "cpu" and not compiled.has_compiler():
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
        return {"compiled": float("inf"), "cost": time.perf_counter() - began}
    is_same = torch.allclose(after, before, rtol=TOLERANCE, atol=0.0)
    return {"compiled": seconds if is_same else float("inf"), "cost": cost}
