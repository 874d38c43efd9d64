"""`HF_FINETUNE_ROOT`: where it is set, as for jobs, nothing outside that folder is read or written by name."""

from __future__ import annotations

import os
from pathlib import Path

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
