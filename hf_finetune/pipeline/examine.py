"""Examine a recipe with the libraries, but no weights: tokenizer, data, the model on the meta device, the job."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_finetune import device
from hf_finetune.data import checks, prepare, sources
from hf_finetune.data.job import Job
from hf_finetune.data.prepare import Prepared
from hf_finetune.data.stream import Look, Stream
from hf_finetune.device import Machine
from hf_finetune.errors import DataError, Findings, ModelError, Problem, RecipeError
from hf_finetune.models import load, pretrained, sharded
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import State

UNKNOWN = State(names=("first", "second"))
"""Labels of a model whose data could not be read: its body can be looked at all the same."""


@dataclass(frozen=True)
class Parts:
    """Tokenizer, data, model outline and job; a part that could not be made is None, and an error says why."""

    recipe: Recipe
    machine: Machine
    tokenizer: Any = None
    prepared: Prepared | None = None
    outline: PreTrainedModel | None = None
    job: Job | None = None
    looked: Look | None = None
    """The first training rows of a stream; None where they are not streamed."""


def examine(recipe: Recipe, machine: Machine, findings: Findings, day: str | None = None) -> Parts:
    """Look at everything that needs the libraries, but no weights; a mistake in one part does not hide the others.

    Args:
        recipe: What is to be done.
        machine: Where. Ranks other than the first of their node wait for its data.
        findings: Takes what is wrong.
        day: On which the run began, as YYYY-MM-DD; None is today.
    """
    for check in (device.check, sharded.check_launch):
        with findings.collect():
            check(recipe, machine)
    sources.settle(recipe)
    tokenizer = prepared = job = looked = None
    if findings.blame("model", RecipeError):  # its name is malformed or must not be read
        return Parts(recipe, machine)
    with findings.collect():
        machine = replace(machine, attention=load.attention(recipe, machine))
    if findings.blame("model.name", ModelError) and not Path(recipe.model.name).expanduser().is_dir():
        return Parts(recipe, machine)  # what the Hub does not give now it gives no later; each try takes long
    with findings.collect():
        tokenizer = pretrained.load_processor(recipe.model, recipe.task)
        task = recipe.task.on(day or date.today().isoformat(), tokenizer)
        recipe = recipe.model_copy(update={"task": task})
    if tokenizer is not None and not findings.blame("data", RecipeError):
        with findings.collect():
            try:
                prepared = prepare.prepare(recipe, tokenizer, machine)
            except prepare.UnfitError as error:
                found = checks.findings(recipe, error.facts, error.counted, error.places, error.left_out)
                _judge(found, findings)
                raise
    outline = load.examine(recipe, UNKNOWN if prepared is None else prepared.targets, tokenizer, findings)
    if outline is not None:
        with findings.collect():
            sharded.check(recipe, machine, outline)
    if prepared is not None:
        _judge(checks.findings(recipe, prepared.facts, prepared.counted, prepared.places), findings)
        if isinstance(prepared.train, Stream):
            with findings.collect():
                looked = prepared.train.look()
                _judge(checks.noticed(recipe, looked.marks, prepared.train.reading.places), findings)
        with findings.collect():
            job = Job.of(recipe, prepared, machine, tokenizer)
    return Parts(recipe, machine, tokenizer, prepared, outline, job, looked)


def _judge(found: Iterable[tuple[str, Problem]], findings: Findings) -> None:
    """Keep what the checks of the data found, by its level."""
    found = list(found)
    if errors := [problem for level, problem in found if level == "error"]:
        findings.add(DataError(errors))
    findings.warn(problem for level, problem in found if level == "warn")
