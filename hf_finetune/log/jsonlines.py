"""`--log-format json`: every line of stdout and stderr is one JSON object, also the lines of other libraries.

    {"time": "2026-01-31T12:00:00.000Z", "level": "info", "event": "train", "message": "step 10/...", "step": 10, ...}

Lines that other libraries print through Python have the event `output`, their warnings `warning`, a crash `crash` with
its traceback. Only lines that C libraries write to the file descriptors themselves can't be caught.
"""

from __future__ import annotations

import io
import logging
import sys
import traceback
import warnings
from typing import Any, TextIO

from hf_finetune.log.lines import Level, Lines, Message, Phase, Stream, nowhere


class JsonLines(Lines):
    """Writes JSON; takes `sys.stdout`, `sys.stderr` and Python's warnings until it is closed."""

    def __init__(self, level: int = logging.INFO) -> None:
        super().__init__(level)
        self.streams: dict[Stream, TextIO] = {"stdout": sys.stdout, "stderr": sys.stderr}
        # Python writes warnings to stderr by a function of its own, in two lines each.
        self._show_warning = warnings.showwarning
        sys.stdout, sys.stderr = _Redirected(self, "stdout"), _Redirected(self, "stderr")
        warnings.showwarning = self._warned  # type: ignore[assignment]

    def put(self, message: Message) -> None:
        """Write the object."""
        self._write(message.stream, message.as_json())

    def _write(self, stream: Stream, text: str) -> None:
        try:
            self.streams[stream].write(text + "\n")
            self.streams[stream].flush()
        except (OSError, ValueError, AttributeError):  # nobody reads it any more
            self.streams[stream] = nowhere()

    def show(self, document: str) -> None:
        """Print a document as it is: it was asked for in its own format."""
        self._write("stdout", document)

    def piece(self, text: str) -> None:
        """Print nothing: an object is written once it is whole."""

    def finish(self, message: Message) -> None:
        """Write the whole that was printed bit by bit."""
        self.put(message)

    def begin(self, phase: Phase) -> None:
        """Report the beginning of a phase."""
        self._phase(phase, "begin")

    def end(self, phase: Phase) -> None:
        """Report the end of a phase, and how long it took."""
        self._phase(phase, "end", seconds=round(phase.seconds, 3))

    def _phase(self, phase: Phase, state: str, **more: Any) -> None:
        if self.level <= logging.INFO:
            counted = {"total": phase.total, "unit": phase.unit} if phase.total is not None else {}
            fields = {"phase": phase.name, "state": state, **counted, **more}
            self.put(Message(f"{phase.name}: {state}", "phase", fields=fields))

    def last_words(self, messages: list[Message]) -> None:
        """Say why the process ends by force."""
        self.raw("".join(message.as_json() + "\n" for message in messages))

    def crash(self, error: BaseException) -> None:
        """Report a bug, with its traceback."""
        fields = {"code": 1, "traceback": "".join(traceback.format_exception(error))}
        text = traceback.format_exception_only(error)[-1].strip()
        self.put(Message(text, "crash", "error", "stderr", fields))

    def close(self) -> None:
        """Give the streams back."""
        for name, original in self.streams.items():
            stream = getattr(sys, name)
            # Somebody may have put another stream there meanwhile, which stays.
            if isinstance(stream, _Redirected):
                stream.finish()
                setattr(sys, name, original)
        warnings.showwarning = self._show_warning
        super().close()

    def _warned(self, message: Any, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        fields = {"category": category.__name__, "file": filename, "line": lineno}
        self.of_others(Message(str(message), "warning", "warning", "stderr", fields))

    def of_others(self, message: Message) -> None:
        """Write a message of another library, if its level is high enough."""
        if logging.getLevelNamesMapping()[message.level.upper()] >= self.level:
            self.put(message)


class _Redirected(io.TextIOBase):
    """Stands in for `sys.stdout`: each line that is printed becomes a message."""

    def __init__(self, handler: JsonLines, name: Stream) -> None:
        self._handler, self._name = handler, name
        self._begun = ""

    def write(self, text: str) -> int:
        """Keep text until its line is whole."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                level: Level = "info" if self._name == "stdout" else "warning"
                self._handler.of_others(Message(line, "output", level, self._name, {"stream": self._name}))
        return len(text)

    def finish(self) -> None:
        """Write the rest, which does not end its line."""
        if self._begun:
            self.write("\n")

    def fileno(self) -> int:
        """Give the descriptor below."""
        return self._handler.streams[self._name].fileno()

    def isatty(self) -> bool:
        """Deny being a terminal, whatever is below."""
        # Else libraries would draw bars and colours.
        return False

    def __getattr__(self, name: str) -> Any:
        # `encoding`, `buffer`, and whatever else a library wants to know of a stream.
        return getattr(self._handler.streams[self._name], name)
