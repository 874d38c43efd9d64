"""Reads rows one by one, from a file or a pipe, as they stand: csv, tsv, jsonl, parquet, or plain lines."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from hf_finetune.errors import DataError, Problem, RecipeError
from hf_finetune.schema.filehead import header_problems, missing_columns

Format = Literal["csv", "tsv", "jsonl", "parquet", "lines"]
FORMATS: tuple[Format, ...] = ("csv", "tsv", "jsonl", "parquet", "lines")
SUFFIXES: dict[str, Format] = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "lines",
}
STDIN = "-"
LINE = "text"
"""Column of a plain line."""
FIELD_LIMIT = 1 << 30
"""Characters of a csv field."""
CHUNK = 1 << 20
PARQUET_ROWS = 1024
"""Rows of a parquet file that are read together."""


@dataclass(frozen=True)
class Row:
    """One row."""

    number: int
    """Line of the file, from 1; row of a parquet file."""
    cells: dict[str, Any]
    """By column; empty where the row can't be read."""
    fault: str = ""
    """What is wrong with the row as such."""


@dataclass(frozen=True)
class Input:
    """Where rows come from."""

    name: str
    """A file, or `-`."""
    form: Format

    @property
    def place(self) -> str:
        """What messages call it."""
        return "standard input" if self.name == STDIN else self.name

    @property
    def is_pipe(self) -> bool:
        """Whether it can be read once only: standard input, or a pipe that has a name."""
        return self.name == STDIN or not Path(self.name).is_file()

    def identity(self) -> dict[str, Any]:
        """What tells whether this is the same input as before; nothing of a pipe.

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

    def count(self) -> int | None:
        """How many rows there are, for a progress bar; None where telling would take a second reading."""
        if self.is_pipe:
            return None
        if self.form == "parquet":
            return int(self._parquet_file().metadata.num_rows)
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
            yield from self._parquet(needed)
            return
        with self._opened() as stream:
            try:
                if self.form in ("csv", "tsv"):
                    yield from _table(stream, self.place, needed, tab=self.form == "tsv")
                elif self.form == "jsonl":
                    yield from _objects(stream, needed)
                else:
                    for number, line in enumerate(stream, 1):
                        yield Row(number, {LINE: line.rstrip("\r\n")})
            except UnicodeDecodeError as error:
                message = f"is not UTF-8 ({error.reason} at byte {error.start} of what was read last); save it as UTF-8"
                raise DataError(Problem(message, file=self.place)) from None

    @contextmanager
    def _opened(self) -> Iterator[IO[str]]:
        # Only csv and tsv see line ends inside fields; for the others `\r\n` ends a line, and a lone `\r` does not.
        newline = "" if self.form in ("csv", "tsv") else "\n"
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

    def _parquet_file(self) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(self.name)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(Problem(f"can't be read as parquet: {error}", file=self.name)) from error

    def _parquet(self, needed: Sequence[str]) -> Iterator[Row]:
        opened = self._parquet_file()
        problems = missing_columns(opened.schema_arrow.names, needed, self.name)
        if problems:
            raise DataError(problems)
        number = 0
        for batch in opened.iter_batches(batch_size=PARQUET_ROWS):
            for cells in batch.to_pylist():
                number += 1
                yield Row(number, cells)

    def schema(self) -> Any:
        """Arrow schema of a parquet file; None of any other."""
        if self.form != "parquet":
            return None
        return self._parquet_file().schema_arrow


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
        if found == "parquet":
            raise RecipeError("parquet can't be read from a pipe; give --input FILE")
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


def _table(stream: IO[str], place: str, needed: Sequence[str], *, tab: bool) -> Iterator[Row]:
    """Csv with quotes, tsv without."""
    csv.field_size_limit(FIELD_LIMIT)
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tab else {}
    reader = csv.reader(stream, **options)
    header = next((record for record in reader if record), None)
    if header is None:
        raise DataError(Problem("has no header: it is empty", file=place))
    problems = header_problems(header, needed, place)
    if problems:
        raise DataError(problems)
    before = reader.line_num
    for record in reader:
        if record:
            cells = dict(zip(header, record, strict=False))
            fault = "" if len(record) == len(header) else f"has {len(record)} fields, the header {len(header)}"
            yield Row(before + 1, cells, fault)
        before = reader.line_num


def _objects(stream: IO[str], needed: Sequence[str]) -> Iterator[Row]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            cells = json.loads(line, object_pairs_hook=_once)
        except ValueError as error:
            what = getattr(error, "msg", None) or str(error)
            yield Row(number, {}, f"is no JSON: {what}")
            continue
        if not isinstance(cells, dict):
            yield Row(number, {}, "is no JSON object; every line must be one row in braces")
            continue
        absent = [name for name in needed if name not in cells]
        yield Row(number, cells, f"has no key {absent[0]!r}" if absent else "")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the key {twice!r} twice")
    return found
