"""Read rows one by one, from a file or a pipe, as training reads them: csv, tsv, json, parquet, or plain lines."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import IO, Any, Literal

from hf_finetune.data import readers
from hf_finetune.data.readers import Row, missing_columns
from hf_finetune.errors import DataError, Problem, RecipeError

Format = Literal["csv", "tsv", "jsonl", "json", "parquet", "lines"]
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
# Column of a plain line.
LINE = "text"
# Bytes that are read at once to count lines, and rows of a parquet file that are read at once.
CHUNK, PARQUET_ROWS = 1 << 20, 1024


@dataclass(frozen=True)
class Input:
    """A file or pipe of rows."""

    name: str  # a file, or `-`
    form: Format

    @property
    def place(self) -> str:
        """Its name in messages."""
        return "standard input" if self.name == STDIN else self.name

    @property
    def is_pipe(self) -> bool:
        """Standard input and named pipes can be read once only."""
        return self.name == STDIN or not Path(self.name).is_file()

    def identity(self) -> dict[str, Any]:
        """Hash the file, to recognise the same input again; nothing is known of a pipe."""
        if self.is_pipe:
            return {}
        try:
            with Path(self.name).open("rb") as stream:
                return {"sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
        except OSError as error:
            raise _unreadable(self.name, error) from error

    def recognised(self, needed: Sequence[str]) -> Input:
        """Take the format of standard input from its first line; nothing is consumed.

        JSON, or a header that names every needed column, is recognised; anything else is plain lines.
        """
        if self.name != STDIN or sys.stdin is None or sys.stdin.closed or not needed:
            return self
        peek = getattr(sys.stdin.buffer, "peek", None)
        # At least a byte is waited for, and all that the pipe holds by then is given.
        head = b"" if peek is None else peek(1)
        line = head.decode("utf-8-sig", errors="ignore").partition("\n")[0].rstrip("\r")
        if line.startswith("{"):
            with suppress(ValueError):  # text may begin with a brace, too
                json.loads(line)
                return replace(self, form="jsonl")
        if "\t" in line and set(needed) <= set(line.split("\t")):
            return replace(self, form="tsv")
        return replace(self, form="csv" if set(needed) <= set(next(csv.reader([line]), [])) else "lines")

    def count(self) -> int | None:
        """Count the rows, for a progress bar; None where that takes more than counting line ends."""
        if self.is_pipe:
            return None
        if self.form == "parquet":
            return int(self._parquet().metadata.num_rows)
        if self.form == "json":
            return None
        lines = 0
        with Path(self.name).open("rb") as stream:
            while chunk := stream.read(CHUNK):
                if self.form == "csv" and b'"' in chunk:  # a field may hold line ends
                    return None
                lines += chunk.count(b"\n")
        return max(lines - (self.form in ("csv", "tsv")), 0) or None

    def rows(self, needed: Sequence[str]) -> Iterator[Row]:
        """Yield every row; one that lacks a needed column has a fault.

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
                # A pipe can't be read again to find the line.
                raise DataError(
                    Problem(message, file=self.place) if self.is_pipe else readers.not_utf8(self.name)
                ) from None

    @contextmanager
    def _opened(self) -> Iterator[IO[str]]:
        newline = readers.newline(self.form)
        if self.name == STDIN:
            if sys.stdin is None or sys.stdin.closed:
                raise DataError(Problem("is closed; give --input FILE", file=self.place))
            # Another wrapper around the same bytes: `sys.stdin` has the locale's encoding, and translates line ends.
            stream = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8-sig", newline=newline)
            try:
                yield stream
            finally:
                stream.detach()  # else it would close standard input with itself
            return
        try:
            with Path(self.name).open(encoding="utf-8-sig", newline=newline) as stream:
                yield stream
        except OSError as error:
            raise _unreadable(self.name, error) from error

    def _parquet(self) -> Any:
        from hf_finetune.data import parquet

        return parquet.opened(self.name)

    def schema(self) -> Any:
        """Return the Arrow schema of a parquet file; None for any other."""
        return self._parquet().schema_arrow if self.form == "parquet" else None


def _unreadable(name: str, error: OSError) -> DataError:
    return DataError(Problem(f"can't be read: {error.strerror}", file=name))


def find(name: str, form: str | None) -> Input:
    """Make the input of a name.

    Args:
        name: A file, or `-` for standard input.
        form: Its format; None goes by the suffix, and takes standard input for plain lines.
    """
    if name == STDIN:
        found: Any = form or "lines"
        if found in ("parquet", "json"):
            raise RecipeError(f"{found} can't be read from a pipe; give --input FILE")
        return Input(name, found)
    file = Path(name)
    if not file.exists():
        raise DataError(Problem("does not exist", file=name))
    if file.is_dir():
        raise DataError(Problem("is a folder; give one file", file=name))
    chosen: Any = form or SUFFIXES.get(file.suffix.lower())
    if chosen is None:
        known = ", ".join(SUFFIXES)
        raise RecipeError(f"{name}: unknown suffix (known: {known}); give --input-format")
    return Input(name, chosen)
