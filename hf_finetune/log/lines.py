"""Messages, phases that take a while, and the handler that writes both as plain lines."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TextIO

Level = Literal["info", "warning", "error"]
Stream = Literal["stdout", "stderr"]

# Control characters but tab and line feed; and characters that break or reorder a line.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Message:
    """One message, however it will look."""

    text: str
    """For people; no prefix."""
    event: str = "note"
    """Its subject: note, warning, error, train, eval, final, test, summary, phase, ..."""
    level: Level = "info"
    stream: Stream = "stdout"
    fields: Mapping[str, Any] = field(default_factory=dict)
    """For machines: step, loss, ...; they never replace time, level, event and message."""
    line: str | None = None
    """Printed for people instead of the text, as it is."""
    is_asked_for: bool = False
    """The command was given to print this, so `--quiet` does not suppress it."""

    @classmethod
    def of_record(cls, record: logging.LogRecord) -> Message:
        """Unwrap the message of a log record, or make one of a plain record."""
        message = getattr(record, "structured", None)
        if isinstance(message, Message):
            return message
        level: Level = "error" if record.levelno >= logging.ERROR else "warning"
        if record.levelno < logging.WARNING:
            return cls(record.getMessage())
        return cls(record.getMessage(), level, level, "stderr")

    def as_line(self) -> str:
        """Format for people."""
        # stdout holds what was asked for, and needs no name of the program before it.
        prefix = f"hf_finetune: {self.level}: " if self.stream == "stderr" and self.level != "info" else ""
        return printable(prefix + self.text) if self.line is None else self.line

    def as_json(self) -> str:
        """Format as one JSON object in one line of ASCII."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        head = {"time": now, "level": self.level, "event": self.event, "message": self.text}
        rest = {name: jsonable(value) for name, value in self.fields.items() if name not in head}
        # `default`: a field that nobody thought of is better told as text than a reason to crash.
        return json.dumps(head | rest, allow_nan=False, default=str)


def printable(text: str) -> str:
    r"""Write control characters, which could steer the terminal, as what they are, e.g. `\x1b`."""
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)


def jsonable(value: Any) -> Any:
    """Turn NaN and infinity, which JSON can't hold, and keys into text, and tuples into lists."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): jsonable(item) for name, item in value.items()}
    return [jsonable(item) for item in value] if isinstance(value, list | tuple) else value


# By identity: two phases may have the same name, and they are keys of a dict.
@dataclass(eq=False)
class Phase:
    """Something that takes a while. The code that does it sets `done`, which costs nothing; the display looks."""

    name: str
    """E.g. `tokenising train`, `loading the model`, `training`."""
    total: int | None = None
    unit: str = ""
    """E.g. rows, batches, steps."""
    is_told: bool = True
    """Plain lines report it when it takes long."""
    done: int = 0
    count: Callable[[], int] | None = None
    """Counts the work of other processes, where `done` is not set."""
    first: int = 0
    """Done before it began, so that it says nothing about the speed."""
    detail: str = ""
    """The latest about it, in one line."""
    outcome: str = ""
    """The latest result on the way, in one line."""
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Time since it began."""
        return time.monotonic() - self.started

    def now(self) -> int:
        """Count the work that is done."""
        if self.count is not None:
            self.done = max(self.done, self.count())
        return self.done

    def left(self) -> float | None:
        """Estimate the seconds until it ends, at the speed until now; None where nothing tells."""
        done = self.now()
        if not self.total or done <= self.first:
            return None
        return self.seconds * max(self.total - done, 0) / (done - self.first)

    def share(self) -> str:
        """Format as `120/1,000 rows`, or as much of that as is known."""
        if self.total is None:
            return f"{self.now():,} {self.unit}" if self.unit and self.now() else ""
        return f"{self.now():,}/{self.total:,} {self.unit}".rstrip()


def clock(seconds: float) -> str:
    """Format `75` as `1:15`, `3675` as `1:01:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """Format `35.2` as `35 s`, and a minute or more like `clock`."""
    return f"{seconds:.0f} s" if seconds < 59.5 else clock(seconds)


LEAST = 20
"""Columns below which nothing is broken: no word would fit."""
# In backticks, or at the end of a line, alone or behind a colon: a command must stay in one piece to be copied.
_COMMAND = re.compile(r"`[^`\n]+`|(?:^|(?<=: ))(?:\S*/)?(?:hf-finetune|accelerate|torchrun|python[\d.]*) .+$")
# Before the text of an indented line stand spaces, and its name where it has a column of its own.
_HEAD = re.compile(r"(\s+)(?:\S+(?: \S+)*\s{2,})?")
_GAP, _SINGLE = re.compile(r"(?<=\S)( {2,})(?=\S)"), re.compile(r"(?<=\S) (?=\S)")
_SPACE = "\x1f"  # in the place of a space that must not be broken


def width(stream: Any) -> int | None:
    """Count the columns of the terminal behind a stream; None where there is none."""
    try:
        return os.get_terminal_size(stream.fileno()).columns if stream.isatty() else None
    except (OSError, ValueError, AttributeError):
        return None


def wrapped(text: str, columns: int | None) -> str:
    """Break long lines between words; commands and coloured lines stay whole."""
    if columns is None or columns < LEAST or len(text) <= columns:
        return text
    return "\n".join(_wrapped(line, columns) for line in text.split("\n"))


def _wrapped(line: str, columns: int) -> str:
    # Colours take no columns, so the length of a coloured line says nothing.
    if len(line) <= columns or "\x1b" in line:
        return line
    found = _HEAD.match(line)
    head, margin = (found.group(), found.group(1)) if found else ("", "")
    indent = " " * len(head if len(head) < columns // 2 else margin) if found else "  "
    body = _COMMAND.sub(lambda command: command.group().replace(" ", _SPACE), line[len(head) :])
    fields = _GAP.split(body)
    if len(fields) > 4:  # with the gaps between them: `loss 0.5  accuracy 0.9`, each of which stays whole
        body = "".join(_SINGLE.sub(_SPACE, field) if len(field) < columns // 2 else field for field in fields)
    pieces = textwrap.wrap(
        head + body, columns, subsequent_indent=indent, expand_tabs=False, replace_whitespace=False,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip
    return "\n".join(pieces).replace(_SPACE, " ")


LONG_S = 5.0
"""Phases that take longer are reported."""


def write(stream: Stream, text: str) -> None:
    """Write at once; where nobody reads any more (`| head`) or the disk is full, the run continues in silence."""
    try:
        target = getattr(sys, stream)
        try:
            target.write(text)
        except UnicodeEncodeError:
            target.write(text.encode("ascii", "backslashreplace").decode())
        target.flush()
    except (OSError, ValueError, AttributeError):  # closed while running, or from the start
        setattr(sys, stream, nowhere())  # for the rest of the process


def nowhere() -> TextIO:
    """Open a stream whose lines nobody sees."""
    return Path(os.devnull).open("w", encoding="utf-8")


class Lines(logging.Handler):
    """Writes plain lines. Phases are shown at level `info` only."""

    def __init__(self, level: int = logging.INFO) -> None:
        super().__init__(level)
        self.notice = ""
        """A line that a display shows below its phases."""
        self._timers: dict[Phase, threading.Timer] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Write a log record."""
        self.put(Message.of_record(record))

    def put(self, message: Message) -> None:
        """Write a message."""
        columns = width(getattr(sys, message.stream))
        write(message.stream, wrapped(message.as_line(), columns) + "\n")

    def show(self, document: str) -> None:
        """Print a document as it is."""
        write("stdout", document + "\n")

    def piece(self, text: str) -> None:
        """Write a part of an answer that is printed bit by bit."""
        write("stdout", printable(text))

    def finish(self, message: Message) -> None:
        """End what was printed bit by bit; people have read it."""

    def begin(self, phase: Phase) -> None:
        """Show a phase, here once it turns out to be long."""
        # A timer and not a look at the end: who waits wants to know what for.
        if phase.is_told and self.level <= logging.INFO:
            timer = threading.Timer(LONG_S, lambda: self._report(phase, f"{phase.share()} ..."))
            self._timers[phase] = timer
            timer.daemon = True  # a process that ends must not wait for it
            timer.start()

    def end(self, phase: Phase) -> None:
        """Take a phase away."""
        timer = self._timers.pop(phase, None)
        if timer is not None:
            timer.cancel()
            # Its beginning was reported then, so its end is, too.
            if phase.seconds >= LONG_S:
                done, took = phase.share() if phase.total is None else f"{phase.total:,} {phase.unit}", phase.seconds
                if done:
                    self._report(phase, f"{done} in {duration(took)}")
                else:
                    self.put(Message(f"{phase.name} took {duration(took)}"))

    def _report(self, phase: Phase, progress: str) -> None:
        colon = "" if progress.startswith(" ") else ":"
        self.put(Message(" ".join(f"{phase.name}{colon} {progress}".split())))

    def last_words(self, messages: list[Message]) -> None:
        """Say why the process ends by force, past every buffer and lock that a hung thread may hold."""
        self.raw("".join(message.as_line() + "\n" for message in messages))

    def raw(self, text: str, descriptor: int = 2) -> None:
        """Write to a descriptor."""
        try:
            os.write(descriptor, text.encode("utf-8", "backslashreplace"))
        except OSError:
            return

    def close(self) -> None:
        """Leave the terminal as it was."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        super().close()
