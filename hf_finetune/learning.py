"""The learner: a model with its adapter on the device, what it is trained on, and the fastest way to do that here."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from transformers import set_seed

from hf_finetune import fast, matmul, model, runreport, sharding, tuning
from hf_finetune.adapters import Setting
from hf_finetune.flops import Flops
from hf_finetune.job import Job
from hf_finetune.terminal import phase, say
from hf_finetune.tracking.throughput import Arithmetic
from hf_finetune.tuning import Choice

if TYPE_CHECKING:
    from hf_finetune.arguments import Length
    from hf_finetune.data import Prepared
    from hf_finetune.fast import Paths
    from hf_finetune.findings import Findings
    from hf_finetune.hardware import Machine
    from hf_finetune.preflight.heavy import Ready
    from hf_finetune.recipe import Recipe
    from hf_finetune.trainer import FinetuneTrainer
    from hf_finetune.tuning import Choices


PATHS = (
    "fused_lora",
    "fused_norm",
    "fused_mlp",
    "cheap_dropout",
    "plain_attention",
    "fused_loss",
    "skip_padding_mask",
    "document_attention",
)
"""Settings of `speed` that the lock keeps as they came out."""


@dataclass(frozen=True)
class Learner:
    """A model, adapted and ready, and what it will be trained on."""

    recipe: Recipe
    machine: Machine
    prepared: Prepared
    tokenizer: Any
    adapted: torch.nn.Module
    setting: Setting
    job: Job
    run_length: Length
    arithmetic: Arithmetic
    choices: Choices
    """What was chosen so far."""
    seconds: float = 0.0
    """What choosing took."""

    @property
    def bench(self) -> tuning.Bench:
        """For measuring."""
        passes = self.run_length.total_steps * self.job.division.accumulation
        return tuning.Bench(self.recipe, self.machine, self.adapted, self.job, passes)


def learner(ready: Ready, findings: Findings, before: Choices | None) -> Learner:
    """Load the weights, apply the adapter, choose the attention; says what is known on the way.

    Args:
        ready: The run.
        findings: Its warnings.
        before: What was chosen when the run began, if it is to go on.
    """
    recipe, machine, prepared, tokenizer = ready.recipe, ready.machine, ready.prepared, ready.tokenizer
    job, run_length = ready.assignment.job, ready.assignment.length
    tell = _voice(machine)
    tell(f"run folder {recipe.output}: {machine.describe()}")
    for line in [*runreport.data_lines(prepared), *(f"warning: {problem}" for problem in findings.warnings)]:
        tell(line)

    set_seed(recipe.training.seed)
    with phase("loading the model"):
        loaded = sharding.load(recipe, prepared.targets, machine, tokenizer, ready.outline)
    setting = Setting(
        peft_type=recipe.task.peft_type,
        tokenizer=tokenizer,
        total_steps=run_length.total_steps,
        head_modules=loaded.head_modules,
        labels=prepared.targets.names,
        batches=lambda: job.sample(loaded.model.device),
    )
    with phase("applying the adapter"):
        adapted = model.build(recipe, loaded, setting)
    if machine.activation_checkpointing:
        model.enable_activation_checkpointing(loaded.model)
    tell(runreport.model_line(recipe, model.parameter_counts(adapted)))
    tell(runreport.plan_line(job.division, run_length))
    arithmetic = Arithmetic(Flops.of(adapted), matmul.peak(machine) * machine.world_size)
    choices = tuning.Choices.ruled(recipe, machine, before)
    for name, made in ready.chosen.items():
        choices = choices.plus(name, made)
    found = Learner(recipe, machine, prepared, tokenizer, adapted, setting, job, run_length, arithmetic, choices)
    return _with_attention(found, before)


def _with_attention(found: Learner, before: Choices | None) -> Learner:
    """The learner with the attention that is fastest; with that of `before`, if any, it is loaded already."""
    if before is not None and "attention" in before.made and found.recipe.model.attention == "auto":
        return replace(found, choices=found.choices.plus("attention", before.made["attention"]))
    began = time.perf_counter()
    with phase("choosing the attention"):
        attention = tuning.choose_attention(found.bench)
    machine = replace(found.machine, attention=attention.value)
    choices = found.choices.plus("attention", attention)
    return replace(found, machine=machine, choices=choices, seconds=time.perf_counter() - began)


def fast_paths(trainer: FinetuneTrainer, found: Learner, before: Choices | None) -> tuple[Paths, Choices]:
    """Install the fast paths, compile layers where that pays, and say what was chosen.

    Args:
        trainer: Not started yet.
        found: What it trains.
        before: What was chosen when the run began, if it is to go on.
    """
    tell = _voice(found.machine)
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed
        batch = next(iter(found.job.sample(trainer.args.device)))
    allowed = _as_then(found.recipe, before)
    paths = fast.take(trainer.bare_model, allowed, found.machine, found.job.targets, batch)
    if paths.taken:
        tell("fast paths: " + ", ".join(f"{name.replace('_', ' ')} ({what})" for name, what in paths.taken.items()))
    began = time.perf_counter()
    known = None if before is None or found.recipe.speed.compile != "auto" else before.made.get("compiled")
    if known is None:
        with phase("choosing whether to compile"):
            known = tuning.choose_compilation(found.bench, paths)
    elif known.value and (why := tuning.hindrance(found.bench)):
        tell(f"note: layers were compiled when the run began, not now ({why}): the next steps may differ in bits")
        known = tuning.Choice(value=False, why=why)
    elif known.value:
        paths.compile(found.bench.base)
    paths.seconds += time.perf_counter() - began
    choices = found.choices.plus("compiled", known)
    tell(f"chosen here: {choices.describe()}")
    taken = {name: name in paths.taken for name in PATHS if getattr(found.recipe.speed, name)}
    then = {} if before is None else before.value("fast_paths") or {}
    other = [name for name, was in then.items() if taken.get(name, was) != was]
    if other:
        tell(f"warning: {', '.join(other)}: not as when the run began, the next steps may differ in bits")
    return paths, choices.plus("fast_paths", Choice(taken, "compared with the plain ones"))


def _as_then(recipe: Recipe, before: Choices | None) -> Recipe:
    """The recipe without the fast paths that were not taken when the run began."""
    then = {} if before is None else before.value("fast_paths") or {}
    # A path that is younger than the run was not taken either.
    left_out = {name: False for name in PATHS if not then.get(name, not then)}
    return recipe.model_copy(update={"speed": recipe.speed.model_copy(update=left_out)}) if left_out else recipe


def _voice(machine: Machine) -> Callable[[str], None]:
    return say if machine.is_main else _keep_silent


def _keep_silent(text: str) -> None:
    """What ranks other than 0 have to say."""
