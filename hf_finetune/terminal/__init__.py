"""What a run says: in plain lines, as JSON lines, or with a live display below them.

    terminal.open_for(Manner(...))       by the command line; everybody else just speaks
    say("..."), warn("..."), tell(Message(...))
    with phase("tokenising train", total=rows, unit="rows") as it:
        it.done = ...

Without `open_for`, as where the package is imported, lines are plain. Rank 0 alone speaks; others have errors only.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from hf_finetune.errors import Problem
from hf_finetune.terminal.jsonlines import JsonLines
from hf_finetune.terminal.message import Level, Message
from hf_finetune.terminal.phase import Phase, Phases, clock, unseen
from hf_finetune.terminal.plain import Voice

__all__ = [
    "Manner", "Message", "Phase", "Phases", "begin", "clock", "close", "crash", "end", "finish", "last_words",
    "notice", "open_for", "phase", "rank", "report", "say", "show", "tell", "unseen", "warn", "write",
]  # fmt: skip

_voice = Voice()


@dataclass(frozen=True)
class Manner:
    """How the command line wants a run to speak."""

    log_format: Literal["text", "json"] = "text"
    quiet: bool = False
    """Warnings, errors, and what the command was given to see; nothing else."""


def open_for(manner: Manner) -> None:
    """Speak like this until `close`."""
    global _voice  # a process has one terminal
    least: Level = "error" if rank() else "warning" if manner.quiet else "info"
    if manner.log_format == "json":
        _voice = JsonLines(least)
    elif least == "info" and _is_live():
        from hf_finetune.terminal.live import Display

        _voice = Display()
    else:
        _voice = Voice(least)


def close() -> None:
    """Leave the terminal as it was, and speak in plain lines."""
    global _voice
    voice, _voice = _voice, Voice()
    voice.close()


def _is_live() -> bool:
    """Whether somebody looks at stdout who can see a line change."""
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        return False
    able = os.environ.get("TERM", "dumb") not in ("dumb", "unknown", "")
    return able and sys.stdout is not None and not sys.stdout.closed and sys.stdout.isatty()


def tell(message: Message) -> None:
    """Say something."""
    _voice.tell(message)


def say(line: str) -> None:
    """Say one line; `note: ` and `warning: ` at its beginning say what it is."""
    tell(Message.of_line(line))


def show(document: str) -> None:
    """Print what a command was given to print, as it is, in every manner."""
    _voice.show(document)


def write(piece: str) -> None:
    """Write a part of something that is said bit by bit, such as an answer; `finish` follows."""
    _voice.piece(piece)


def finish(message: Message) -> None:
    """What was written bit by bit is complete: machines get it in one message."""
    _voice.finish(message)


def warn(text: str) -> None:
    """Say on stderr that something is wrong that stops nothing."""
    tell(Message(text, "warning", "warning", "stderr"))


def report(problems: Iterable[Problem], code: int) -> None:
    """Say why this process ends with an exit code."""
    for problem in problems:
        tell(Message.of_problem(problem, code, rank()))


def crash(error: BaseException) -> bool:
    """Say what bug ends this process; False where Python's own traceback does."""
    if not isinstance(_voice, JsonLines):
        return False
    _voice.crash(error)
    return True


def last_words(lines: Iterable[str], code: int) -> None:
    """Say why this process ends by force; waits for no lock and no buffer that a hung thread may hold.

    Args:
        lines: One a problem.
        code: The exit code.
    """
    fields = {"code": code, "rank": rank()}
    _voice.last_words([Message(line, "error", "error", "stderr", fields) for line in lines])


def notice(text: str) -> None:
    """Show a line below the phases from now on, where somebody looks; safe in a handler of signals."""
    _voice.notice = text


def begin(phase: Phase) -> Phase:
    """Show a phase until `end`."""
    _voice.begin(phase)
    return phase


def end(phase: Phase) -> None:
    """The phase is over; later calls do nothing."""
    _voice.end(phase)


@contextmanager
def phase(name: str, total: int | None = None, unit: str = "", *, is_told: bool = True) -> Iterator[Phase]:
    """Show a phase while the body runs.

    Args:
        name: What goes on.
        total: How much there is to do, where that is known.
        unit: What is counted.
        is_told: Whether plain lines tell of it when it takes long.
    """
    shown = begin(Phase(name, total, unit, is_told))
    try:
        yield shown
    finally:
        end(shown)


def rank() -> int:
    """Of this process, as its launcher says."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdecimal() else 0
