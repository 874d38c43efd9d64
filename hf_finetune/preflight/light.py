"""What can be seen without torch: the recipe itself, the files that it names, the run folder. Takes a moment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hf_finetune.adaptation import peftio
from hf_finetune.errors import DataError, Problem, RecipeError
from hf_finetune.findings import Findings
from hf_finetune.hub import secrets
from hf_finetune.preflight import advice
from hf_finetune.rowfiles import find
from hf_finetune.runfolder import RunFolder
from hf_finetune.schema import modelfolder, paths
from hf_finetune.tracking import logdir

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe
    from hf_finetune.schema.reading import Reading


def look(recipe: Any, *, is_whole: bool = True) -> Findings:
    """Look at the files that a recipe names.

    Args:
        recipe: A Recipe, or what could be read of one: a field that is missing or wrong raises AttributeError.
        is_whole: Whether it is a Recipe, of which more can be said.
    """
    findings = Findings()
    if is_whole:
        findings.warn(advice.of(recipe))
    found = paths.problems(recipe)
    if found:
        findings.add(RecipeError(found))
    # What must not be read, or has no proper name, is not looked at.
    missing = [] if findings.blame("data") else find.problems(recipe)
    if missing:
        findings.add(DataError(missing))
    board = _given(recipe, "tracking", "folder")
    if board is not None:
        with findings.collect():
            logdir.check(board)
    refusal = secrets.why_not() if _given(recipe, "hub", "repo") is not None else None
    if refusal is not None:
        findings.warn([Problem(f"the run can't be uploaded when it has ended: {refusal}", key="hub.repo")])
    start = _given(recipe, "adapter", "continue_from")
    if start is not None and not findings.blame("adapter"):
        with findings.collect():
            peftio.find(start, "adapter.from")
    name = _given(recipe, "model", "name")
    if name is not None and not findings.blame(modelfolder.KEY):
        with findings.collect():
            found_at = modelfolder.resolve(name)
            if is_whole and not findings.blame("model"):
                modelfolder.refuse_uncached(found_at, recipe.model.revision)
    return findings


def look_at_reading(reading: Reading[Recipe], *, restart: bool, allowed: Sequence[str] = ()) -> Findings:
    """Look at a recipe as it was read, with all its mistakes, and at the run folder.

    Args:
        reading: The recipe, whole or in part.
        restart: An earlier run in the folder would be moved aside.
        allowed: Keys that may differ from those of an earlier run.
    """
    findings = Findings()
    if reading.problems:
        findings.add(RecipeError(reading.problems))
    if reading.partial is None:
        return findings
    findings.merge(look(reading.partial, is_whole=reading.recipe is not None))
    output = _given(reading.partial, "output")
    if output is not None and not findings.blame("output"):
        with findings.collect():
            dump = reading.recipe.dump() if reading.recipe else ""
            RunFolder(output).look(dump, restart=restart, allowed=allowed)
    return findings


def _given(block: Any, *names: str) -> Any:
    """A field inside blocks; None where it could not be read."""
    for name in names:
        if not hasattr(block, name):
            return None
        block = getattr(block, name)
    return block
