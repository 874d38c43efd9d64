"""A real pseudo-terminal, and what would stand on its screen."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import termios
import threading
from types import TracebackType
from typing import TextIO

_PART = re.compile(r"\x1b\[(\d*)([A-Za-z])|\x1b\[\?\d+[hl]|([\r\n])|([^\x1b\r\n]+)")


class Terminal:
    """A pseudo-terminal of so many columns; a thread reads what is written to it."""

    def __init__(self, columns: int = 120) -> None:
        self.ours, self.theirs = pty.openpty()
        self.resize(columns)
        self.output = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def resize(self, columns: int) -> None:
        fcntl.ioctl(self.theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))

    def stream(self) -> TextIO:
        """A stdout that is this terminal."""
        return open(os.dup(self.theirs), "w", encoding="utf-8")  # noqa: PTH123

    def _read(self) -> None:
        while True:
            try:
                self.output += os.read(self.ours, 65536).decode("utf-8", "replace")
            except OSError:
                return

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self.theirs)
        self._reader.join(10)
        os.close(self.ours)

    def screen(self) -> list[str]:
        """The lines that are left in the end; they are longer than the terminal is wide where it would wrap them."""
        lines, row, column = [""], 0, 0
        for found in _PART.finditer(self.output):
            count, command, control, text = found.groups()
            if control == "\n":
                row += 1
                lines += [""] * (row + 1 - len(lines))
            elif control == "\r":
                column = 0
            elif command == "A":
                row = max(row - int(count or 1), 0)
            elif command == "K":
                lines[row] = ""
            elif text:
                lines[row] = lines[row][:column].ljust(column) + text + lines[row][column + len(text) :]
                column += len(text)
        return [line for line in lines if line.strip()]
