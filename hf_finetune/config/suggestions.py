"""Find the name that was probably meant: among known words, or among the files that are there."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path

MOST_ENTRIES = 10_000
"""Entries of a folder among which a name is looked for."""


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Find the most similar word, whatever its case; else, unless it must be much alike, the only one that has it."""
    lowered = {name.lower(): name for name in known}
    near = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=cutoff)
    within = [name for name in lowered if cutoff < 0.8 and len(word) > 2 and word.lower() in name]
    found = near or (within if len(within) == 1 else [])
    return lowered[found[0]] if found else None


def suggestion(word: str, known: Sequence[str]) -> str:
    """Give `; did you mean 'x'?` for the nearest known word, else the list of known words."""
    near = nearest(word, known)
    return f"; known: {', '.join(known)}" if near is None else f"; did you mean {near!r}?"


def meant(path: str | Path, suffixes: Sequence[str] = (), holding: str = "") -> str:
    """Give `; did you mean 'folder/x'?` for a path that is not there, where something much like it is; else nothing.

    Args:
        path: Each part of it may be misspelt.
        suffixes: Of the files that may be meant; none means folders.
        holding: A file that such a folder has in it, or in a folder in it.
    """
    parts = Path(path).expanduser().parts
    place = Path(parts[0]) if parts and Path(parts[0]).is_absolute() else Path()
    changed = False
    for number, part in enumerate(parts[1:] if place.parts else parts):
        is_last = number == len(parts) - 1 - bool(place.is_absolute())
        if (place / part).exists() and not is_last:
            place /= part
            continue
        near = nearest(part, _inside(place, suffixes if is_last else (), holding if is_last else ""))
        if near is None:
            return ""
        place, changed = place / near, True
    return f"; did you mean {str(place)!r}?" if changed else ""


def _inside(folder: Path, suffixes: Sequence[str], holding: str) -> list[str]:
    found = []
    try:
        for _, entry in zip(range(MOST_ENTRIES), folder.iterdir(), strict=False):
            if suffixes:
                fits = entry.suffix.lower() in suffixes
            else:
                fits = entry.is_dir() and (not holding or (entry / holding).exists() or any(entry.glob(f"*/{holding}")))
            if fits and not entry.name.startswith("."):
                found.append(entry.name)
    except OSError:
        return []
    return sorted(found)
