"""Reads rows one by one, from a file or a pipe, as training reads them: csv, tsv, json, parquet, or plain lines."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

from hf_finetune.data import readers
from hf_finetune.data.readers import Row, missing_columns
from hf_finetune.errors import DataError, Problem, RecipeError

Format = Literal["csv", "tsv", "jsonl", "json", "parquet", "lines"]
FORMATS: tuple[Format, ...] = ("csv", "tsv", "jsonl", "json", "parquet", "lines")
SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".json": "json",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "lines",
}
STDIN = "-"
LINE = "text"
"""Column of a plain line."""
CHUNK = 1 << 20
PARQUET_ROWS = 1024
"""Rows of a parquet file that are read together."""


@dataclass(frozen=True)
class Input:
    """A file or pipe of rows."""

    name: str
    """A file, or `-`."""
    form: Format

    @property
    def place(self) -> str:
        """Its name in messages."""
        return "standard input" if self.name == STDIN else self.name

    @property
    def is_pipe(self) -> bool:
        """True of standard input and of pipes that have a name, which can be read once only."""
        return self.name == STDIN or not Path(self.name).is_file()

    def identity(self) -> dict[str, Any]:
        """A hash that tells whether this is the same input as before; nothing of a pipe.

        Raises:
            DataError: The file can't be read.
        """
        if self.is_pipe:
            return {}
        try:
            with Path(self.name).open("rb") as stream:
                return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
        except OSError as error:
            raise _unreadable(self.name, error) from error

    def recognised(self, needed: Sequence[str]) -> Input:
        """The same with the format that its first line tells; nothing is consumed.

        Args:
            needed: Columns without which no row is of use.
        """
        if self.name != STDIN or sys.stdin is None or sys.stdin.closed or not needed:
            return self
        peek = getattr(sys.stdin.buffer, "peek", None)
        head = b"" if peek is None else peek(1)
        line = head.decode("utf-8-sig", errors="ignore").partition("\n")[0].rstrip("\r")
        return replace(self, form=_head_format(line, needed))

    def count(self) -> int | None:
        """Number of rows, for a progress bar; None where counting would take a second reading."""
        if self.is_pipe:
            return None
        if self.form == "parquet":
            return int(self._parquet().metadata.num_rows)
        if self.form == "json":
            return None
        lines = 0
        with Path(self.name).open("rb") as stream:
            while chunk := stream.read(CHUNK):
                if self.form == "csv" and b'"' in chunk:
                    return None  # a field may hold line ends
                lines += chunk.count(b"\n")
        return max(lines - (self.form in ("csv", "tsv")), 0) or None

    def rows(self, needed: Sequence[str]) -> Iterator[Row]:
        """Every row.

        Args:
            needed: Columns without which no row is of use.

        Raises:
            DataError: The file can't be read, is not UTF-8, or lacks a column.
        """
        if self.form == "parquet":
            opened = self._parquet()
            if problems := missing_columns(opened.schema_arrow.names, needed, self.name):
                raise DataError(problems)
            batches = (batch.to_pylist() for batch in opened.iter_batches(batch_size=PARQUET_ROWS))
            yield from (Row(number, cells) for number, cells in enumerate(chain.from_iterable(batches), 1))
            return
        with self._opened() as stream:
            try:
                if self.form == "lines":
                    for number, line in enumerate(stream, 1):
                        blank = "" if line.strip() else "is blank; remove the line"
                        yield Row(number, {LINE: line.rstrip("\r\n")}, blank)
                    return
                found, _ = readers.rows(stream, self.form, self.place, needed)
                for row in found:
                    absent = next((name for name in needed if name not in row.cells), None)
                    # A row of csv that is too short has a fault already.
                    yield Row(row.number, row.cells, row.fault or ("" if absent is None else f"has no key {absent!r}"))
            except UnicodeDecodeError as error:
                message = f"is not UTF-8 ({error.reason} at byte {error.start} of what was read last); save it as UTF-8"
                told = Problem(message, file=self.place) if self.is_pipe else readers.not_utf8(self.name)
                raise DataError(told) from None

    @contextmanager
    def _opened(self) -> Iterator[IO[str]]:
        newline = readers.newline(self.form)
        if self.name == STDIN:
            if sys.stdin is None or sys.stdin.closed:
                raise DataError(Problem("is closed; give --input FILE", file=self.place))
            stream = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline=newline)
            try:
                yield stream
            finally:
                stream.detach()
            return
        try:
            with Path(self.name).open(encoding="utf-8-sig", newline=newline) as stream:
                yield stream
        except OSError as error:
            raise _unreadable(self.name, error) from error

    def _parquet(self) -> Any:
        from hf_finetune.data import cells as data_cells

        return data_cells.opened(self.name)

    def schema(self) -> Any:
        """Arrow schema of a parquet file; None of any other."""
        return self._parquet().schema_arrow if self.form == "parquet" else None


def _unreadable(name: str, error: OSError) -> DataError:
    return DataError(Problem(f"can't be read: {error.strerror}", file=name))


def find(name: str, form: str | None) -> Input:
    """The input that a name means.

    Args:
        name: A file, or `-` for standard input.
        form: Its format; None follows its suffix, and takes standard input for plain lines.

    Raises:
        DataError: There is no such file.
        RecipeError: The format is not known.
    """
    if name == STDIN:
        found: Any = form or "lines"
        if found in ("parquet", "json"):
            raise RecipeError(f"{found} can't be read from a pipe; give --input FILE")
        return Input(name, found)
    file = Path(name)
    if not file.exists():
        raise DataError(Problem("is not there", file=name))
    if file.is_dir():
        raise DataError(Problem("is a folder; give one file", file=name))
    chosen: Any = form or SUFFIXES.get(file.suffix.lower())
    if chosen is None:
        known = ", ".join(SUFFIXES)
        raise RecipeError(f"{name}: its suffix tells no format ({known}); give --input-format")
    return Input(name, chosen)


def _head_format(line: str, needed: Sequence[str]) -> Format:
    """The format by the first line: JSON, or a header that names every column that is needed."""
    if line.startswith("{"):
        try:
            if isinstance(json.loads(line), dict):
                return "jsonl"
        except ValueError:
            return "lines"
    if "\t" in line and set(needed) <= set(line.split("\t")):
        return "tsv"
    return "csv" if set(needed) <= set(next(csv.reader([line]), [])) else "lines"
