"""Where a file is not UTF-8."""

from __future__ import annotations

from pathlib import Path

from hf_finetune.errors import Problem
from hf_finetune.schema import filehead


def not_text(file: str, *, whole: bool) -> Problem | None:
    """Where a file is not UTF-8, if it is not.

    Args:
        file: Its path.
        whole: Look at every line, not only at the first bytes.
    """
    offset = 0
    with Path(file).open("rb") as lines:
        head = filehead.undecodable(lines.read(filehead.HEAD), file)
        if head is not None or not whole:
            return head
        lines.seek(0)
        for number, line in enumerate(lines, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                message = f"is not UTF-8 at byte {offset + error.start}; save it as UTF-8"
                return Problem(message, file=file, line=number)
            offset += len(line)
    return None
