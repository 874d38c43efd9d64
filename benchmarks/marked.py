"""Parts of a document that a program writes, each between `<!-- NAME: ... -->` and `<!-- NAME: end -->`."""

from __future__ import annotations

import re
from pathlib import Path


def put(file: Path, name: str, text: str) -> None:
    """Replace what stands between the two marks, which stay.

    Args:
        file: Markdown.
        name: Of the marks.
        text: Markdown.

    Raises:
        SystemExit: The file lacks one of the marks.
    """
    whole = file.read_text(encoding="utf-8")
    marks = re.compile(rf"(<!-- {name}: (?!end )[^\n]*-->\n).*?(<!-- {name}: end -->)", re.DOTALL)
    if not marks.search(whole):
        raise SystemExit(f"{file} has no marks <!-- {name}: ... --> and <!-- {name}: end -->")
    file.write_text(marks.sub(lambda found: f"{found[1]}\n{text.strip()}\n\n{found[2]}", whole, count=1), "utf-8")
