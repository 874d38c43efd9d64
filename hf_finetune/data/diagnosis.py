"""Says which file and line made reading fail; the libraries' own errors rarely do."""

from __future__ import annotations

import csv
import errno
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets.exceptions import DatasetsError

from hf_finetune.errors import DataError, FinetuneError, Problem, StorageError

READING_ERRORS = (
    DatasetsError,
    OSError,
    ValueError,
    TypeError,
    KeyError,
    RuntimeError,
    StopIteration,
)
"""What `datasets`, pandas and pyarrow raise for data that they can't read.

pyarrow's errors are ValueErrors; an empty JSONL file gives a bare StopIteration.
"""

_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


def reading_error(files: Sequence[str], suffix: str, error: Exception) -> FinetuneError:
    """The error to raise when files could not be read.

    Args:
        files: All of one format.
        suffix: `.csv`, `.tsv`, `.json`, `.jsonl` or `.parquet`.
        error: What the library raised.

    Returns:
        A `DataError` that names file and line where a second look finds them, or a `StorageError` for a full disk.
    """
    causes = list(_causes(error))
    ours = next((cause for cause in causes if isinstance(cause, FinetuneError)), None)
    if ours is not None:
        return ours
    full = next((cause for cause in causes if isinstance(cause, OSError) and cause.errno in _STORAGE), None)
    if full is not None:
        return StorageError(f"can't cache the data: {full.strerror}; free space or set data.cache")
    problems = [problem for file in files if (problem := _broken(file, suffix)) is not None]
    if problems:
        # An empty file beside others is no fault by itself.
        return DataError(next((problem for problem in problems if problem.line is not None), problems[0]))
    deepest = str(causes[-1]).strip().partition("\n")[0] or type(causes[-1]).__name__
    return DataError(Problem(f"can't be read as {suffix}: {deepest}", file=", ".join(files[:3])))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, outermost first."""
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)


def _broken(file: str, suffix: str) -> Problem | None:
    """What is wrong with one file, if anything is."""
    if suffix == ".parquet":
        return _broken_parquet(file)
    problem = undecodable(file)
    if problem is not None:
        return problem
    if suffix == ".jsonl":
        return _broken_lines(file)
    if suffix == ".json":
        return _broken_json(file)
    return _broken_table(file, suffix)


def undecodable(file: str) -> Problem | None:
    """Where a file is not UTF-8, if it is not, or that it holds nothing but white space."""
    offset, blank = 0, True
    with Path(file).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                message = f"is not UTF-8 at byte {offset + error.start}; save it as UTF-8"
                return Problem(message, file=file, line=number)
            offset += len(line)
            blank = blank and not line.strip()
    return Problem("has 0 rows: the file is empty", file=file) if blank else None


def _broken_lines(file: str) -> Problem | None:
    with Path(file).open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                return Problem(f"is no valid JSON at column {error.colno}: {error.msg}", file=file, line=number)
            if not isinstance(row, dict):
                return Problem("is no JSON object; every line must be one row in braces", file=file, line=number)
    return None


def _broken_json(file: str) -> Problem | None:
    text = Path(file).read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":  # several values: JSON Lines under the suffix .json
            return _broken_lines(file)
        return Problem(f"is no valid JSON at column {error.colno}: {error.msg}", file=file, line=error.lineno)
    if isinstance(rows, list) and not rows:
        return Problem("has 0 rows: the list is empty", file=file)
    return None


def _broken_table(file: str, suffix: str) -> Problem | None:
    tab = suffix == ".tsv"
    with Path(file).open(encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, delimiter="\t" if tab else ",", quoting=csv.QUOTE_NONE if tab else csv.QUOTE_MINIMAL)
        header = next(rows, [])
        empty = True
        for row in rows:
            empty = False
            if len(row) > len(header):
                message = f"has {len(row)} fields, the header {len(header)}; "
                hint = "remove the extra tabs" if tab else "put texts with commas in quotes"
                return Problem(message + hint, file=file, line=rows.line_num)
    return Problem("has 0 rows below its header", file=file) if empty else None


def _broken_parquet(file: str) -> Problem | None:
    """A parquet file begins and ends with `PAR1` (https://parquet.apache.org/docs/file-format/)."""
    with Path(file).open("rb") as content:
        head = content.read(4)
        content.seek(-min(4, Path(file).stat().st_size), 2)
        tail = content.read(4)
    if head != b"PAR1":
        return Problem("is no parquet file", file=file)
    return None if tail == b"PAR1" else Problem("is a truncated parquet file", file=file)
