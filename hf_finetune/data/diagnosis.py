"""Says which file and line made reading fail; the libraries' own errors rarely do."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from pathlib import Path

from datasets.exceptions import DatasetsError

from hf_finetune.data.faults import Wanted
from hf_finetune.data.scan import scan
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
    return DataError(Problem(f"can't be read as {suffix}: {deepest}; write it anew", file=", ".join(files[:3])))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, outermost first."""
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)


def _broken(file: str, suffix: str) -> Problem | None:
    """What is wrong with one file, if anything is."""
    if suffix == ".parquet":
        return broken_parquet(file)
    return next(iter(scan(file, suffix, Wanted())), None)


def broken_parquet(file: str) -> Problem | None:
    """What is wrong with a parquet file, if anything is.

    A parquet file begins and ends with `PAR1` (https://parquet.apache.org/docs/file-format/).
    """
    with Path(file).open("rb") as content:
        head = content.read(4)
        content.seek(-min(4, Path(file).stat().st_size), 2)
        tail = content.read(4)
    if head != b"PAR1":
        return Problem("is no parquet file", file=file)
    return None if tail == b"PAR1" else Problem("is a truncated parquet file", file=file)
