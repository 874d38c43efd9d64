"""Local files: which ones a pattern means, how each format is read, what identifies their content."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.json.json import JsonConfig

from hf_finetune.data import diagnosis
from hf_finetune.errors import DataError, Problem
from hf_finetune.schema.complaints import suggestion

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
        for file in self.files:
            digest.update(_digest(file, whole=whole))
        return digest.hexdigest()

    def load(self, cache: str) -> datasets.Dataset:
        """All rows.

        Args:
            cache: Folder for the Arrow files that the rows are mapped from.

        Raises:
            DataError: A file can't be read; the message names it, and the line where that is known.
        """
        if BUILDERS[self.suffix] == "json":
            # pyarrow's JSON reader takes any bytes for text; decoding would fail later, without a place.
            broken = next((problem for file in self.files if (problem := diagnosis.undecodable(file))), None)
            if broken is not None and (broken.line is not None or len(self.files) == 1):
                raise DataError(broken)
        try:
            rows = datasets.load_dataset(**self._arguments(), cache_dir=cache)
        except diagnosis.READING_ERRORS as error:
            raise diagnosis.reading_error(self.files, self.suffix, error) from error
        if "__index_level_0__" in rows.column_names:
            raise DataError(Problem("rows have more fields than the header; name every column", file=self.place))
        return rows

    def stream(self) -> datasets.IterableDataset:
        """The rows, read lazily; errors surface while reading, see `diagnosis.reading_error`."""
        return datasets.load_dataset(**self._arguments(), streaming=True)

    def explain(self, error: Exception) -> Exception:
        """What a user is told about an error that surfaced while a stream was read."""
        return diagnosis.reading_error(self.files, self.suffix, error)

    def _arguments(self) -> dict[str, Any]:
        options = dict(OPTIONS.get(self.suffix, {}))
        if self.suffix in {".json", ".jsonl"} and "parse_agent_traces" in {
            f.name for f in dataclasses.fields(JsonConfig)
        }:
            # datasets 5 rewrites the columns of whatever looks like the log of a coding agent.
            options["parse_agent_traces"] = False
        # `datasets` reads each name as a pattern; brackets in a name are no pattern here.
        names = [glob.escape(str(Path(file).absolute())) for file in self.files]
        return {"path": BUILDERS[self.suffix], "data_files": names, "split": "train", **options}


def find(patterns: str | Sequence[str], folder: str | None, key: str) -> LocalFiles:
    """The files that names and globs mean, in sorted order within each glob.

    Args:
        patterns: One or several, relative to `folder`, else to the working directory.
        folder: `data.source` where it is a folder.
        key: Recipe key, for messages.

    Raises:
        DataError: Nothing matches, formats are unknown or mixed, or a file is matched twice or is empty.
    """
    files: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        files += _matches(str(Path(folder or "", pattern).expanduser()), key)
    repeated = next((file for file in files if files.count(file) > 1), None)
    if repeated is not None:
        raise DataError(Problem("is matched twice; its rows would count twice", key=key, file=repeated))
    suffixes = sorted({Path(file).suffix.lower() for file in files})
    unknown = [file for file in files if Path(file).suffix.lower() not in BUILDERS]
    if unknown:
        known = ", ".join(BUILDERS)
        message = f"unknown format {Path(unknown[0]).suffix or '(no suffix)'!r}; known: {known}"
        raise DataError(Problem(message, key=key, file=unknown[0]))
    if len(suffixes) > 1:
        raise DataError(Problem(f"mixes {' and '.join(suffixes)} files; one split needs one format", key=key))
    empty = next((file for file in files if Path(file).stat().st_size == 0), None)
    if empty is not None:
        raise DataError(Problem(f"{_split(key)} has 0 rows: the file is empty", key=key, file=empty))
    return LocalFiles(key, tuple(files))


def _matches(pattern: str, key: str) -> list[str]:
    path = Path(pattern)
    if path.is_file():
        return [pattern]
    if path.is_dir():
        raise DataError(Problem(f"is a folder; name its files, e.g. {path / '*.jsonl'}", key=key, file=pattern))
    files = sorted(match for match in glob.glob(pattern, recursive=True) if Path(match).is_file())  # noqa: PTH207
    if not files:
        hint = ""
        if path.parent.is_dir():
            beside = sorted(file.name for file in path.parent.iterdir() if file.suffix.lower() in BUILDERS)
            hint = suggestion(path.name, beside[:20]) if beside else ""
        raise DataError(Problem(f"no file matches {pattern!r}{hint}", key=key))
    return files


def _digest(file: str, *, whole: bool) -> bytes:
    with Path(file).open("rb") as stream:
        if whole:
            return hashlib.file_digest(stream, "sha256").digest()
        size = Path(file).stat().st_size
        digest = hashlib.sha256(str(size).encode())
        digest.update(stream.read(SAMPLE_BYTES))
        stream.seek(max(0, size - SAMPLE_BYTES))
        digest.update(stream.read(SAMPLE_BYTES))
        return digest.digest()


def _split(key: str) -> str:
    return f"{key.rpartition('.')[2]} split"
