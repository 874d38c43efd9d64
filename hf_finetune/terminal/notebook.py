"""Progress below a notebook's cell: the bars of the live display, drawn again and again in one output of its own."""

from __future__ import annotations

import html
import importlib
import io
import threading
from typing import Any

from rich.console import Console, Group

from hf_finetune.terminal.live import PER_SECOND, drawn
from hf_finetune.terminal.phase import Phase
from hf_finetune.terminal.plain import Lines

WIDTH = 100


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
