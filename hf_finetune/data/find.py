"""The local files that a recipe names, and what can be known of them in a moment, without any library."""

from __future__ import annotations

import glob
import io
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hf_finetune.config.problems import suggestion
from hf_finetune.data import readers
from hf_finetune.errors import DataError, Problem

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
MOST_FILES = 100  # files of a split that are looked at


def find(patterns: str | Sequence[str], folder: str | None, key: str) -> tuple[list[str], list[Problem]]:
    """The files that names and globs mean, in sorted order within each glob, and everything that is wrong with them.

    Args:
        patterns: One or several, relative to `folder`, else to the working directory.
        folder: `data.source` where it is a folder.
        key: Recipe key, for messages.
    """
    files: list[str] = []
    problems: list[Problem] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for one in _match(os.path.expanduser(str(Path(folder or "", pattern))), key):  # noqa: PTH111 (may hold any user)
            (problems if isinstance(one, Problem) else files).append(one)  # type: ignore[arg-type]
    for file in dict.fromkeys(file for file in files if files.count(file) > 1):
        problems.append(Problem("is matched twice; its rows would count twice", key=key, file=file))
    suffixes = sorted({Path(file).suffix.lower() for file in files})
    for file in files:
        suffix = Path(file).suffix
        if suffix.lower() in {".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4"}:
            problems.append(Problem(f"is compressed ({suffix}); unpack it", key=key, file=file))
        elif suffix.lower() not in SUFFIXES:
            what = f"unknown format {suffix or '(no suffix)'!r}; known: {', '.join(SUFFIXES)}"
            problems.append(Problem(what, key=key, file=file))
    if len(suffixes) > 1 and set(suffixes) <= set(SUFFIXES):
        problems.append(Problem(f"mixes {' and '.join(suffixes)} files; one split needs one format", key=key))
    for file in files:
        if Path(file).stat().st_size == 0:
            split = key.rpartition(".")[2]
            problems.append(Problem(f"{split} split has 0 rows: the file is empty", key=key, file=file))
    return files, problems


def _match(pattern: str, key: str) -> Iterator[str | Problem]:
    """Yield files, or what is wrong with a name; nothing is opened, for reading a pipe would wait for ever."""
    path = Path(pattern)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        mode = 0
    if stat.S_ISREG(mode):
        yield pattern
    elif stat.S_ISDIR(mode):
        yield Problem(f"is a folder; name its files, e.g. {path / '*.jsonl'}", key=key, file=pattern)
    elif mode:
        odd = "a pipe (FIFO)" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        yield Problem(f"is {odd}, not a regular file; write the data into a file", key=key, file=pattern)
    elif path.is_symlink():
        yield Problem(f"is a symbolic link to {path.readlink()}, which does not exist", key=key, file=pattern)
    else:
        matches = sorted(glob.glob(pattern, recursive=True)) if "\0" not in pattern else []  # noqa: PTH207
        files = [match for match in matches if not Path(match).is_dir()]
        for file in files:
            # Each name again, as it may be a pipe too; brackets in it are no pattern then.
            yield from _match(file, key)
        if not files:
            try:
                beside = sorted(file.name for file in path.parent.iterdir() if file.suffix.lower() in SUFFIXES)
            except (OSError, ValueError):
                beside = []
            near = suggestion(path.name, beside[:20]) if beside else ""
            yield Problem(f"no file matches {pattern!r}{near}", key=key)


def problems(recipe: Any) -> list[Problem]:
    """Return the problems of the local files of a recipe, for a `DataError`; the beginning of each file is read.

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
    parts = getattr(data, "mix", None) or []
    blocks = [(f"data.mix.{index}", part, ["train"]) for index, part in enumerate(parts)]
    found: list[Problem] = []
    for prefix, block, splits in [*blocks, ("data", data, ["train", "validation", "test"])]:
        for split in splits:
            names, source = getattr(block, split, None), getattr(block, "source", "unreadable")
            if names is None or (source is not None and not Path(source).expanduser().is_dir()):
                continue
            files, wrong = find(names, source, f"{prefix}.{split}")
            found += wrong
            for file in [] if wrong else files[:MOST_FILES]:
                found += [replace(problem, key=f"{prefix}.{split}") for problem in look(file, needed)]
    return list(dict.fromkeys(found))


def look(file: str, needed: Sequence[str]) -> list[Problem]:
    """Return problems that the first `readers.HEAD` bytes of a file show: compression, encoding, missing columns."""
    form = Path(file).suffix.lower().removeprefix(".")
    try:
        with Path(file).open("rb") as stream:
            head = stream.read(readers.HEAD)
    except OSError as error:
        return [Problem(f"can't be read: {error.strerror}", file=file)]
    if form == "parquet":
        return [] if head.startswith(b"PAR1") else [Problem("is no parquet file", file=file)]
    if (broken := readers.undecodable(head, file)) is not None:
        return [broken]
    text = head.decode("utf-8-sig", errors="ignore")
    whole = len(head) < readers.HEAD
    if whole and not text.strip():
        return [Problem("has 0 rows: the file is empty", file=file)]
    try:
        found, _ = readers.rows(io.StringIO(text, newline=readers.newline(form)), form, file, needed)
        row = next(found, None)
    except DataError as error:
        # What is cut off in the middle of a row may be right.
        return list(error.problems) if whole or form in readers.TABLES else []
    if row is None or row.fault or form in readers.TABLES:
        return []
    return readers.missing_columns(list(row.cells), needed, file)
