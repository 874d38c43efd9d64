"""The handler for plain lines, where nobody looks at a terminal, or where lines are asked for."""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path
from typing import TextIO

from hf_finetune.terminal.message import Message, Stream, printable
from hf_finetune.terminal.phase import Phase, clock
from hf_finetune.terminal.wrapping import width, wrapped

LONG_S = 5.0
"""Phases that take longer are reported."""


def write(stream: Stream, text: str) -> None:
    """Write at once; where nobody reads any more (`| head`) or the disk is full, the run goes on in silence."""
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
        if phase.is_told and self.level <= logging.INFO:
            timer = threading.Timer(LONG_S, lambda: self._report(phase, f"{phase.share()} ..."))
            self._timers[phase] = timer
            timer.daemon = True
            timer.start()

    def end(self, phase: Phase) -> None:
        """Take a phase away."""
        timer = self._timers.pop(phase, None)
        if timer is not None:
            timer.cancel()
            if phase.seconds >= LONG_S:
                done = phase.share() if phase.total is None else f"{phase.total:,} {phase.unit}"
                self._report(phase, f"{done} in {clock(phase.seconds)}")

    def _report(self, phase: Phase, progress: str) -> None:
        self.put(Message(" ".join(f"{phase.name}: {progress}".split())))

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
