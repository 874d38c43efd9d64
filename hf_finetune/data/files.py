"""Local files: which ones a pattern means, how each format is read, what identifies their content."""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.csv import csv as csv_builder
from datasets.packaged_modules.json.json import JsonConfig

from hf_finetune import digests
from hf_finetune.data import cache, diagnosis
from hf_finetune.data.faults import Wanted
from hf_finetune.data.scan import scan
from hf_finetune.errors import DataError, Problem
from hf_finetune.schema import datafiles

BUILDERS = {".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}
"""Suffix -> the builder of `datasets` that reads it."""

_TEXTS_STAY_TEXTS = {"keep_default_na": False}
"""pandas would turn cells such as NA, null and None into missing values."""
OPTIONS: dict[str, dict[str, Any]] = {
    ".csv": _TEXTS_STAY_TEXTS,
    # 3 is csv.QUOTE_NONE: a quotation mark in a tsv file is text.
    ".tsv": {**_TEXTS_STAY_TEXTS, "sep": "\t", "quoting": 3},
}

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

    def scan(self, wanted: Wanted) -> list[Problem]:
        """Everything that is wrong with the files, and that the libraries would repair in silence or not locate."""
        if self.suffix == ".parquet":
            found = [problem for file in self.files if (problem := diagnosis.broken_parquet(file)) is not None]
        else:
            found = [problem for file in self.files for problem in scan(file, self.suffix, wanted)]
        return [dataclasses.replace(problem, key=self.key) for problem in found]

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, size in bytes and time of change in ns of each file."""
        return [(file, (state := Path(file).stat()).st_size, state.st_mtime_ns) for file in self.files]

    def load(self, cache: str, texts: Sequence[str] = ()) -> datasets.Dataset:
        """All rows.

        Args:
            cache: Folder for the Arrow files that the rows are mapped from.
            texts: Columns of csv and tsv files that stay as they are written, though they look like numbers.

        Raises:
            DataError: A file can't be read; the message names it, and the line where that is known.
        """
        try:
            return datasets.load_dataset(**self._arguments(texts), cache_dir=cache)
        except diagnosis.READING_ERRORS as error:
            raise self.explain(error) from error

    def stream(self, texts: Sequence[str] = ()) -> datasets.IterableDataset:
        """The rows, read lazily; errors surface while reading, see `diagnosis.reading_error`. `texts` as for `load`."""
        return datasets.load_dataset(**self._arguments(texts), streaming=True)

    def explain(self, error: Exception) -> Exception:
        """What a user is told about an error that surfaced while the files were read."""
        told = diagnosis.reading_error(self.files, self.suffix, error)
        if not isinstance(told, DataError):
            return told
        return DataError(p if p.key else dataclasses.replace(p, key=self.key) for p in told.problems)

    def _arguments(self, texts: Sequence[str]) -> dict[str, Any]:
        options = dict(OPTIONS.get(self.suffix, {}))
        if options:
            options["converters"] = dict.fromkeys(texts, str)
            if _cuts_at_nul() and any(_has_nul(file) for file in self.files):
                options["engine"] = "python"
        if self.suffix in {".json", ".jsonl"} and "parse_agent_traces" in {
            f.name for f in dataclasses.fields(JsonConfig)
        }:
            # datasets 5 rewrites the columns of whatever looks like the log of a coding agent.
            options["parse_agent_traces"] = False
        # `datasets` reads each name as a pattern; brackets in a name are no pattern here.
        names = [glob.escape(str(Path(file).absolute())) for file in self.files]
        return {"path": BUILDERS[self.suffix], "data_files": names, "split": "train", **options}


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


@functools.cache
def _cuts_at_nul() -> bool:
    """Whether the parser of pandas, which `datasets` calls, silently cuts a text at a NUL, as that of 3.0 does."""
    return bool(csv_builder.pd.read_csv(io.BytesIO(b"a\nx\0y\n"))["a"][0] != "x\0y")


def _has_nul(file: str) -> bool:
    with Path(file).open("rb") as content:
        return any(b"\0" in block for block in iter(functools.partial(content.read, SAMPLE_BYTES), b""))
