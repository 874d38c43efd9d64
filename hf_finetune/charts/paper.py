"""What charts are drawn on: figures in the colours of the pages, as PNG and as inline SVG.

Figures are made without pyplot and look the same on every machine. They are drawn in the colours of a light page; in
an SVG each of these is replaced by the page's variable, so that dark and light pages show the same drawing.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from hf_finetune.charts import glyphs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")

INKS = {
    "#1b1f24": "text",
    "#59616b": "soft",
    "#d8dce2": "line",
    "#b9184f": "limit",
    "#fffffe": "hatch",
    "#2f6fd0": "s0",
    "#e08a2e": "s1",
    "#2b9a72": "s2",
    "#8458c7": "s3",
    "#c2487d": "s4",
    "#7d6a14": "s5",
}
"""Colour on a light page -> the page's variable."""
TEXT, SOFT, LINE, LIMIT, HATCH, *SERIES = INKS
DASHES: tuple[Any, ...] = (
    "-",
    (0, (5, 1.5)),
    (0, (1.5, 1)),
    (0, (6, 1.5, 1.5, 1.5)),
    (0, (8, 3)),
    (0, (3, 1, 1, 1, 1, 1)),
)
"""Tells lines apart without colour, in the order of `SERIES`."""
WIDTH = 4.8
"""Inches of a chart."""
DPI = 188
"""Dots an inch of a PNG: a chart is some 900 wide."""
PAPER = "#ffffff"
"""Behind a PNG; an SVG has nothing behind it."""


@contextmanager
def settings(salt: str = "chart") -> Iterator[None]:
    """Matplotlib's settings while a chart is drawn; names hold no formulas, ids are the same every time."""
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
        "svg.hashsalt": salt,
        "text.parse_math": False,
        "xtick.labelsize": 8,
        "ytick.labelsize": 8,
    }
    with matplotlib.rc_context(chosen), warnings.catch_warnings():
        # `glyphs` has said which are missing; the browser has them.
        warnings.filterwarnings("ignore", message=".*[Gg]lyph", category=UserWarning)
        yield


def drawn(draw: Callable[P, R]) -> Callable[P, R]:
    """A function that draws, under `settings`."""

    @wraps(draw)
    def under_settings(*arguments: P.args, **options: P.kwargs) -> R:
        with settings():
            return draw(*arguments, **options)

    return under_settings


def blank(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """A figure with one set of axes; sizes in inches."""
    figure, rows = stacked([height], width)
    return figure, rows[0]


def stacked(heights: list[float], width: float = WIDTH) -> tuple[Figure, list[Axes]]:
    """A figure with axes below each other, which share what is on their x axis; sizes in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, sum(heights)), layout="constrained")
    rows = figure.subplots(len(heights), sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axes in rows:
        _plain(axes)
    return figure, list(rows)


def _plain(axes: Axes) -> None:
    """Only the two lines that carry numbers, and few ticks."""
    from matplotlib import ticker

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


def legend(axes: Axes, **options: Any) -> None:
    """The names of what is drawn, where there is more than one."""
    handles, names = axes.get_legend_handles_labels()
    if len(handles) > 1:
        axes.legend(handles, names, labelcolor=TEXT, **options)


def png(figure: Figure) -> bytes:
    """The figure as PNG on white; the same bytes for the same figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    with settings():
        glyphs.say_lacking(glyphs.complete(figure))
        _lay(figure, behind=True)
        figure.dpi = DPI
        canvas: Any = FigureCanvasAgg(figure)
        canvas.print_png(stream, metadata={"Software": None})
    return stream.getvalue()


def svg(figure: Figure, name: str = "chart", about: str = "") -> str:
    """The figure as an `<svg>` element of a page; the same text for the same figure.

    Args:
        figure: A chart in colours of `INKS`.
        name: Begins every id in it, so that several fit into one page.
        about: What people who do not see the chart are told.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    with settings(name):
        _lay(figure, behind=False)
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(stream, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    # Metadata, and a style for `*`, which would reach the whole page.
    text = re.sub(r"<(metadata|style)\b.*?</\1>|<!--.*?-->", "", text, flags=re.DOTALL)
    used = frozenset(re.findall(r"(?:url\(|href=\")#([\w-]+)", text))
    text = re.sub(r"<[^>]+>", lambda tag: _restyled(tag[0], name, used), text)
    text = re.sub(r"(?m)^\s+|\s+$", "", text)
    size = r' width="[\d.]+pt" height="[\d.]+pt"'
    return re.sub(size, lambda _: f' role="img" aria-label="{html.escape(about)}"', text, count=1)


def both(figure: Figure, name: str = "chart", about: str = "") -> tuple[bytes, str]:
    """The figure as PNG and as SVG, arranged once for both; arguments as of `svg`."""
    image = png(figure)
    figure.set_layout_engine("none")  # everything has its place now
    return image, svg(figure, name, about)


def _lay(figure: Figure, *, behind: bool) -> None:
    """Paper behind the figure, or nothing."""
    figure.patch.set_facecolor(PAPER)
    figure.patch.set_visible(behind)


def _restyled(tag: str, name: str, used: frozenset[str]) -> str:
    """One tag with the page's colours and fonts, and ids that are this chart's own."""
    tag = re.sub(r"font-family: [^;\"]*(; )?", "", tag)
    tag = re.sub(r' id="([\w.-]+)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", tag)
    tag = re.sub(r"(url\(|href=\")#", rf"\1#{name}-", tag)
    for ink, variable in INKS.items():
        tag = tag.replace(ink, f"var(--{variable})")
    return tag
