"""Live displays by rich: a bar for each phase, at the bottom of a terminal or below the cell of a notebook.

Lines scroll above the bars. The cursor is never hidden, so there is nothing to restore when the process is killed.
"""

from __future__ import annotations

import html
import importlib
import io
import logging
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, TextIO

from rich import live
from rich.console import Console, Group
from rich.file_proxy import FileProxy
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hf_finetune.log.lines import Lines, Message, Phase, clock, printable, wrapped

PER_SECOND = 4
STYLES = {"info": "", "warning": "yellow", "error": "red"}
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Display(Lines):
    """Plain lines, and below them a bar for each phase that is running."""

    def __init__(self, level: int = logging.INFO) -> None:
        super().__init__(level)
        self._lock = threading.RLock()
        self._phases: list[Phase] = []
        self._live: live.Live | None = None
        self._screen: _Screen | None = None
        self._height = 1
        self._has_stderr = sys.stderr is not None and sys.stderr.isatty()

    def put(self, message: Message) -> None:
        """Write a line above the display."""
        with self._lock:
            # rich draws on stdout; a stderr that goes elsewhere gets plain lines.
            if self._live is None or (message.stream == "stderr" and not self._has_stderr):
                super().put(message)
            else:
                console = self._live.console
                text = Text(wrapped(message.as_line(), console.width), style=STYLES[message.level])
                console.print(text, soft_wrap=True)

    def begin(self, phase: Phase) -> None:
        """Show a phase."""
        with self._lock:
            self._phases.append(phase)
            if self._live is not None:
                self._live.refresh()  # at once: what it does next may leave the thread that paints no time
                return
            self._screen = _Screen(sys.stdout)
            # The terminal is asked for its size. An exported COLUMNS stays as it was when the window is made narrower.
            variables = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
            file: Any = self._screen
            console = _Console(file=file, force_terminal=True, highlight=False, emoji=False, _environ=variables)
            self._live = live.Live(
                console=console,
                refresh_per_second=PER_SECOND,
                transient=True,
                redirect_stderr=self._has_stderr,
                get_renderable=self._draw,
            )
            self._live.start(refresh=True)

    def end(self, phase: Phase) -> None:
        """Take it away; without any, the terminal is as it was."""
        with self._lock:
            if phase in self._phases:
                if self._live is not None and len(self._phases) == 1:
                    self._stop()
                self._phases.remove(phase)

    def close(self) -> None:
        """Take everything away."""
        with self._lock:
            self._stop()
            self._phases.clear()
        super().close()

    def last_words(self, messages: list[Message]) -> None:
        """Draw no more, clear the picture as well as can be without a lock, and print the reasons."""
        if self._screen is not None and self._live is not None:
            self._screen.is_closed = True
            self.raw("\r\x1b[2K" + "\x1b[1A\x1b[2K" * (self._height - 1), descriptor=1)
        super().last_words(messages)

    def _stop(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _draw(self) -> Group:
        parts = drawn(tuple(self._phases), self.notice)
        self._height = max(len(parts), 1)
        return Group(*parts)


def drawn(phases: Sequence[Phase], notice: str) -> list[Any]:
    """Draw for each phase a bar and how far it is, its details, its latest result."""
    parts: list[Any] = []
    for phase in phases:
        parts.append(_bar(phase))
        # Clipped, not wrapped: a terminal that is made narrower must not break what is drawn.
        lines = (phase.detail, phase.outcome)
        parts += [Text(f"  {printable(line)}", no_wrap=True, overflow="ellipsis") for line in lines if line]
    if notice and parts:
        parts.append(Text(f"  {notice}", no_wrap=True, overflow="ellipsis", style=STYLES["warning"]))
    return parts


def _bar(phase: Phase) -> Table:
    row = Table.grid(padding=(0, 1))
    row.add_column(no_wrap=True)
    row.add_column(no_wrap=True)
    row.add_column(no_wrap=True, overflow="ellipsis")
    left = phase.left()
    parts = [phase.share(), f"{clock(phase.seconds)} elapsed", "" if left is None else f"{clock(left)} left"]
    mark: Any = Text(_SPINNER[int(phase.seconds * PER_SECOND) % len(_SPINNER)])
    if phase.total:
        mark = ProgressBar(total=phase.total, completed=phase.now(), width=24)
    row.add_row(Text(printable(phase.name)), mark, Text("  ".join(part for part in parts if part)))
    return row


class _Console(Console):
    """A console that leaves the cursor visible."""

    def show_cursor(self, show: bool = True) -> bool:
        """Do nothing."""
        return False


class _Screen(io.TextIOBase):
    """The terminal, which may go away while the run continues."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.is_closed = False

    def write(self, text: str) -> int:
        """Write, unless it is gone."""
        if not self.is_closed:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                self._stream.write(text.encode("ascii", "replace").decode())
            except (OSError, ValueError):
                self.is_closed = True
        return len(text)

    def flush(self) -> None:
        """Flush, unless it is gone."""
        if not self.is_closed:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self.is_closed = True

    def fileno(self) -> int:
        """Give the descriptor below, which knows the terminal's width."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Claim to be a terminal."""
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Name the terminal's encoding."""
        return self._stream.encoding


def _in_child() -> None:
    """Give a forked process the plain streams: a thread of the parent may hold the display's locks for ever."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, FileProxy):
            setattr(sys, name, stream.rich_proxied_file)


os.register_at_fork(after_in_child=_in_child)


WIDTH = 100  # columns; a notebook does not tell how wide a cell is


class NotebookDisplay(Lines):
    """Plain lines in the cell's output, and one output for the phases, updated by a thread; needs no ipywidgets."""

    def __init__(self) -> None:
        super().__init__()
        self._phases: list[Phase] = []
        self._output: Any = None
        self._shown = ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._paint, daemon=True, name="notebook")

    def begin(self, phase: Phase) -> None:
        """Show a phase."""
        self._phases.append(phase)
        if self._output is None:
            display: Any = importlib.import_module("IPython.display").display
            # Made in the thread that runs the cell: a display belongs to the cell that it was made in.
            self._output = display({"text/plain": ""}, raw=True, display_id=True)
            self._thread.start()
        self._draw()

    def end(self, phase: Phase) -> None:
        """Take it away."""
        if phase in self._phases:
            self._phases.remove(phase)
        self._draw()

    def close(self) -> None:
        """Leave nothing but the lines."""
        self._stop.set()
        self._phases.clear()
        self._draw()
        super().close()

    def _paint(self) -> None:
        while not self._stop.wait(1 / PER_SECOND):
            self._draw()

    def _draw(self) -> None:
        if self._output is None:
            return
        stream = io.StringIO()
        console = Console(file=stream, width=WIDTH, force_jupyter=False, force_terminal=False)
        console.print(Group(*drawn(tuple(self._phases), self.notice)))
        text = stream.getvalue().rstrip()
        if text != self._shown:
            self._shown = text
            self._output.update({"text/plain": text, "text/html": f"<pre>{html.escape(text)}</pre>"}, raw=True)
