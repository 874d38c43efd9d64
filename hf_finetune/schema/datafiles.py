"""Local data files, looked at without any library: which a pattern means, and what their first bytes tell.

`problems` is what can be known of the data in a moment; the rows themselves are read by `hf_finetune.data`.
"""

from __future__ import annotations

import glob
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_finetune.errors import Problem
from hf_finetune.schema import filehead
from hf_finetune.schema.complaints import suggestion

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
"""Formats that are read."""
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4"}
MOST_FILES = 100
"""Files of a split that are looked at."""

_KINDS = {
    stat.S_ISFIFO: "a pipe (FIFO)",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}


@dataclass
class Found:
    """The files that names and globs mean."""

    files: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def find(patterns: str | Sequence[str], folder: str | None, key: str) -> Found:
    """The files that names and globs mean, in sorted order within each glob, and everything that is wrong with them.

    No file is opened: reading a pipe would wait for ever.

    Args:
        patterns: One or several, relative to `folder`, else to the working directory.
        folder: `data.source` where it is a folder.
        key: Recipe key, for messages.
    """
    found = Found()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        _match(os.path.expanduser(str(Path(folder or "", pattern))), key, found)  # noqa: PTH111 (may hold any user)
    files, said = found.files, found.problems
    for file in dict.fromkeys(file for file in files if files.count(file) > 1):
        said.append(Problem("is matched twice; its rows would count twice", key=key, file=file))
    suffixes = sorted({Path(file).suffix.lower() for file in files})
    unknown = [file for file in files if Path(file).suffix.lower() not in SUFFIXES]
    said += [Problem(_unknown_format(file), key=key, file=file) for file in unknown]
    if not unknown and len(suffixes) > 1:
        said.append(Problem(f"mixes {' and '.join(suffixes)} files; one split needs one format", key=key))
    for file in files:
        if Path(file).stat().st_size == 0:
            split = key.rpartition(".")[2]
            said.append(Problem(f"{split} split has 0 rows: the file is empty", key=key, file=file))
    return found


def problems(recipe: Any) -> list[Problem]:
    """What is wrong with the local files of a recipe, of the kind `DataError`; at most 64 KiB a file are read.

    Args:
        recipe: A `Recipe`, or one of which only some fields could be read: others raise AttributeError, and are
            skipped. Data sets of the Hub are skipped too.
    """
    data = getattr(recipe, "data", None)
    try:
        columns = recipe.task.columns()
        optional = recipe.task.optional_columns()
    except (AttributeError, ValueError):
        # A field of the task is missing or malformed, which is a finding of its own.
        columns, optional = [], []
    needed = [column for column in columns if column not in optional]
    said: list[Problem] = []
    for key, names, source in _splits(data):
        if source is not None and not Path(source).expanduser().is_dir():
            continue
        found = find(names, source, key)
        said += found.problems
        if not found.problems:
            for file in found.files[:MOST_FILES]:
                said += [replace(problem, key=key) for problem in filehead.inspect(file, needed)]
    return list(dict.fromkeys(said))


def _splits(data: Any) -> Iterator[tuple[str, Any, str | None]]:
    """Key, names and source of every split that could be read."""
    parts = getattr(data, "mix", None) or []
    blocks = [(f"data.mix.{index}", part, ["train"]) for index, part in enumerate(parts)]
    blocks.append(("data", data, ["train", "validation", "test"]))
    for prefix, block, names in blocks:
        for name in names:
            value = getattr(block, name, None)
            if value is not None and hasattr(block, "source"):
                yield f"{prefix}.{name}", value, block.source


def _match(pattern: str, key: str, found: Found) -> None:
    path = Path(pattern)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        mode = 0
    odd = next((name for test, name in _KINDS.items() if test(mode)), None)
    if stat.S_ISREG(mode):
        found.files.append(pattern)
    elif stat.S_ISDIR(mode):
        message = f"is a folder; name its files, e.g. {path / '*.jsonl'}"
        found.problems.append(Problem(message, key=key, file=pattern))
    elif odd is not None:
        message = f"is {odd}, not a regular file; write the data into a file"
        found.problems.append(Problem(message, key=key, file=pattern))
    elif path.is_symlink():
        message = f"is a symbolic link to {path.readlink()}, which does not exist"
        found.problems.append(Problem(message, key=key, file=pattern))
    else:
        matches = sorted(glob.glob(pattern, recursive=True)) if "\0" not in pattern else []  # noqa: PTH207
        files = [match for match in matches if not Path(match).is_dir()]
        for file in files:
            # Each name again, as it may be a pipe too; brackets in it are no pattern then.
            _match(file, key, found)
        if not files:
            found.problems.append(Problem(f"no file matches {pattern!r}{_beside(path)}", key=key))


def _beside(path: Path) -> str:
    """The nearest data file of the same folder."""
    try:
        beside = sorted(file.name for file in path.parent.iterdir() if file.suffix.lower() in SUFFIXES)
    except (OSError, ValueError):
        return ""
    return suggestion(path.name, beside[:20]) if beside else ""


def _unknown_format(file: str) -> str:
    suffix = Path(file).suffix
    if suffix.lower() in COMPRESSED:
        return f"is compressed ({suffix}); unpack it"
    return f"unknown format {suffix or '(no suffix)'!r}; known: {', '.join(SUFFIXES)}"
