"""Rows of data files, one by one, as they stand: the one reader of training, evaluation and prediction.

Nothing is guessed. A cell of csv or tsv is text; a value of JSON is what JSON says, and a number remembers its digits.
Files are read piece by piece, and no library is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from hf_finetune.rowfiles import jsonrows, tables
from hf_finetune.rowfiles.row import Row

__all__ = ["Row", "opened"]


@contextmanager
def opened(file: str, suffix: str, needed: Sequence[str]) -> Iterator[tuple[Iterator[Row], bool]]:
    """Open a file of csv, tsv, json or jsonl; gives its rows, and whether they are numbered by line.

    Args:
        file: Its path.
        suffix: Its format.
        needed: Columns that a header must name.

    Raises:
        DataError: While reading: the file as a whole is not what its suffix says, or its header lacks a column.
        UnicodeDecodeError: While reading: it is not UTF-8.
    """
    table = suffix in {".csv", ".tsv"}
    # Only csv and tsv see line ends inside fields; for the others `\r\n` ends a line, and a lone `\r` does not.
    with Path(file).open(encoding="utf-8-sig", newline="" if table else "\n") as stream:
        yield _rows(stream, file, suffix, needed)


def _rows(stream: IO[str], file: str, suffix: str, needed: Sequence[str]) -> tuple[Iterator[Row], bool]:
    if suffix == ".jsonl":
        return jsonrows.lines(stream), True
    if suffix == ".json":
        return jsonrows.whole(stream, file)
    return tables.rows(stream, file, needed, tab=suffix == ".tsv"), True
