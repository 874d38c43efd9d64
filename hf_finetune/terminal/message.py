"""One thing that is said: a line for people, an object for machines."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from hf_finetune.errors import Problem

Level = Literal["info", "warning", "error"]
Stream = Literal["stdout", "stderr"]

LEVELS: tuple[Level, ...] = ("info", "warning", "error")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""All but tab and line feed; and what breaks or reorders a line."""
_PREFIX = re.compile(r"(note|warning): (.*)", re.DOTALL)


@dataclass(frozen=True)
class Message:
    """What is said, once, whatever it will look like."""

    text: str
    """For people; no prefix."""
    event: str = "note"
    """What it is about: note, warning, error, train, eval, final, test, summary, phase, ..."""
    level: Level = "info"
    stream: Stream = "stdout"
    fields: Mapping[str, Any] = field(default_factory=dict)
    """For machines: step, loss, ...; they never replace time, level, event and message."""
    line: str | None = None
    """What people read instead of the text, as it is; None reads `text`, with who says it where that is a fault."""
    is_asked_for: bool = False
    """Whether the command was given to see this, so that `--quiet` does not take it away."""

    @classmethod
    def of_line(cls, line: str) -> Message:
        """A line of stdout; `note: ` and `warning: ` at its beginning say what it is."""
        found = _PREFIX.fullmatch(line)
        if found is None:
            return cls(line)
        kind, text = found.groups()
        return cls(text, event=kind, level="warning" if kind == "warning" else "info", line=printable(line))

    @classmethod
    def of_problem(cls, problem: Problem, code: int, rank: int) -> Message:
        """An error that ends the process with this exit code; ranks other than 0 say who they are."""
        text = str(problem) if rank == 0 else f"rank {rank}: {problem}"
        return cls(text, "error", "error", "stderr", fields={"code": code, "rank": rank, **asdict(problem)})

    def as_line(self) -> str:
        """For people; control characters, which could steer the terminal, are shown as what they are."""
        prefix = f"hf_finetune: {self.level}: " if self.stream == "stderr" and self.level != "info" else ""
        return printable(prefix + self.text) if self.line is None else self.line

    def as_json(self) -> str:
        """One JSON object in one line of ASCII; NaN and infinity, which JSON can't hold, are written as text."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        head = {"time": now, "level": self.level, "event": self.event, "message": self.text}
        rest = {name: jsonable(value) for name, value in self.fields.items() if name not in head}
        return json.dumps(head | rest, allow_nan=False, default=str)


def printable(text: str) -> str:
    r"""The text with control characters (escape sequences begin with one) written out, e.g. as `\x1b`."""
    return _CONTROL.sub(lambda found: ascii(found.group())[1:-1], text)


def jsonable(value: Any) -> Any:
    """The value with NaN and infinity as text, tuples as lists and keys as text: what strict JSON holds."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): jsonable(item) for name, item in value.items()}
    return [jsonable(item) for item in value] if isinstance(value, list | tuple) else value
