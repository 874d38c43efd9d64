"""`report.html`: one page that needs no network and runs no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import hf_finetune
from hf_finetune.reports import run as reports_run
from hf_finetune.reports.run import RunData
from hf_finetune.tracking import figures
from hf_finetune.tracking.charts import SECTIONS, STRONGEST, strength
from hf_finetune.tracking.figures import Chart

if TYPE_CHECKING:
    import jinja2
    from markupsafe import Markup


# Shared parts of HTML pages: templates that print nothing harmful, one style sheet, no network and no script.


def environment() -> jinja2.Environment:
    """Load this room's templates. Whatever they print is escaped, and characters that can't be seen are written out."""
    import jinja2

    from hf_finetune.log.text import exact, harmless, number

    made = jinja2.Environment(
        loader=jinja2.PackageLoader("hf_finetune.reports", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Not `isinstance`: drawings are Markup, a subclass, and stay as they are.
        finalize=lambda value: harmless(value) if type(value) is str else value,
    )
    made.filters |= {"exact": exact, "number": number}
    return made


LEVELS = 9  # steps of the colour of a token
# Paper and ink of tokens, as in page.css, and how much ink the strongest has: text on it must be readable.
SCHEMES = {"light": ("#f5f6f8", "#b9184f", 0.46), "dark": ("#1d2126", "#ff7fa9", 0.4)}
TOKENS, TOKEN_ROWS = 512, 16  # shown of a row, and rows of a split
SAMPLED, EVALUATIONS, CLASSES = 12, 200, 300  # shown at most; the last ones of those that have an order


def html(run: RunData, charts: Sequence[tuple[Chart, Markup]]) -> str:
    """Write the page; the same text for the same run.

    Args:
        run: What is known of the run.
        charts: With their drawings.

    Raises:
        ValueError: A record or a sample lacks what it should have.
    """
    from jinja2 import UndefinedError

    found = reports_run.of(run)
    shades: dict[str, list[str]] = {}
    for scheme, (paper, ink, most) in SCHEMES.items():
        # The colours of the levels from 1 on.
        pairs = [(int(paper[at : at + 2], 16), int(ink[at : at + 2], 16)) for at in (1, 3, 5)]
        parts = [most * level / LEVELS for level in range(1, LEVELS + 1)]
        shades[scheme] = [
            "#" + "".join(f"{round(back + part * (front - back)):02x}" for back, front in pairs) for part in parts
        ]
    context = found | {
        # Of every split and yardstick, as a column: a row for each metric of the whole split.
        "metrics": list(dict.fromkeys(name for result in found["results"] for name in result.overall)),
        "per_class": reports_run.PER_CLASS,
        "charts": {name: [(chart, svg) for chart, svg in charts if chart.section == name] for name in SECTIONS},
        "evaluations": found["evaluations"][-EVALUATIONS:],
        "tokens": [
            (split, [_tokens(row) for row in rows[:TOKEN_ROWS]]) for split, rows in reports_run.rows_of(run, "tokens")
        ],
        "levels": LEVELS,
        "strongest": STRONGEST,
        "shades": shades,
        "samples": found["samples"][:SAMPLED],
        "fates": [line.partition(": ")[::2] for line in found["facts"].get("rows", ())],
        "findings": found["facts"].get("findings", ()),
        "warnings": found["facts"].get("warnings", ()),
        "known": bool(found["facts"]),
        "version": hf_finetune.__version__,
        "most_classes": CLASSES,
    }
    template = environment().get_template("run.html.jinja")
    try:
        return template.render(context)
    except UndefinedError as error:
        raise ValueError(f"a record or a sample is not whole: {error}") from error


def drawn(chart: Chart) -> tuple[Markup, bytes]:
    """Draw a chart as SVG for the page, and as PNG."""
    from markupsafe import Markup

    image, svg = figures.both(chart.draw(), chart.name, chart.about)
    return Markup(svg), image  # noqa: S704 - drawn here


def _tokens(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lay out the tokens of a row, coloured by their loss."""
    count = len(row["tokens"])
    entropies, trained = row.get("entropies") or [None] * count, row.get("trained") or [True] * count
    found = []
    columns = zip(row["tokens"], row["losses"], entropies, trained, strict=True)
    for text, loss, entropy, counts in islice(columns, TOKENS):
        notes = [] if loss is None else [f"loss {loss:.3g} nats"]
        notes += [] if entropy is None else [f"entropy {entropy:.3g}"]
        found.append({
            # Doubled, because what can't be seen is written with a backslash later.
            "text": text.replace("\\", "\\\\").replace(" ", "▁"),
            "level": round(LEVELS * strength(loss)) if counts else 0,
            "trained": counts,
            "title": ", ".join(notes),
            "breaks": "\n" in text,
        })  # fmt: skip
    return found
