"""`HF_FINETUNE_ROOT`: where it is set, as for jobs, nothing outside that folder is read or written by name."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from hf_finetune.errors import Problem, RecipeError

VARIABLE = "HF_FINETUNE_ROOT"


def outside(path: str) -> str | None:
    """Why a path is refused, symlinks followed; None where it lies inside the root, or where there is no root.

    Args:
        path: Any path, whether or not it is there.
    """
    root = os.environ.get(VARIABLE)
    if not root:
        return None
    try:
        is_inside = Path(path).expanduser().resolve().is_relative_to(Path(root).expanduser().resolve())
    except (OSError, RuntimeError, ValueError):  # a loop of symlinks, an unknown user, a NUL
        is_inside = False
    return None if is_inside else f"lies outside {VARIABLE}, {root}; name a path inside it"


def refuse_outside(named: Iterable[tuple[str, str]]) -> None:
    """Refuse paths of a command line.

    Args:
        named: Option and path.

    Raises:
        RecipeError: Some lie outside the root.
    """
    problems = [
        Problem(f"{option} {path}: {why}", file="command line")
        for option, path in named
        if (why := outside(path)) is not None
    ]
    if problems:
        raise RecipeError(problems)
