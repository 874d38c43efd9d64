"""What needs the libraries: tokenizer, data, the model on the meta device, how the work divides. No weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune import data, hardware, hubreach, jobs, model, sharding, terminal
from hf_finetune.data import Stream, checks
from hf_finetune.errors import DataError, ModelError, Problem, RecipeError
from hf_finetune.tasks.base import Targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_finetune.data import Prepared
    from hf_finetune.data.streaming import Look
    from hf_finetune.findings import Findings
    from hf_finetune.hardware import Machine
    from hf_finetune.jobs import Assignment
    from hf_finetune.recipe import Recipe
    from hf_finetune.tuning.choices import Choice

UNKNOWN = Targets(names=("first", "second"))
"""Labels of a model whose data could not be read: its body can be looked at all the same."""


@dataclass(frozen=True)
class Examined:
    """What a run starts from; whatever could not be made is None, and there is an error that says why."""

    recipe: Recipe
    machine: Machine
    tokenizer: Any = None
    prepared: Prepared | None = None
    outline: PreTrainedModel | None = None
    """The model on the meta device."""
    assignment: Assignment | None = None
    looked: Look | None = None
    """The first training rows of a stream; None where they are not streamed, too."""


@dataclass(frozen=True)
class Ready:
    """`Examined`, where nothing is wrong."""

    recipe: Recipe
    machine: Machine
    tokenizer: Any
    prepared: Prepared
    outline: PreTrainedModel
    assignment: Assignment
    looked: Look | None = None
    chosen: Mapping[str, Choice] = field(default_factory=dict)
    """What was chosen so that it fits the memory; see `preflight.fitting`."""


def examine(recipe: Recipe, machine: Machine, findings: Findings, day: str | None = None) -> Examined:
    """Look at everything that can be looked at; a mistake in one part does not hide those of the others.

    Args:
        recipe: What is to be done.
        machine: Where. Ranks other than the first of their node wait for its data.
        findings: Takes what is wrong.
        day: On which the run began, as YYYY-MM-DD; None is today.
    """
    for check in (hardware.check, sharding.check_launch):
        with findings.collect():
            check(recipe, machine)
    hubreach.settle(recipe)
    tokenizer = prepared = assignment = None
    if findings.blame("model", RecipeError):  # its name is malformed or must not be read
        return Examined(recipe, machine)
    with findings.collect():
        machine = replace(machine, attention=model.attention(recipe, machine))
    if findings.blame("model.name", ModelError) and not Path(recipe.model.name).expanduser().is_dir():
        return Examined(recipe, machine)  # what the Hub does not give now it gives no later; each try takes long
    with findings.collect():
        tokenizer = model.load_tokenizer(recipe.model)
        task = recipe.task.on(day or date.today().isoformat(), tokenizer)
        recipe = recipe.model_copy(update={"task": task})
    if tokenizer is not None and not findings.blame("data", RecipeError):
        with findings.collect():
            try:
                prepared = data.prepare(recipe, tokenizer, machine, terminal.phase)
            except data.UnfitError as error:
                found = checks.findings(recipe, error.facts, error.counted, error.places, error.left_out)
                _judge(found, findings)
                raise
    targets = UNKNOWN if prepared is None else prepared.targets
    outline = model.examine(recipe, targets, tokenizer, findings)
    if outline is not None:
        with findings.collect():
            sharding.check(recipe, machine, outline)
    looked = None
    if prepared is not None:
        _judge(checks.findings(recipe, prepared.facts, prepared.counted, prepared.places), findings)
        if isinstance(prepared.train, Stream):
            with findings.collect():
                looked = prepared.train.look()
                _judge(checks.noticed(recipe, looked.marks, prepared.train.reading.places), findings)
        with findings.collect():
            assignment = jobs.assign(recipe, prepared, machine, tokenizer)
    return Examined(recipe, machine, tokenizer, prepared, outline, assignment, looked)


def prepare(recipe: Recipe, machine: Machine, findings: Findings, day: str | None = None) -> Ready:
    """Examine a run, and go on only where nothing is wrong.

    Raises:
        FinetuneError: Everything that was found, at once; of the kind with the lowest exit code.
    """
    seen = examine(recipe, machine, findings, day)
    findings.raise_errors()
    return complete(seen)


def complete(seen: Examined) -> Ready:
    """What was examined without an error."""
    if seen.prepared is None or seen.outline is None or seen.assignment is None:
        raise AssertionError("a part that can't be made has an error")
    return Ready(seen.recipe, seen.machine, seen.tokenizer, seen.prepared, seen.outline, seen.assignment, seen.looked)


def _judge(found: Iterable[tuple[str, Problem]], findings: Findings) -> None:
    """Keep what the checks of the data found, by its level."""
    told = list(found)
    if errors := [problem for level, problem in told if level == "error"]:
        findings.add(DataError(errors))
    findings.warn(problem for level, problem in told if level == "warn")
