"""Labels that a reader takes for one and a program for several: they differ by case, spaces, or what can't be seen."""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence

_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?|[+-]?\.\d+", re.ASCII)


def _unformatted(text: str) -> str:
    """Without zero-width spaces and joiners, soft hyphens, byte order marks (category Cf), and variation selectors."""
    return "".join(char for char in text if unicodedata.category(char) != "Cf" and not "\ufe00" <= char <= "\ufe0f")


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _composed(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _number(text: str) -> str:
    """`7` for `07`, `+7` and `7.0`."""
    if not _NUMBER.fullmatch(text) or text in (".", "+", "-"):
        return text
    sign = "-" if text.startswith("-") else ""
    whole, _, fraction = text.lstrip("+-").partition(".")
    digits = (whole.lstrip("0") or "0") + (f".{fraction.rstrip('0')}" if fraction.rstrip("0") else "")
    return digits if digits == "0" else sign + digits


# What may differ -> a function that makes it alike, in the order in which they are applied.
_LEVELLERS: dict[str, Callable[[str], str]] = {
    "invisible characters": _unformatted,
    "Unicode form": _composed,
    "spaces": _spaced,
    "case": str.casefold,
    "the way a number is written": _number,
}


def level(text: str, without: str = "") -> str:
    """Return the part of a label that tells it from others.

    Args:
        text: The label.
        without: One of `_LEVELLERS`, to be left as it is.
    """
    for what, make_alike in _LEVELLERS.items():
        if what != without:
            text = make_alike(text)
    return text


def groups(counts: Mapping[str, int]) -> list[list[str]]:
    """Return labels that are alike, the commonest of each group first; labels that are like no other are left out.

    Args:
        counts: Rows of each label.
    """
    found: dict[str, list[str]] = {}
    for name in counts:
        found.setdefault(level(name), []).append(name)
    return [sorted(names, key=lambda name: (-counts[name], name)) for names in found.values() if len(names) > 1]


def difference(*alike: Sequence[str]) -> str:
    """Name the only thing that tells labels of each group apart, e.g. `case and spaces`."""
    pairs = [pair for names in alike for pair in itertools.combinations(names, 2)]
    found = [
        what
        for what in _LEVELLERS
        if any(level(one, without=what) != level(other, without=what) for one, other in pairs)
    ]
    # A no-break space is a space as well as a Unicode form: either leveller alone makes it alike.
    found = found or [
        what for what, alike in _LEVELLERS.items() if any(alike(one) == alike(other) for one, other in pairs)
    ]
    return " and ".join([", ".join(found[:-1]), found[-1]] if len(found) > 1 else found)


def like(text: str, names: Sequence[str]) -> str | None:
    """Return the known label that a text, which is none of them, is like."""
    return _levelled(tuple(names)).get(level(text))


@functools.lru_cache(maxsize=4)
def _levelled(names: tuple[str, ...]) -> dict[str, str]:
    # Of names that are alike, the first one is what a message shows.
    return {level(name): name for name in reversed(names)}


def shown(name: str) -> str:
    """A label in quotation marks, in which all can be seen: spaces at its ends, invisible characters, Unicode form."""
    return repr(name) if unicodedata.is_normalized("NFKC", name) and name.isprintable() else ascii(name)


def plain(name: str) -> str:
    """Return a label for a listing: as it is, or in quotation marks where a part of it would not be seen."""
    return name if name == name.strip() and name.isprintable() else shown(name)
