"""Fonts of this machine for characters that matplotlib's own lacks, such as Chinese, Japanese and Korean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING

from hf_finetune.terminal import warn

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

WIDE = ("notosanscjk", "sourcehansans", "wqy", "unifont", "unicode", "fallback", "noto")
"""Parts of file names of fonts with many scripts, which are tried first."""
TRIED = 2000
"""Font files that are looked into."""
SHOWN = 8
"""Characters that a warning names."""
_lacking: set[str] = set()
"""What was warned about."""


def complete(figure: Figure) -> set[str]:
    """Give texts of a figure fonts for all characters that any font here has.

    Returns:
        Characters that none has.
    """
    lacking: set[str] = set()
    for text in _texts(figure):
        families = tuple(text.get_fontfamily())
        missing = frozenset(char for char in text.get_text() if char.isprintable() and not char.isspace())
        missing -= _characters(families)
        if missing:
            found, left = _fonts(missing)
            text.set_fontfamily([*families, *found])
            lacking |= left
    return lacking


def say_lacking(characters: set[str]) -> None:
    """Warn, once a process, that pictures have boxes in place of characters."""
    if characters and not _lacking:
        shown = "".join(sorted(characters)[:SHOWN])
        warn(
            f"no font here has {shown!r}: pictures (PNG, TensorBoard) show boxes in their place, report.html is right; "
            "install a font that has them, e.g. the package fonts-noto-cjk"
        )
    _lacking.update(characters)


def _texts(figure: Figure) -> Iterator[Text]:
    """Every text of a figure; labels of ticks are made when they are asked for."""
    from matplotlib.text import Text

    for axes in figure.axes:
        yield from axes.get_xticklabels()
        yield from axes.get_yticklabels()
    yield from (text for text in figure.findobj(Text) if isinstance(text, Text))


@cache
def _characters(families: tuple[str, ...]) -> frozenset[str]:
    """What the fonts of these families have."""
    from matplotlib import font_manager

    return frozenset().union(
        *(_of_file(font_manager.findfont(font_manager.FontProperties(family=[family]))) for family in families)
    )


@cache
def _of_file(path: str) -> frozenset[str]:
    """The characters of a font file; none where it can't be drawn at every size, as emoji made of pictures."""
    from matplotlib import font_manager

    try:
        font = font_manager.get_font(path)
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@cache
def _fonts(missing: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Families that have these characters, as few as the order allows, and the characters that none has."""
    families: list[str] = []
    for path in _files():
        if missing & _of_file(path):
            families.append(_family(path))
            missing -= _of_file(path)
        if not missing:
            break
    return tuple(families), missing


def _files() -> Iterable[str]:
    """Font files of this machine, those of many scripts first."""
    from matplotlib import font_manager

    # matplotlib keeps its list on disk, and does not see what was installed since.
    known = {entry.fname for entry in font_manager.fontManager.ttflist} | set(font_manager.findSystemFonts())
    # Last Resort, which matplotlib 3.11 brings along, has a box for every character.
    return sorted((path for path in known if "LastResort" not in path), key=_rank)[:TRIED]


def _rank(path: str) -> tuple[int, bool, str]:
    name = path.replace("-", "").replace("_", "").lower()
    plain = not any(word in name for word in ("bold", "italic", "oblique", "light", "black", "serif"))
    return next((place for place, word in enumerate(WIDE) if word in name), len(WIDE)), not plain, path


def _family(path: str) -> str:
    """The name under which matplotlib finds a font file."""
    from matplotlib import font_manager

    manager = font_manager.fontManager
    if not any(entry.fname == path for entry in manager.ttflist):
        manager.addfont(path)
    return next(entry.name for entry in manager.ttflist if entry.fname == path)
