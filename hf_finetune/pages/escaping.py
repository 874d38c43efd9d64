"""Texts from data, made harmless: what would move a cursor, hide, reorder or break a line is written as an escape."""

from __future__ import annotations

import unicodedata

JOINERS = "\u200c\u200d"
"""Invisible, but parts of emoji and of several scripts."""
UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Unicode categories: control, format (bidi controls among them), surrogate, private use, line and paragraph ends."""
SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def harmless(text: str) -> str:
    r"""The text in one line, every character that can't be seen as an escape: `\x1b`, `\u202e`, `\U000e0001`."""
    if text.isprintable():
        return text
    return "".join(_escaped(c) for c in text)


def exact(text: str) -> str:
    r"""Like `harmless`, with backslashes doubled: a line break and the two characters `\n` look different."""
    return harmless(text.replace("\\", "\\\\"))


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters, the last an ellipsis where something is left out."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _escaped(c: str) -> str:
    if unicodedata.category(c) not in UNSEEN or c in JOINERS:
        return c
    if c in SHORT:
        return SHORT[c]
    code = ord(c)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
