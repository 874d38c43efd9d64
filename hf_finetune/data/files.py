"""Local files: which ones a pattern means, how they are read, what identifies their content."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_finetune import digests
from hf_finetune.data import cache, diagnosis, loading, streamed
from hf_finetune.errors import DataError
from hf_finetune.schema import datafiles

if TYPE_CHECKING:
    import datasets

    from hf_finetune.data.faults import Wanted

SAMPLE_BYTES = 1 << 20
"""How much of each end of a streamed file goes into its identity."""


@dataclass(frozen=True)
class LocalFiles:
    """The files of one split, all of one format."""

    key: str
    """The recipe key that names them, e.g. `data.train`."""
    files: tuple[str, ...]
    cache: str | None = None
    """The recipe's `data.cache`: beside it stands what is known about the content of files."""

    @property
    def suffix(self) -> str:
        """Their format: `.csv`, `.tsv`, ..."""
        return Path(self.files[0]).suffix.lower()

    @property
    def place(self) -> str:
        """What messages call them."""
        more = len(self.files) - 1
        return self.files[0] + (f" (and {more} more, rows counted through)" if more else "")

    def identity(self, *, whole: bool) -> str:
        """SHA-256 of suffix and contents, wherever the files lie.

        Args:
            whole: Read all of every file; else its size and both ends, for streams that are too large to read twice.
        """
        digest = hashlib.sha256(self.suffix.encode())
        for one in self.digests(whole=whole):
            digest.update(one)
        return digest.hexdigest()

    def digests(self, *, whole: bool) -> list[bytes]:
        """SHA-256 of each file: see `identity`. A file that did not change since it was asked for is not read again."""
        if not whole:
            return [_sampled(*stamp) for stamp in self.stamps()]
        root = cache.root(self.cache)
        return [_digest(*stamp, root) for stamp in self.stamps()]

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, size in bytes and time of change in ns of each file."""
        return [(file, (state := Path(file).stat()).st_size, state.st_mtime_ns) for file in self.files]

    def load(self, cache: str, wanted: Wanted) -> datasets.Dataset:
        """All rows, with the wanted columns.

        Args:
            cache: Folder for the Arrow file that the rows are mapped from.
            wanted: What the task reads.

        Raises:
            DataError: Everything that is wrong with the files, each fault with its line where it has one.
            StorageError: The cache can't be written.
        """
        try:
            return loading.load(self.files, self.suffix, wanted, Path(cache, f"{self.key}.arrow"))
        except (DataError, *diagnosis.READING_ERRORS) as error:
            raise self.explain(error) from error

    def stream(self, wanted: Wanted) -> datasets.IterableDataset:
        """The rows, read lazily, as are their faults.

        Raises:
            DataError: What the heads of parquet files tell is wrong.
        """
        try:
            return streamed.stream(self.files, self.suffix, wanted, self.key)
        except (DataError, *diagnosis.READING_ERRORS) as error:
            raise self.explain(error) from error

    def explain(self, error: Exception) -> Exception:
        """What a user is told about an error that surfaced while the files were read."""
        told = diagnosis.reading_error(self.files, self.suffix, error)
        if not isinstance(told, DataError):
            return told
        return DataError(p if p.key else dataclasses.replace(p, key=self.key) for p in told.problems)


def find(patterns: str | Sequence[str], folder: str | None, key: str) -> LocalFiles:
    """The files that names and globs mean; see `datafiles.find`.

    Raises:
        DataError: Everything that is wrong with them, such as that nothing matches.
    """
    found = datafiles.find(patterns, folder, key)
    if found.problems:
        raise DataError(found.problems)
    return LocalFiles(key, tuple(found.files))


@functools.cache
def _digest(file: str, size: int, changed: int, root: Path) -> bytes:
    """SHA-256 of a file; size in bytes and time of change in ns tell whether an earlier answer still holds."""
    return digests.sha256(file, root)


@functools.cache
def _sampled(file: str, size: int, changed: int) -> bytes:
    """SHA-256 of size and both ends of a file; arguments as for `_digest`."""
    with Path(file).open("rb") as stream:
        digest = hashlib.sha256(str(size).encode())
        digest.update(stream.read(SAMPLE_BYTES))
        stream.seek(max(0, size - SAMPLE_BYTES))
        digest.update(stream.read(SAMPLE_BYTES))
        return digest.digest()
