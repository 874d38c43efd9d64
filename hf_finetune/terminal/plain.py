"""Plain lines: what people read where there is no terminal, or where they want it so."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import TextIO

from hf_finetune.terminal.message import LEVELS, Level, Message, Stream, printable
from hf_finetune.terminal.phase import Phase, clock
from hf_finetune.terminal.wrapping import width, wrapped

LONG_S = 5.0
"""Phases that take longer are told."""


def write(stream: Stream, text: str) -> None:
    """Write at once; where nobody reads any more (`| head`) or the disk is full, the run goes on in silence."""
    try:
        _write(stream, text)
    except UnicodeEncodeError:
        _write(stream, text.encode("ascii", "backslashreplace").decode())
    except (OSError, ValueError, AttributeError):  # closed while running, or from the start
        setattr(sys, stream, nowhere())  # for the rest of the process


def nowhere() -> TextIO:
    """A stream whose lines nobody sees."""
    return Path(os.devnull).open("w", encoding="utf-8")


def _write(stream: Stream, text: str) -> None:
    target = getattr(sys, stream)
    target.write(text)
    target.flush()


class Voice:
    """How things are said; this one says them in plain lines.

    Args:
        least: Messages below this level are not said, and phases neither, unless it is `info`.
    """

    def __init__(self, least: Level = "info") -> None:
        self.least = LEVELS.index(least)
        self.notice = ""
        """What a display shows below its phases."""
        self._timers: dict[Phase, threading.Timer] = {}

    def tell(self, message: Message) -> None:
        """Say something."""
        if message.is_asked_for or LEVELS.index(message.level) >= self.least:
            self.put(message)

    def put(self, message: Message) -> None:
        """Write a message that is to be said."""
        columns = width(getattr(sys, message.stream))
        write(message.stream, wrapped(message.as_line(), columns) + "\n")

    def show(self, document: str) -> None:
        """Print a document as it is."""
        write("stdout", document + "\n")

    def piece(self, text: str) -> None:
        """Write a part of something that is said bit by bit, and was asked for."""
        write("stdout", printable(text))

    def finish(self, message: Message) -> None:
        """It is said; the whole of it."""

    def begin(self, phase: Phase) -> None:
        """A phase begins; it is told once it turns out to be long."""
        if phase.is_told and self.least == 0:
            timer = self._timers[phase] = threading.Timer(LONG_S, self._tell_begin, (phase,))
            timer.daemon = True
            timer.start()

    def end(self, phase: Phase) -> None:
        """It is over."""
        timer = self._timers.pop(phase, None)
        if timer is not None:
            timer.cancel()
            if phase.seconds >= LONG_S:
                done = phase.share() if phase.total is None else f"{phase.total:,} {phase.unit}"
                self.tell(Message(" ".join(f"{phase.name}: {done} in {clock(phase.seconds)}".split())))

    def _tell_begin(self, phase: Phase) -> None:
        self.tell(Message(" ".join(f"{phase.name}: {phase.share()} ...".split())))

    def last_words(self, messages: list[Message]) -> None:
        """Say something right before the process ends by force: without Python's buffers and locks."""
        self.raw("".join(message.as_line() + "\n" for message in messages))

    def raw(self, text: str, descriptor: int = 2) -> None:
        """Write past everything that a hung thread may hold."""
        try:
            os.write(descriptor, text.encode("utf-8", "backslashreplace"))
        except OSError:
            return

    def close(self) -> None:
        """Leave the terminal as it was."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
