"""`HF_FINETUNE_ROOT`: where it is set, as for jobs, nothing outside that folder is read or written by name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from hf_finetune.errors import Problem, RecipeError

VARIABLE = "HF_FINETUNE_ROOT"


def outside(path: str) -> str | None:
    """Say why a path is refused, symlinks followed, whether or not it is there; None where it may be used."""
    root = os.environ.get(VARIABLE)
    if not root:
        return None
    try:
        is_inside = Path(path).expanduser().resolve().is_relative_to(Path(root).expanduser().resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of symlinks, an unknown user, a NUL
        is_inside = False
    return None if is_inside else f"lies outside {VARIABLE}, {root}; name a path inside it"


def refuse_outside(named: Iterable[tuple[str, str]]) -> None:
    """Refuse paths of a command line, each with its option.

    Raises:
        RecipeError: Some lie outside the root.
    """
    found = [(option, path, outside(path)) for option, path in named]
    problems = [Problem(f"{option} {path}: {why}", file="command line") for option, path, why in found if why]
    if problems:
        raise RecipeError(problems)
