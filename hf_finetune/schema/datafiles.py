"""Local data files, looked at without any library: which a pattern means, and what their first bytes tell.

`problems` is what can be known of the data in a moment; the rows themselves are read by `hf_finetune.data`.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_finetune.errors import Problem
from hf_finetune.schema.complaints import suggestion

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
"""Formats that are read."""
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4"}
HEAD = 1 << 16
"""Bytes of a file that are looked at."""
MOST_FILES = 100
"""Files of a split that are looked at."""

_KINDS = {
    stat.S_ISFIFO: "a pipe (FIFO)",
    stat.S_ISSOCK: "a socket",
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
}
_MARKS = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""First bytes of compressed files."""
COLUMNS = "is one object of lists, which is read as one row; write an object a row, as a list or one a line"
"""What is said about a file of columns instead of rows."""
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


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
    """What is wrong with the local files of a recipe, of the kind `DataError`; at most `HEAD` bytes a file are read.

    Args:
        recipe: A `Recipe`, or one of which only some fields could be read: others raise AttributeError, and are
            skipped. Data sets of the Hub are skipped too.
    """
    data = getattr(recipe, "data", None)
    try:
        columns = recipe.task.columns()
        optional = recipe.task.optional_columns()
    except AttributeError:
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
                said += [_keyed(problem, key) for problem in inspect(file, needed)]
    return list(dict.fromkeys(said))


def inspect(file: str, columns: Sequence[str]) -> list[Problem]:
    """What the first `HEAD` bytes of a file tell: compression, encoding, and whether the columns are there.

    Args:
        file: A regular file with one of `SUFFIXES`.
        columns: What the task needs.
    """
    suffix = Path(file).suffix.lower()
    try:
        with Path(file).open("rb") as stream:
            head = stream.read(HEAD)
    except OSError as error:
        return [Problem(f"can't be read: {error.strerror}", file=file)]
    if suffix == ".parquet":
        return [] if head.startswith(b"PAR1") else [Problem("is no parquet file", file=file)]
    broken = undecodable(head, file)
    return _text_problems(head, suffix, file, columns) if broken is None else [broken]


def _text_problems(head: bytes, suffix: str, file: str, columns: Sequence[str]) -> list[Problem]:
    text = head.decode("utf-8-sig", errors="ignore")
    whole = len(head) < HEAD
    if whole and not text.strip():
        return [Problem("has 0 rows: the file is empty", file=file)]
    if suffix in {".csv", ".tsv"}:
        return _header_problems(text, suffix, file, columns)
    row, alone = _first_row(text)
    if row is None:
        return []
    if suffix == ".json" and whole and alone and is_columns(row):
        return [Problem(COLUMNS, file=file)]
    return missing_columns(list(row), columns, file)


def undecodable(head: bytes, file: str) -> Problem | None:
    """What tells that the beginning of a file is no UTF-8 text."""
    for mark, name in _MARKS.items():
        if head.startswith(mark):
            return Problem(f"is compressed ({name}); unpack it", file=file)
    if head.startswith(_UTF16) or (len(head) > 3 and head[:2].count(0) == 1 and head[2:4].count(0) == 1):
        return Problem("is UTF-16; save it as UTF-8", file=file, line=1)
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        # The last character may be cut in two.
        if error.start < len(head) - 3 or len(head) < HEAD:
            line = head.count(b"\n", 0, error.start) + 1
            return Problem(f"is not UTF-8 at byte {error.start}; save it as UTF-8", file=file, line=line)
    return None


def missing_columns(have: Sequence[str], need: Sequence[str], file: str) -> list[Problem]:
    """One line for each column that is missing, with the nearest name or all there are."""
    found = []
    for column in need:
        if column not in have:
            near = suggestion(column, list(have))
            everything = f" it has {', '.join(have)}" if "did you mean" in near else ""
            found.append(Problem(f"has no column {column!r}{near}{everything}", file=file))
    return found


def is_columns(value: Any) -> bool:
    """Whether this is a table column by column, `{"text": [...], "label": [...]}`, and not one chat."""
    if not isinstance(value, dict) or not value or not all(isinstance(column, list) for column in value.values()):
        return False
    return not any(isinstance(cell, dict) and "role" in cell for column in value.values() for cell in column[:1])


def header_problems(header: Sequence[str], columns: Sequence[str], file: str) -> list[Problem]:
    """What is wrong with the header of a csv or tsv file."""
    repeated = [name for name in dict.fromkeys(header) if header.count(name) > 1]
    found = [Problem(f"names column {name!r} twice in its header", file=file, line=1) for name in repeated]
    missing = missing_columns(header, columns, file)
    if missing and len(missing) == len(columns) and not all(_is_name(name) for name in header):
        # Texts and numbers where names should be.
        shown = ", ".join(header)[:60]
        return [*found, Problem(f"has no header: its first line is {shown!r}; add one", file=file, line=1)]
    return found + missing


def _is_name(cell: str) -> bool:
    return (
        bool(cell)
        and len(cell) <= 40
        and cell.replace("_", "").replace("-", "").replace(".", "").isalnum()
        and (not cell.replace(".", "").replace("-", "").isdigit())
    )


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


def _keyed(problem: Problem, key: str) -> Problem:
    return Problem(problem.message, key=key, file=problem.file, line=problem.line)


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


def _header_problems(text: str, suffix: str, file: str, columns: Sequence[str]) -> list[Problem]:
    tab, content = suffix == ".tsv", io.StringIO(text, newline="")
    rows = csv.reader(content, delimiter="\t", quoting=csv.QUOTE_NONE) if tab else csv.reader(content)
    try:
        return header_problems(next((row for row in rows if row), []), columns, file)
    except csv.Error:
        return []  # a header longer than 128 KiB: for the whole look


def _first_row(text: str) -> tuple[dict[str, Any] | None, bool]:
    """The first row of JSON or JSON Lines, where it is wholly there and an object; whether it is all there is."""
    text = text.strip()
    try:
        first, end = json.JSONDecoder().raw_decode(text.removeprefix("[").lstrip())
    except (ValueError, RecursionError):
        return None, False
    return (first if isinstance(first, dict) else None), end == len(text)
