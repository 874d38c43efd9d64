"""Draw figures in the colours of the pages, as PNG and as inline SVG, without pyplot and without state.

The same numbers give the same bytes on every machine. Figures use the colours of a light page; the SVG has the page's
CSS variables in their place, so that dark and light pages show the same drawing.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, wraps
from math import ceil, sqrt
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from hf_finetune.log import warn
from hf_finetune.log.text import harmless, shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

# Colour on a light page -> the page's variable.
INKS = {
    "#1b1f24": "text", "#59616b": "soft", "#d8dce2": "line", "#b9184f": "limit", "#fffffe": "hatch",
    "#2f6fd0": "s0", "#e08a2e": "s1", "#2b9a72": "s2", "#8458c7": "s3", "#c2487d": "s4", "#7d6a14": "s5",
}  # fmt: skip
TEXT, SOFT, LINE, LIMIT, HATCH, *SERIES = INKS
# Tells lines apart without colour, in the order of `SERIES`.
DASHES: tuple[Any, ...] = (
    "-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (6, 1.5, 1.5, 1.5)), (0, (8, 3)), (0, (3, 1, 1, 1, 1, 1)),
)  # fmt: skip
# Inches of a chart, and dots an inch of a PNG: it is some 900 wide.
WIDTH, DPI = 4.8, 188
# Inches and dots an inch of a PNG on a card of TensorBoard, which is 350 dots wide there: scaled ones lose every second
# line of a letter, because TensorBoard leaves pixels out instead of mixing them.
CARD_WIDTH, CARD_DPI = 3.5, 100
# Characters of a label beside an axis.
NAME_CHARACTERS = 18
# Parts of file names of fonts with many scripts, which are tried first: a machine may have thousands, and each is read.
WIDE_FONTS = ("notosanscjk", "sourcehansans", "wqy", "unifont", "unicode", "fallback", "noto")
FONTS_TRIED = 2000
_lacking: set[str] = set()
"""Characters that a warning has named."""


@dataclass(frozen=True)
class Chart:
    """One chart: TensorBoard, the report and the model card draw the same."""

    name: str
    """In the tag, and in the name of the file."""
    title: str
    about: str
    """For people who do not see it."""
    draw: Callable[[], Figure]
    section: str = "predictions"
    """Section of the report."""
    on_card: bool = False
    on_board: bool = True
    """False where TensorBoard has an interactive chart of the same numbers."""


@contextmanager
def settings(salt: str = "chart") -> Iterator[None]:
    """Set matplotlib up while a chart is drawn."""
    import matplotlib

    chosen: Any = {
        "axes.labelsize": 8,
        "axes.titlesize": 8.5,
        "font.family": "DejaVu Sans",
        "font.size": 8,
        "hatch.linewidth": 0.5,
        "legend.fontsize": 7.5,
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,  # else ids differ from time to time
        "text.parse_math": False,  # a `$` in a label begins no formula
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
    }
    with matplotlib.rc_context(chosen), warnings.catch_warnings():
        # `use_fonts_for` has said which are missing; a browser has them.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph", category=UserWarning)
        yield


def drawn(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a function that draws under `settings`."""

    @wraps(draw)
    def under_settings(*arguments: P.args, **options: P.kwargs) -> R:
        with settings():
            return draw(*arguments, **options)

    return under_settings


def blank(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """Make a figure with one set of axes; sizes in inches."""
    figure, rows = stacked([height], width)
    return figure, rows[0]


def stacked(heights: list[float], width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    """Make a figure with axes below each other that share their x axis; sizes in inches."""
    from matplotlib import ticker
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    rows = figure.subplots(len(heights), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes in rows:
        axes.patch.set_visible(False)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side in {"left", "bottom"})
            spine.set_color(LINE)
        axes.tick_params(which="both", colors=TEXT, length=0)
        for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
            text.set_color(TEXT)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(ticker.MaxNLocator(5))
    return figure, list(rows)


def legend(axes: Axes, **options: Any) -> None:
    """Name what is drawn, if it is more than one thing."""
    handles, names = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.legend(handles, names, labelcolor=TEXT, **options)


def short_name(name: object) -> str:
    """Make a label's name fit beside an axis."""
    return shortened(harmless(str(name)), NAME_CHARACTERS)


def png(figure: Figure, dpi: int = DPI) -> bytes:
    """Draw the figure as PNG on white; the same bytes for the same figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    with settings():
        lacking = use_fonts_for(figure)
        if lacking and not _lacking:
            warn(
                f"no font here has {''.join(sorted(lacking)[:8])!r}: pictures (PNG, TensorBoard) show boxes in their "
                "place, report.html is right; install a font that has them, e.g. the package fonts-noto-cjk"
            )
        _lacking.update(lacking)
        figure.patch.set(facecolor="#ffffff", visible=True)
        figure.dpi = dpi
        canvas: Any = FigureCanvasAgg(figure)
        canvas.print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def card(figure: Figure) -> bytes:
    """Draw the figure as PNG for a card of TensorBoard, where its texts are as large as those of the page.

    One that is wider than usual, such as a matrix of many classes, keeps its size: "Show actual image size" shows it.
    """
    width, height = figure.get_size_inches()
    if width <= WIDTH:
        figure.set_size_inches(CARD_WIDTH, height * max(CARD_WIDTH / width, 0.8))
        return png(figure, CARD_DPI)
    return png(figure)


def sprites(labels: Sequence[str], size: int) -> bytes:
    """Draw a square of one colour a label for each row, line by line into one large square, as PNG.

    Args:
        labels: Of the rows; the commonest have the colours of the charts.
        size: Pixels across a square.
    """
    import numpy as np
    from matplotlib import colormaps, image
    from matplotlib.colors import to_rgb

    names = [name for name, _ in Counter(labels).most_common()]
    shades = [*map(to_rgb, SERIES), *(shade[:3] for shade in colormaps["tab20"].colors)]  # type: ignore[attr-defined]
    across = ceil(sqrt(len(labels)))
    colours = np.ones((across * across, 3))
    colours[: len(labels)] = [shades[names.index(label) % len(shades)] for label in labels]
    stream = io.BytesIO()
    pixels = colours.reshape(across, across, 3).repeat(size, axis=0).repeat(size, axis=1)
    unsigned: Any = {"Software": None}  # matplotlib's stubs know no None, which leaves its version out
    image.imsave(stream, pixels, format="png", metadata=unsigned)
    return stream.getvalue()


def svg(figure: Figure, name: str = "chart", about: str = "") -> str:
    """Draw the figure as an `<svg>` element of a page; the same text for the same figure.

    Args:
        figure: A chart in colours of `INKS`.
        name: Begins every id in it, so that several fit into one page.
        about: For people who do not see the chart.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    with settings(name):
        figure.patch.set_visible(False)
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(stream, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    # Metadata, and a style for `*`, which would reach the whole page.
    text = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", text, flags=re.DOTALL)
    used = frozenset(re.findall(r"(?:url\(|href=\")#([\w-]+)", text))

    def restyled(found: re.Match[str]) -> str:
        tag = re.sub(r"font-family: [^;\"]*(; )?", "", found[0])  # the page's own fonts
        tag = re.sub(r' id="([\w.-]+)"', lambda one: f' id="{name}-{one[1]}"' if one[1] in used else "", tag)
        tag = re.sub(r"(url\(|href=\")#", rf"\1#{name}-", tag)
        for ink, variable in INKS.items():
            tag = tag.replace(ink, f"var(--{variable})")
        return tag

    text = re.sub(r"(?m)^\s+|\s+$", "", re.sub(r"<[^>]+>", restyled, text))
    size = r' width="[\d.]+pt" height="[\d.]+pt"'  # the page decides
    return re.sub(size, lambda _: f' role="img" aria-label="{html.escape(about)}"', text, count=1)


def both(figure: Figure, name: str = "chart", about: str = "") -> tuple[bytes, str]:
    """Draw the figure as PNG and as SVG, arranged once for both; arguments as of `svg`."""
    image = png(figure)
    figure.set_layout_engine("none")  # everything has its place now
    return image, svg(figure, name, about)


def use_fonts_for(figure: Figure) -> set[str]:
    """Give each text fonts of this machine for characters that matplotlib's own lacks, such as Chinese and Korean.

    Returns:
        Characters that no font here has.
    """
    from matplotlib import font_manager
    from matplotlib.text import Text

    for axes in figure.axes:  # labels of ticks are made when they are asked for
        axes.get_xticklabels()
        axes.get_yticklabels()
    lacking: set[str] = set()
    texts: list[Any] = figure.findobj(Text)
    for text in texts:
        families = text.get_fontfamily()
        missing = frozenset(char for char in text.get_text() if char.isprintable() and not char.isspace())
        for family in families:
            missing -= _characters(font_manager.findfont(font_manager.FontProperties(family=[family])))
        if missing:
            others, left = _fonts(missing)
            text.set_fontfamily([*families, *others])
            lacking |= left
    return lacking


@cache
def _characters(path: str) -> frozenset[str]:
    """Read the characters of a font file; none if it can't be drawn at every size, as emoji made of pictures."""
    from matplotlib import font_manager

    try:
        font = font_manager.get_font(path)
        return frozenset(map(chr, font.get_charmap())) if font.scalable else frozenset()
    except (OSError, RuntimeError, ValueError):
        return frozenset()


@cache
def _fonts(missing: frozenset[str]) -> tuple[tuple[str, ...], frozenset[str]]:
    """Find font families that have these characters; returns them and the characters that none has."""
    from matplotlib import font_manager

    def rank(path: str) -> tuple[int, bool, str]:
        name = path.replace("-", "").replace("_", "").lower()
        fancy = any(word in name for word in ("bold", "italic", "oblique", "light", "black", "serif"))
        return next((place for place, word in enumerate(WIDE_FONTS) if word in name), len(WIDE_FONTS)), fancy, path

    manager = font_manager.fontManager
    # matplotlib keeps its list on disk, and does not see what was installed since.
    known = {entry.fname for entry in manager.ttflist} | set(font_manager.findSystemFonts())
    families: list[str] = []
    # Last Resort, which matplotlib 3.11 brings along, has a box for every character.
    for path in sorted((path for path in known if "LastResort" not in path), key=rank)[:FONTS_TRIED]:
        if missing & _characters(path):
            if not any(entry.fname == path for entry in manager.ttflist):
                manager.addfont(path)
            families.append(next(entry.name for entry in manager.ttflist if entry.fname == path))
            missing -= _characters(path)
        if not missing:
            break
    return tuple(families), missing
