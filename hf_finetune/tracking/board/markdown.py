"""Markdown for the Text tab, in which nothing that comes from data is markup.

TensorBoard renders with Python-Markdown and keeps a few tags and no styles (`tensorboard.plugin_util`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from hf_finetune.pages.escaping import harmless

_MARKUP = re.compile(r"[^\w\s]|_", re.ASCII)


def cell(text: str) -> str:
    """A text of one line: punctuation as character references, which nothing reads as markup; line ends as `<br>`."""
    return "<br>".join(_plain(line) for line in text.split("\n"))


def _plain(line: str) -> str:
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};" if found[0].isascii() else found[0], harmless(line))


def block(text: str) -> str:
    """A text as it is, in a block; indented, because a fence could be closed from within."""
    return "\n".join(f"    {harmless(line)}" for line in text.split("\n"))


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; its cells are escaped."""
    lines = [head, ["---"] * len(head), *([cell(str(value)) for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
