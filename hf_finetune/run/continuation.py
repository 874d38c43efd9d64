"""Compares a recipe with that of the run that it is to resume. `Key.resume` of a field says if its key may change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import ValidationError

from hf_finetune.config import yamlfile
from hf_finetune.config.problems import shown
from hf_finetune.config.section import key_of
from hf_finetune.errors import CheckpointError, Problem, RecipeError
from hf_finetune.recipe import Recipe


def differences(before: str, now: str) -> dict[str, tuple[Any, Any]]:
    """Find the dotted keys that two resolved recipes, as YAML, have different values for: what it was, what it is."""
    old, new = _flat(_resolved(before)), _flat(_resolved(now))
    return {
        key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }


def refuse_changes(before: str, now: str, allowed: Sequence[str]) -> list[str]:
    """Compare a recipe with that of the run that it is to resume.

    Args:
        before: `recipe.yaml` of the run folder.
        now: The resolved recipe, as YAML.
        allowed: Keys given by `--allow-change`.

    Returns:
        A sentence for each change that is allowed and was made.

    Raises:
        CheckpointError: Something else changed; it carries one problem a key.
    """
    problems, notes = [], []
    for key, (old, new) in differences(before, now).items():
        may = key_of(Recipe, key).resume
        told = f"was {shown(old, plain=True)}, is {shown(new, plain=True)}"
        if may == "ask" and key in allowed:
            notes.append(f"{key} {told}, as --allow-change says: from here on this is another training")
        elif may != "free":
            can = f"give --allow-change {key} to resume with it, " if may == "ask" else ""
            message = f"{told} in the run that this folder holds; change it back, {can}or --restart to start anew"
            problems.append(Problem(message, key=key))
    if problems:
        raise CheckpointError(problems)
    return notes


def is_whole(text: str) -> bool:
    """Tell a whole `recipe.yaml` from what a power failure leaves: nothing, zeros, or a part."""
    try:
        return text.endswith("\n") and isinstance(yamlfile.parse(text, "recipe.yaml").value, dict)
    except RecipeError:
        return False


def refuse_unknown(allowed: Iterable[str]) -> None:
    """Check the keys of `--allow-change`.

    Raises:
        CheckpointError: One may never change within a run.
    """
    wrong = [key for key in allowed if key_of(Recipe, key).resume == "never"]
    of_locks = [key for key in wrong if key.startswith("lock.")]
    message = "may not change within a run; start anew with --restart, or in another output folder"
    if of_locks:
        message = "is about a lock; give --locked RUN/run.lock.json too"
    if wrong:
        raise CheckpointError(Problem(message, key=key) for key in of_locks or wrong)


def _resolved(text: str) -> dict[str, Any]:
    """Add every default, also of keys that are younger than the file; a recipe that can't be read stays as it is."""
    tree = yamlfile.parse(text, "recipe.yaml").value or {}
    try:
        return Recipe.model_validate(tree, by_alias=True, by_name=False).model_dump(mode="json")
    except ValidationError:
        return dict(tree)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            found |= _flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner
    return found
