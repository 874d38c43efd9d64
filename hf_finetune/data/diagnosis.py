"""Says what made reading fail, where that is not a fault of a row."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence

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

pyarrow's errors are ValueErrors; an empty file of a data set gives a bare StopIteration.
"""

_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


def reading_error(files: Sequence[str], suffix: str, error: Exception) -> FinetuneError:
    """The error to raise when files could not be read.

    Args:
        files: All of one format.
        suffix: `.csv`, `.tsv`, `.json`, `.jsonl` or `.parquet`.
        error: What the library raised.

    Returns:
        A `DataError`, or a `StorageError` for a full disk.
    """
    causes = list(_causes(error))
    ours = next((cause for cause in causes if isinstance(cause, FinetuneError)), None)
    if ours is not None:
        return ours
    full = next((cause for cause in causes if isinstance(cause, OSError) and cause.errno in _STORAGE), None)
    if full is not None:
        return StorageError(f"can't cache the data: {full.strerror}; free space or set data.cache")
    deepest = str(causes[-1]).strip().partition("\n")[0] or type(causes[-1]).__name__
    return DataError(Problem(f"can't be read as {suffix}: {deepest}; write it anew", file=", ".join(files[:3])))


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what led to it, outermost first."""
    following: BaseException | None = error
    while following is not None:
        yield following
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)
