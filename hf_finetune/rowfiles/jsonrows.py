"""Reads JSON Lines, and files of one JSON list, row by row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from typing import IO, Any

from hf_finetune.errors import DataError, Problem
from hf_finetune.rowfiles.row import Row
from hf_finetune.schema import filehead

CHUNK = 1 << 20
"""Characters of a list that are read at once."""
LOOK = 1000
"""Lines in which the end of an object that spans several is looked for."""
NEAR = 16
"""An error so close to the end of what was read may be no error once more is read: `-Infinity` has 9 characters."""
_SPACE = re.compile(r"[ \t\n\r]*")
_NO_OBJECT = "is no JSON object; every line must be one row in braces"


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
    """An object has a key twice."""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys are all different."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(next(name for name in names if names.count(name) > 1))
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_float=Number)
_LENIENT = json.JSONDecoder(parse_float=Number)
"""Takes repeated keys too."""


def written(value: Any) -> str:
    """A value as JSON text that `read` reads back exactly."""
    return value.text if isinstance(value, Number) else json.dumps(value, ensure_ascii=False)


def read(text: str) -> Any:
    """The value of JSON text."""
    return _LENIENT.decode(text)


def lines(stream: IO[str]) -> Iterator[Row]:
    """JSON Lines: one object a line; blank lines are left out."""
    yield from _lines(enumerate(stream, 1), first=True)


def whole(stream: IO[str], place: str) -> tuple[Iterator[Row], bool]:
    """One list of objects; or one object, or JSON Lines. Also whether rows are numbered by line.

    Args:
        stream: One that can be read anew from its beginning.
        place: What messages call it.
    """
    text = _Text(stream, place)
    start = text.peek()
    if start == "[":
        return _listed(text), False
    line = text.line
    stream.seek(0)
    if start == "{" and not _decodes(next(islice(stream, line - 1, None), "")):
        # The first object spans lines, so that it should be the only one.
        stream.seek(0)
        return _alone(_Text(stream, place)), False
    stream.seek(0)
    return _flat(stream, place), True


def _lines(numbered: Iterator[tuple[int, str]], *, first: bool) -> Iterator[Row]:
    for number, line in numbered:
        if line.isspace():
            continue
        row = _row(number, line)
        if first and row.fault:
            ahead = list(islice(numbered, LOOK))
            spread = _spread(line, (more for _, more in ahead))
            if spread:
                yield Row(number, {}, spread)
                return
            yield row
            yield from _lines(chain(ahead, numbered), first=False)
            return
        first = False
        yield row


def _row(number: int, line: str) -> Row:
    try:
        value = _DECODER.decode(line)
    except json.JSONDecodeError as error:
        return Row(number, {}, f"is no valid JSON at column {error.colno}: {error.msg}")
    except _RepeatedKeyError as error:
        return Row(number, {}, _repeated(error))
    except RecursionError:
        return Row(number, {}, "is nested too deeply")
    except ValueError:  # Python reads no integer of more than 4300 digits
        return Row(number, {}, "holds a number of thousands of digits; write it as text")
    return Row(number, value) if isinstance(value, dict) else Row(number, {}, _NO_OBJECT)


def _repeated(error: _RepeatedKeyError) -> str:
    return f"has the key {str(error)!r} twice; the first would be lost"


def _spread(line: str, more: Iterator[str]) -> str:
    """What to say where the first line is the beginning of an object or list that spans several; else nothing."""
    text, start = line.lstrip(), line.lstrip()[:1]
    if start not in ("{", "["):
        return ""
    text += "".join(more)
    try:
        _, end = _LENIENT.raw_decode(text)
    except (ValueError, RecursionError):
        is_list = start == "[" and text[1:].lstrip()[:1] == "{" and line.rstrip()[-1:] in "[,"
        return "begins a JSON list; name the file .json, or write one object a line" if is_list else ""
    count = text.count("\n", 0, end) + 1
    if start == "[":
        return "begins a JSON list; name the file .json, or write one object a line"
    return f"begins an object that spans {count} lines; write each object on one line" if count > 1 else ""


def _decodes(line: str) -> bool:
    """Whether a line is JSON by itself, or at least not the beginning of something longer."""
    try:
        _LENIENT.raw_decode(line.strip())
    except json.JSONDecodeError as error:
        return error.pos < len(line.strip()) - 1
    except (ValueError, RecursionError):
        return True
    return True


def _flat(stream: IO[str], place: str) -> Iterator[Row]:
    """JSON Lines under the suffix .json; a single object may hold columns instead of a row."""
    only, seen = None, 0
    for row in lines(stream):
        seen += 1
        if seen == 1:
            only = row
            continue
        if only is not None:
            yield only
            only = None
        yield row
    if only is not None:
        if filehead.is_columns(only.cells):
            raise DataError(Problem(filehead.COLUMNS, file=place))
        if only.fault == _NO_OBJECT:
            raise DataError(Problem("is no list of objects; write one object a row", file=place))
        yield only


def _alone(text: _Text) -> Iterator[Row]:
    """One object over several lines."""
    text.peek()
    value, fault = text.value("")
    if text.peek():
        what = "holds several objects that span lines; write each on one line, or all as one list"
        raise DataError(Problem(what, file=text.place, line=text.at_line))
    if filehead.is_columns(value):
        raise DataError(Problem(filehead.COLUMNS, file=text.place))
    yield Row(1, {} if fault else value, fault)


def _listed(text: _Text) -> Iterator[Row]:
    """The objects of one list, numbered from 1."""
    text.skip()
    number = 0
    if text.peek() == "]":
        raise DataError(Problem("has 0 rows: the list is empty", file=text.place))
    while True:
        number += 1
        text.peek()
        value, fault = text.value(f" in row {number}")
        if not fault and not isinstance(value, dict):
            fault = "is no JSON object; write one object a row"
        yield Row(number, {} if fault else value, fault)
        mark = text.peek()
        if mark not in (",", "]"):
            what = (
                "the list is not closed" if not mark else f"a comma or the end of the list is missing before {mark!r}"
            )
            raise DataError(
                Problem(f"is no valid JSON behind row {number}: {what}", file=text.place, line=text.at_line)
            )
        text.skip()
        if mark == "]":
            break
    if text.peek():
        raise DataError(Problem("goes on behind its list; write one list", file=text.place, line=text.at_line))


class _Text:
    """JSON text that is read in pieces, and where in it one is."""

    def __init__(self, stream: IO[str], place: str) -> None:
        self.stream, self.place = stream, place
        self.text, self.at = "", 0
        self.line = 1
        """Of the beginning of `text`."""

    @property
    def at_line(self) -> int:
        """Where one is."""
        return self.line + self.text.count("\n", 0, self.at)

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def skip(self) -> None:
        """Go one character on."""
        self.at += 1

    def value(self, where: str) -> tuple[Any, str]:
        """The value that begins here, and what is wrong with it.

        Raises:
            DataError: It is no JSON, so that its end is not known.
        """
        decoder, fault = _DECODER, ""
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - NEAR
                if cut and self._more():
                    continue
                line = self.line + self.text.count("\n", 0, error.pos)
                raise DataError(Problem(f"is no valid JSON{where}: {error.msg}", file=self.place, line=line)) from None
            except _RepeatedKeyError as error:
                decoder, fault = _LENIENT, _repeated(error)
                continue
            except RecursionError:
                raise DataError(Problem(f"is nested too deeply{where}", file=self.place, line=self.at_line)) from None
            if end == len(self.text) and self._more():
                continue  # it may be a number that goes on
            self.at = end
            return value, fault

    def _more(self) -> bool:
        """Read on, at least as much as is kept, so that a long value is not tried too often."""
        piece = self.stream.read(max(CHUNK, len(self.text) - self.at))
        if piece:
            self.line = self.at_line
            self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)
