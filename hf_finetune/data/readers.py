"""Local data files: which ones a recipe means, and the rows of csv, tsv and JSON as they stand, one by one.

This is the reader of training, evaluation and prediction. Nothing is guessed. A cell of csv or tsv is text; a value of
JSON is what JSON says, and a number keeps its digits. Files are read piece by piece, and no library is needed.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import IO, Any, NamedTuple

from hf_finetune.config.suggestions import meant, nearest, suggestion
from hf_finetune.errors import DataError, MissingColumn, Problem

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")
MOST_FILES = 100  # files of a split that are looked at
HEAD = 1 << 16  # bytes of a file that the first look reads
CHUNK = 1 << 20  # characters of a JSON list that are read at once
TABLES = ("csv", "tsv")
COLUMNS = "is one object of lists, which is read as one row; write an object a row, as a list or one a line"
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"PK\x03\x04": "zip",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_SPACE = re.compile(r"[ \t\n\r]*")


def find(patterns: str | Sequence[str], folder: str | None, key: str) -> tuple[list[str], list[Problem]]:
    """The files that names and globs mean, in sorted order within each glob, and everything that is wrong with them.

    They are relative to `folder`, else to the working directory; `key` is the recipe's, for messages.
    """
    files: list[str] = []
    problems: list[Problem] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        for one in _match(os.path.expanduser(str(Path(folder or "", pattern))), folder, key):  # noqa: PTH111 (may hold any user)
            (problems if isinstance(one, Problem) else files).append(one)  # type: ignore[arg-type]
    for file in dict.fromkeys(file for file in files if files.count(file) > 1):
        problems.append(Problem("is matched twice; its rows would count twice", key=key, file=file))
    suffixes = sorted({Path(file).suffix.lower() for file in files})
    for file in files:
        suffix = Path(file).suffix
        if suffix.lower() in {".gz", ".bz2", ".xz", ".zst", ".zip", ".lz4"}:
            problems.append(Problem(f"is compressed ({suffix}); unpack it", key=key, file=file))
        elif suffix.lower() not in SUFFIXES:
            what = f"unknown format {suffix or '(no suffix)'!r}; known: {', '.join(SUFFIXES)}"
            problems.append(Problem(what, key=key, file=file))
    if len(suffixes) > 1 and set(suffixes) <= set(SUFFIXES):
        problems.append(Problem(f"mixes {' and '.join(suffixes)} files; one split needs one format", key=key))
    for file in files:
        if Path(file).stat().st_size == 0:
            split = key.rpartition(".")[2]
            problems.append(Problem(f"{split} split has 0 rows: the file is empty", key=key, file=file))
    return files, problems


def _match(pattern: str, folder: str | None, key: str) -> Iterator[str | Problem]:
    """Yield files, or what is wrong with a name; nothing is opened, for reading a pipe would wait for ever."""
    path = Path(pattern)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        mode = 0
    if stat.S_ISREG(mode):
        yield pattern
    elif stat.S_ISDIR(mode):
        yield Problem(f"is a folder; name its files, e.g. {path / '*.jsonl'}", key=key, file=pattern)
    elif mode:
        odd = "a pipe (FIFO)" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        yield Problem(f"is {odd}, not a regular file; write the data into a file", key=key, file=pattern)
    elif path.is_symlink():
        yield Problem(f"is a symbolic link to {path.readlink()}, which does not exist", key=key, file=pattern)
    else:
        matches = sorted(glob.glob(pattern, recursive=True)) if "\0" not in pattern else []  # noqa: PTH207
        files = [match for match in matches if not Path(match).is_dir()]
        for file in files:
            # Each name again, as it may be a pipe too; brackets in it are no pattern then.
            yield from _match(file, folder, key)
        if not files:
            try:
                beside = sorted(file.name for file in path.parent.iterdir() if file.suffix.lower() in SUFFIXES)
            except (OSError, ValueError):
                beside = []
            near = meant(path, SUFFIXES) or (suggestion(path.name, beside[:20]) if beside else "")
            # A name inside `data.source` is written without it.
            near = near.replace(f"{Path(folder).expanduser()}{os.sep}", "") if folder else near
            yield Problem(f"no file matches {pattern!r}{near}", key=key)


def problems(recipe: Any) -> list[Problem]:
    """Return the problems of the local files of a recipe, for a `DataError`; the beginning of each file is read.

    Of a recipe with mistakes only some fields may be there: others raise AttributeError, and are skipped. Data sets of
    the Hub are skipped too.
    """
    data = getattr(recipe, "data", None)
    try:
        columns = recipe.task.columns()
        optional = recipe.task.optional_columns()
    except (AttributeError, ValueError):
        # A field of the task is missing or malformed, which is a finding of its own.
        columns, optional = [], []
    needed = [column for column in columns if column not in optional]
    parts = getattr(data, "mix", None) or []
    blocks = [(f"data.mix.{index}", part, ["train"]) for index, part in enumerate(parts)]
    found: list[Problem] = []
    for prefix, block, splits in [*blocks, ("data", data, ["train", "validation", "test"])]:
        for split in splits:
            names, source = getattr(block, split, None), getattr(block, "source", "unreadable")
            if names is None or (source is not None and not Path(source).expanduser().is_dir()):
                continue
            files, wrong = find(names, source, f"{prefix}.{split}")
            found += wrong
            for file in [] if wrong else files[:MOST_FILES]:
                found += [replace(problem, key=f"{prefix}.{split}") for problem in look(file, needed)]
    return list(dict.fromkeys(found))


def look(file: str, needed: Sequence[str]) -> list[Problem]:
    """Return problems that the first `HEAD` bytes of a file show: compression, encoding, missing columns."""
    form = Path(file).suffix.lower().removeprefix(".")
    try:
        with Path(file).open("rb") as stream:
            head = stream.read(HEAD)
    except OSError as error:
        return [Problem(f"can't be read: {error.strerror}", file=file)]
    if form == "parquet":
        return [] if head.startswith(b"PAR1") else [Problem("is no parquet file", file=file)]
    if (broken := undecodable(head, file)) is not None:
        return [broken]
    text = head.decode("utf-8-sig", errors="ignore")
    whole = len(head) < HEAD
    if whole and not text.strip():
        return [Problem("has 0 rows: the file is empty", file=file)]
    try:
        found, _ = rows(io.StringIO(text, newline=newline(form)), form, file, needed)
        row = next(found, None)
    except DataError as error:
        # What is cut off in the middle of a row may be right.
        return list(error.problems) if whole or form in TABLES else []
    if row is None or row.fault or form in TABLES:
        return []
    return missing_columns(list(row.cells), needed, file)


class Row(NamedTuple):
    """One row."""

    number: int  # line of the file in which it begins, or its place in a list or table, from 1
    cells: Mapping[str, Any]  # by column; empty where the row can't be read
    fault: str = ""  # the reason why it can't be used; empty where it can


@contextmanager
def opened(file: str, form: str, needed: Sequence[str] = ()) -> Iterator[tuple[Iterator[Row], bool]]:
    """Open a file of csv, tsv, json or jsonl; see `rows`.

    Raises:
        DataError: Also while reading: the file is not UTF-8, or not what its format says, or its header lacks a column.
    """
    # What is compressed or UTF-16 shows in the first bytes, before any row is given away.
    with Path(file).open("rb") as raw:
        if (broken := undecodable(raw.read(HEAD), file)) is not None:
            raise DataError(broken)
    try:
        with Path(file).open(encoding="utf-8-sig", newline=newline(form)) as stream:
            yield rows(stream, form, file, needed)
    except UnicodeDecodeError:
        raise DataError(not_utf8(file)) from None


def newline(form: str) -> str:
    """Return the `newline` to open text with."""
    # csv and tsv see line ends inside fields; for the others CR LF ends a line, and a lone CR does not.
    return "" if form in TABLES else "\n"


def rows(stream: IO[str], form: str, place: str, needed: Sequence[str] = ()) -> tuple[Iterator[Row], bool]:
    """Return every row of csv, tsv, json or jsonl, and True if they are numbered by line; else they are counted.

    The stream is text, opened with `newline(form)`; of `json` it is read more than once. Of csv and tsv the header must
    name the needed columns.
    """
    if form in TABLES:
        return _table(stream, place, needed, tab=form == "tsv"), True
    if form == "jsonl":
        return _json_lines(stream), True
    # What is called .json is a list, objects that span lines, or JSON Lines: its beginning tells.
    text = _Text(stream, place)
    if text.peek() == "[":
        return _values(text), False
    stream.seek(0)
    first = next((line for line in stream if not line.isspace()), "")
    stream.seek(0)
    by_line = not _goes_on(first)
    return _no_columns(_json_lines(stream) if by_line else _values(_Text(stream, place)), place), by_line


class Number(float):
    """A number that is no integer, with its digits as they are written: 2.50 is not shown as 2.5."""

    __slots__ = ("text",)
    text: str

    def __new__(cls, text: str) -> Number:
        """Read a number of JSON."""
        number = super().__new__(cls, text)
        number.text = str(text)
        return number

    def __str__(self) -> str:
        return self.text


class _RepeatedKeyError(ValueError):
    """An object has a key twice; the message says so."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # `json` would keep the last of two equal keys, and say nothing.
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise _RepeatedKeyError(f"has the key {repeated!r} twice; the first would be lost")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=Number)
_LENIENT = json.JSONDecoder(parse_float=Number)  # takes repeated keys too


def written(value: Any) -> str:
    """Return a value as JSON text that `read` reads back exactly."""
    return value.text if isinstance(value, Number) else json.dumps(value, ensure_ascii=False)


def read(text: str) -> Any:
    """Return the value of JSON text."""
    return _LENIENT.decode(text)


def _json_lines(stream: IO[str]) -> Iterator[Row]:
    """Yield one object a line; blank lines are left out."""
    numbered = ((number, line) for number, line in enumerate(stream, 1) if not line.isspace())
    first = True
    for number, line in numbered:
        row = _decoded(number, line)
        if first and row.fault:
            # Of a file that is no JSON Lines at all, every line would be a fault of its own.
            following = next(numbered, None)
            if line.lstrip().startswith("["):
                yield Row(number, {}, "begins a JSON list; name the file .json, or write one object a line")
                return
            if _goes_on(line) and following and not following[1].startswith("{"):
                yield Row(number, {}, "begins an object that spans several lines; write each object on one line")
                return
            yield row
            if following is None:
                return
            row = _decoded(*following)
        first = False
        yield row


def _decoded(number: int, line: str) -> Row:
    try:
        value = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        return Row(number, {}, f"is no valid JSON at column {error.colno}: {error.msg}")
    except _RepeatedKeyError as error:
        return Row(number, {}, str(error))
    except RecursionError:
        return Row(number, {}, "is nested too deeply")
    except ValueError:  # Python reads no integer of more than 4300 digits
        return Row(number, {}, "holds a number of thousands of digits; write it as text")
    if not isinstance(value, dict):
        return Row(number, {}, "is no JSON object; every line must be one row in braces")
    return Row(number, value)


def _goes_on(line: str) -> bool:
    """Tell whether a line is the beginning of an object that later lines end."""
    text = line.strip()
    try:
        _LENIENT.raw_decode(text)
    except json.JSONDecodeError as error:
        return text.startswith("{") and error.pos >= len(text) - 1
    except (ValueError, RecursionError):
        return False
    return False


def _no_columns(rows: Iterator[Row], place: str) -> Iterator[Row]:
    """The rows of a file of JSON, which may turn out to be one table, column by column: `{"text": [...], ...}`."""
    first, second = next(rows, None), next(rows, None)
    if first is None:
        return
    cells = list(first.cells.values())
    # A chat is an object of lists too, but of turns.
    turns = any(isinstance(cell[0], dict) and "role" in cell[0] for cell in cells if isinstance(cell, list) and cell)
    if second is None and cells and not turns and all(isinstance(cell, list) for cell in cells):
        raise DataError(Problem(COLUMNS, file=place))
    yield first
    if second is not None:
        yield second
    yield from rows


def _values(text: _Text) -> Iterator[Row]:
    """Yield the objects of one list, or objects that span lines; numbered from 1."""

    def refused(what: str) -> DataError:
        return DataError(Problem(what, file=text.place, line=text.at_line))

    listed = text.peek() == "["
    if listed:
        text.at += 1
        if text.peek() == "]":
            raise DataError(Problem("has 0 rows: the list is empty", file=text.place))
    for number in count(1):
        value, fault = text.value(f" in row {number}")
        if not fault and not isinstance(value, dict):
            fault = "is no JSON object; write one object a row"
        yield Row(number, {} if fault else value, fault)
        mark = text.peek()
        if not listed:
            if not mark:
                return
            continue
        if mark not in (",", "]"):
            what = f"a comma or the end of the list is missing before {mark!r}" if mark else "the list is not closed"
            raise refused(f"is no valid JSON behind row {number}: {what}")
        text.at += 1
        more = text.peek()
        if mark == "]":
            if more:
                raise refused("goes on behind its list; write one list")
            return


class _Text:
    """JSON text that is read in pieces, and the place in it."""

    def __init__(self, stream: IO[str], place: str) -> None:
        self.stream, self.place = stream, place
        self.text, self.at = "", 0
        self.line = 1  # of the beginning of `text`

    @property
    def at_line(self) -> int:
        return self.line + self.text.count("\n", 0, self.at)

    def peek(self) -> str:
        """Go to the next character that is no white space, and return it; empty at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def value(self, where: str) -> tuple[Any, str]:
        """Return the value that begins here, and what is wrong with it.

        Raises:
            DataError: It is no JSON, so that its end is not known.
        """
        decoder, fault = _DECODER, ""
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                # So close to the end of the piece it may be no error once more is read: `-Infinity` has 9 characters.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - 16
                if cut and self._more():
                    continue
                line = self.line + self.text.count("\n", 0, error.pos)
                raise DataError(Problem(f"is no valid JSON{where}: {error.msg}", file=self.place, line=line)) from None
            except _RepeatedKeyError as error:
                decoder, fault = _LENIENT, str(error)
                continue
            except RecursionError:
                raise DataError(Problem(f"is nested too deeply{where}", file=self.place, line=self.at_line)) from None
            if end == len(self.text) and self._more():
                continue  # it may be a number that goes on
            self.at = end
            return value, fault

    def _more(self) -> bool:
        # At least as much as is kept, so that a long value is not tried too often.
        piece = self.stream.read(max(CHUNK, len(self.text) - self.at))
        if piece:
            self.line = self.at_line
            self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)


def _table(stream: IO[str], place: str, needed: Sequence[str], *, tab: bool) -> Iterator[Row]:
    """Yield every row below the header; blank lines are left out. In tsv a quotation mark is text."""
    csv.field_size_limit(1 << 30)  # the module's own limit is 128 KiB
    last = ""

    def lines() -> Iterator[str]:
        nonlocal last  # for messages: the module does not tell the line that it can't read
        for line in stream:
            last = line
            yield line

    # Without `strict`, the module repairs a stray quotation mark in silence, and so moves the end of a text.
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tab else {"strict": True}
    reader = csv.reader(lines(), **options)
    try:
        header = next((record for record in reader if any(cell.strip() for cell in record)), None)
    except csv.Error as error:
        raise DataError(Problem(_malformed(error, last, reader.line_num), file=place, line=1)) from None
    if header is None:
        raise DataError(Problem("has 0 rows: the file is empty", file=place))
    if problems := _header_problems(header, needed, place):
        raise DataError(problems)
    width, bare = len(header), [cell.strip().casefold() for cell in header]
    # Records longer than the header and some white space are not compared with it.
    long = sum(map(len, header)) + 100
    while True:
        before = reader.line_num
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(before + 1, {}, _malformed(error, last, reader.line_num - before))
            continue
        if not record:
            continue
        fault = ""
        if len(record) != width:
            fields = "1 field" if len(record) == 1 else f"{len(record)} fields"
            if len(record) > width:
                hint = "remove the extra tabs" if tab else "put texts with commas in quotes"
            else:
                spread = "" if tab or "\n" not in "".join(record) else " (is a quotation mark never closed?)"
                hint = f"fill in the missing ones{spread}"
            fault = f"has {fields}, the header {width}; {hint}"
        elif sum(map(len, record)) <= long and [cell.strip().casefold() for cell in record] == bare:
            fault = "repeats the header; remove the line"
        yield Row(before + 1, dict(zip(header, record, strict=False)), fault)


def _malformed(error: csv.Error, last: str, count: int) -> str:
    """Return the fault of quotation marks; `count` lines were read until it was noticed."""
    if "end of data" in str(error):
        rest = f"; the {count} lines from here to the end would be one text" if count > 1 else ""
        return f"opens a quotation mark that is never closed{rest}; close it"
    if "expected after" not in str(error):
        return f"is no csv: {error}"
    spread = f" (opened {count - 1} lines before; is one never closed?)" if count > 1 else ""
    if '\\"' in last:
        return r'escapes quotation marks as \", which csv does not know; double them ("")' + spread
    return 'has text behind a closing quotation mark; double each mark inside a quoted text ("")' + spread


def _header_problems(header: Sequence[str], columns: Sequence[str], file: str) -> list[Problem]:
    repeated = [name for name in dict.fromkeys(header) if header.count(name) > 1]
    found = [Problem(f"names column {name!r} twice in its header", file=file, line=1) for name in repeated]
    missing = missing_columns(header, columns, file)
    # Nobody has named columns to `init`.
    is_odd = missing or (not columns and re.fullmatch(r"[\w ]+(;[\w ]+)+", header[0]))
    if len(header) == 1 and header[0].count(";") >= max(1, len(columns) - 1) and is_odd:
        return [Problem("its fields are separated by semicolons; write it with commas", file=file, line=1)]
    # Texts and numbers where names should be.
    named = all(re.fullmatch(r"(?![\d.-]+$)[\w.-]{1,40}", name) for name in header)
    if missing and len(missing) == len(columns) and not named:
        shown = ", ".join(header)[:60]
        return [*found, Problem(f"has no header: its first line is {shown!r}; add one", file=file, line=1)]
    return found + missing


def missing_columns(have: Sequence[str], need: Sequence[str], file: str) -> list[Problem]:
    """Return one line for each column that is missing, with those that are there, and the nearest."""
    found = list[Problem]()
    for column in (column for column in need if column not in have):
        near = nearest(column, have)
        hint = "" if near is None else f"; did you mean {near!r}?"
        found.append(
            MissingColumn(f"has no column {column!r}; it has {', '.join(have)}{hint}", file=file, column=column)
        )
    return found


def undecodable(head: bytes, file: str) -> Problem | None:
    """Return the problem of a file that does not begin with UTF-8 text; None where it does."""
    for mark, name in _COMPRESSED.items():
        if head.startswith(mark):
            return Problem(f"is compressed ({name}); unpack it", file=file)
    # ASCII in UTF-16 has a NUL in each pair of bytes.
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or (head[:2].count(0) == 1 and head[2:4].count(0) == 1):
        return Problem("is UTF-16; save it as UTF-8", file=file, line=1)
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        # The last character may be cut in two.
        if error.start < len(head) - 3 or len(head) < HEAD:
            return not_utf8(file)
    return None


def not_utf8(file: str) -> Problem:
    """Return the problem of a file in which reading met bytes that are not UTF-8, with their place."""
    offset = 0
    with Path(file).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return Problem(f"is not UTF-8 at byte {offset + error.start}; save it as UTF-8", file=file, line=number)
            offset += len(line)
    return Problem("is not UTF-8; save it as UTF-8", file=file)
