"""A message: a line for people, an object for machines."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from hf_finetune.errors import Problem

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
    def of_line(cls, line: str) -> Message:
        """Make a message of a line; `note: ` or `warning: ` at its beginning is its event."""
        kind, separator, text = line.partition(": ")
        if not separator or kind not in ("note", "warning"):
            return cls(line)
        return cls(text, event=kind, level="warning" if kind == "warning" else "info", line=printable(line))

    @classmethod
    def of_problem(cls, problem: Problem, code: int, rank: int) -> Message:
        """Make a message of an error that ends the process with this exit code."""
        text = str(problem) if rank == 0 else f"rank {rank}: {problem}"
        return cls(text, "error", "error", "stderr", fields={"code": code, "rank": rank, **asdict(problem)})

    @classmethod
    def of_record(cls, record: logging.LogRecord) -> Message:
        """Unwrap the message of a log record, or make one of a plain record."""
        said = getattr(record, "said", None)
        if isinstance(said, Message):
            return said
        level: Level = "error" if record.levelno >= logging.ERROR else "warning"
        if record.levelno < logging.WARNING:
            return cls(record.getMessage())
        return cls(record.getMessage(), level, level, "stderr")

    def as_line(self) -> str:
        """Format for people."""
        prefix = f"hf_finetune: {self.level}: " if self.stream == "stderr" and self.level != "info" else ""
        return printable(prefix + self.text) if self.line is None else self.line

    def as_json(self) -> str:
        """Format as one JSON object in one line of ASCII."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        head = {"time": now, "level": self.level, "event": self.event, "message": self.text}
        rest = {name: jsonable(value) for name, value in self.fields.items() if name not in head}
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
