"""`--log-format json`: every line of stdout and stderr is one JSON object, whoever wrote it.

    {"time": "2026-01-31T12:00:00.000Z", "level": "info", "event": "train", "message": "step 10/...", "step": 10, ...}

What other libraries print through Python comes as event `output`, their warnings as `warning`, a crash as `crash` with
its traceback. What C libraries write to the file descriptors themselves can't be caught.
"""

from __future__ import annotations

import io
import sys
import traceback
import warnings
from typing import Any, TextIO

from hf_finetune.terminal.message import Level, Message, Stream
from hf_finetune.terminal.phase import Phase
from hf_finetune.terminal.plain import Voice, nowhere


class JsonLines(Voice):
    """Says everything as JSON; takes `sys.stdout`, `sys.stderr` and Python's warnings until it is closed."""

    def __init__(self, least: Level = "info") -> None:
        super().__init__(least)
        self._streams: dict[Stream, TextIO] = {"stdout": sys.stdout, "stderr": sys.stderr}
        self._show_warning = warnings.showwarning
        sys.stdout = _Others(self, "stdout")
        sys.stderr = _Others(self, "stderr")
        warnings.showwarning = self._warned  # type: ignore[assignment]

    def put(self, message: Message) -> None:
        """Write the object."""
        self._write(message.stream, message.as_json())

    def _write(self, stream: Stream, text: str) -> None:
        """Write at once; a stream that nobody reads any more is left alone."""
        try:
            self._streams[stream].write(text + "\n")
            self._streams[stream].flush()
        except (OSError, ValueError, AttributeError):
            self._streams[stream] = nowhere()

    def show(self, document: str) -> None:
        """Print a document as it is: it was asked for in its own format."""
        self._write("stdout", document)

    def piece(self, text: str) -> None:
        """Nothing: an object is written once it is whole."""

    def finish(self, message: Message) -> None:
        """Write the object."""
        self.tell(message)

    def begin(self, phase: Phase) -> None:
        """Tell that a phase begins."""
        self._tell_phase(phase, "begin", {})

    def end(self, phase: Phase) -> None:
        """Tell that it is over, and how long it took."""
        self._tell_phase(phase, "end", {"seconds": round(phase.seconds, 3)})

    def _tell_phase(self, phase: Phase, state: str, more: dict[str, Any]) -> None:
        counted = {"total": phase.total, "unit": phase.unit} if phase.total is not None else {}
        fields = {"phase": phase.name, "state": state, **counted, **more}
        self.tell(Message(f"{phase.name}: {state}", "phase", fields=fields))

    def last_words(self, messages: list[Message]) -> None:
        """Say something right before the process ends by force."""
        self.raw("".join(message.as_json() + "\n" for message in messages))

    def crash(self, error: BaseException) -> None:
        """A bug, with its traceback."""
        told = "".join(traceback.format_exception(error))
        text = traceback.format_exception_only(error)[-1].strip()
        self.tell(Message(text, "crash", "error", "stderr", {"code": 1, "traceback": told}))

    def close(self) -> None:
        """Give the streams back."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, _Others):
                stream.finish()
        for name, original in self._streams.items():
            if isinstance(getattr(sys, name), _Others):
                setattr(sys, name, original)
        warnings.showwarning = self._show_warning

    def _warned(self, message: Any, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
        fields = {"category": category.__name__, "file": filename, "line": lineno}
        self.tell(Message(str(message), "warning", "warning", "stderr", fields))


class _Others(io.TextIOBase):
    """Stands where `sys.stdout` was: each line that is printed becomes a message."""

    def __init__(self, voice: JsonLines, name: Stream) -> None:
        self._voice, self._name = voice, name
        self._begun = ""

    def write(self, text: str) -> int:
        """Keep text until its line is whole."""
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if line.strip():
                level: Level = "info" if self._name == "stdout" else "warning"
                self._voice.tell(Message(line, "output", level, self._name, {"stream": self._name}))
        return len(text)

    def finish(self) -> None:
        """Say what stands there without the end of its line."""
        if self._begun:
            self.write("\n")

    def fileno(self) -> int:
        """The descriptor below."""
        return self._voice._streams[self._name].fileno()

    def isatty(self) -> bool:
        """Never a terminal, whatever is below."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._voice._streams[self._name], name)
