"""`report.html`: the same on one page that needs no network and runs no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import hf_finetune
from hf_finetune import pages
from hf_finetune.charts import drawing
from hf_finetune.charts.predictions import STRONGEST, strength
from hf_finetune.charts.runs import SECTIONS
from hf_finetune.datareport import summary
from hf_finetune.runreport import told

if TYPE_CHECKING:
    from markupsafe import Markup

    from hf_finetune.charts.drawing import Plot
    from hf_finetune.runreport.remains import Remains

LEVELS = 9
"""Steps of the colour of a token."""
SCHEMES = {"light": ("#f5f6f8", "#b9184f", 0.46), "dark": ("#1d2126", "#ff7fa9", 0.4)}
"""Paper and ink of tokens, as in page.css, and how much ink the strongest has: text on it must be readable."""
TOKENS = 512
"""Tokens of a row that are shown."""
TOKEN_ROWS = 16
"""Rows of a split whose tokens are shown."""
SAMPLED = 12
"""Evaluations whose samples are shown, the last ones."""
EVALUATIONS = 200
CLASSES = 300
"""Lines that a table has at most."""


@dataclass(frozen=True)
class Drawn:
    """A chart as it stands in the page."""

    chart: Plot
    svg: Markup


@dataclass(frozen=True)
class Token:
    """A token of a row, coloured by its loss."""

    text: str
    level: int
    """0 to `LEVELS`; how strong its colour is."""
    trained: bool
    told: str
    """Its loss and entropy."""
    breaks: bool
    """Whether it ends a line."""


def html(run: Remains, charts: Sequence[Drawn]) -> str:
    """The whole page; the same text for the same run.

    Raises:
        ValueError: A record or a sample lacks what it should have.
    """
    from jinja2 import UndefinedError

    template = pages.environment("hf_finetune.runreport").get_template("run.html.jinja")
    try:
        return template.render(_context(run, charts))
    except UndefinedError as error:
        raise ValueError(f"a record or a sample is not whole: {error}") from error


def _context(run: Remains, charts: Sequence[Drawn]) -> dict[str, Any]:
    quantity, modules = told.modules(run)
    outcome = run.outcome
    return {
        "recipe": run.recipe,
        "state": run.summary,
        "summary": summary.lines(run.recipe),
        "trained": told.trained(run),
        "results": told.results(run),
        "per_class": told.PER_CLASS,
        "headline": _headline(run),
        "charts": _by_section(charts),
        "evaluations": run.of("eval")[-EVALUATIONS:],
        "evaluated": [name for name in run.recipe.task.headline if any(name in line for line in run.of("eval"))],
        "mistakes": _rows(run, "examples"),
        "tokens": [(split, [_tokens(row) for row in rows[:TOKEN_ROWS]]) for split, rows in _rows(run, "tokens")],
        "levels": LEVELS,
        "strongest": STRONGEST,
        "shades": {scheme: _shades(*colours) for scheme, colours in SCHEMES.items()},
        "samples": _samples(run),
        "quantity": quantity,
        "modules": modules,
        "fates": [line.partition(": ")[::2] for line in told.fates(run)],
        "findings": told.findings(run),
        "warnings": [str(problem) for problem in outcome.warnings] if outcome is not None else [],
        "known": outcome is not None,
        "cost": told.cost(run),
        "loading": run.loading,
        "missing": run.missing,
        "environment": run.environment,
        "version": hf_finetune.__version__,
        "most_classes": CLASSES,
    }


def drawn(chart: Plot) -> tuple[Drawn, bytes]:
    """A chart for the page, and as PNG."""
    from markupsafe import Markup

    image, svg = drawing.both(chart.draw(), chart.name, chart.about)
    return Drawn(chart, Markup(svg)), image  # noqa: S704


def _shades(paper: str, ink: str, most: float) -> list[str]:
    """Colours of the levels from 1 on."""
    pairs = [(int(paper[at : at + 2], 16), int(ink[at : at + 2], 16)) for at in (1, 3, 5)]
    parts = [most * level / LEVELS for level in range(1, LEVELS + 1)]
    return ["#" + "".join(f"{round(back + part * (front - back)):02x}" for back, front in pairs) for part in parts]


def _headline(run: Remains) -> list[tuple[str, str, float]]:
    """Split, metric and value of what the task prints first."""
    return [
        (split, name, scores[name])
        for split, scores in run.scores.items()
        for name in run.recipe.task.headline[:4]
        if name in scores
    ]


def _by_section(charts: Sequence[Drawn]) -> dict[str, list[Drawn]]:
    return {section: [each for each in charts if each.chart.section == section] for section in SECTIONS}


def _rows(run: Remains, kind: str) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Split and rows of the records of a kind, where there are any."""
    records = {split: run.record(kind, split) for split in run.phases}
    found = [(split, record.facts.get("rows") or []) for split, record in records.items() if record is not None]
    return [(split, rows) for split, rows in found if rows]


def _tokens(row: Mapping[str, Any]) -> list[Token]:
    count = len(row["tokens"])
    entropies = row.get("entropies") or [None] * count
    trained = row.get("trained") or [True] * count
    columns = zip(row["tokens"], row["losses"], entropies, trained, strict=True)
    return [_token(*values) for values in list(columns)[:TOKENS]]


def _token(text: str, loss: float | None, entropy: float | None, trained: bool) -> Token:
    parts = [
        f"loss {loss:.3g} nats" if loss is not None else "",
        f"entropy {entropy:.3g}" if entropy is not None else "",
    ]
    level = round(LEVELS * strength(loss))
    shown = text.replace("\\", "\\\\").replace(" ", "▁")
    return Token(shown, level, bool(trained), ", ".join(part for part in parts if part), "\n" in text)


def _samples(run: Remains) -> list[tuple[int, list[Mapping[str, Any]]]]:
    """Step and samples, the last evaluation first."""
    groups = [(int(step), list(group)) for step, group in groupby(run.samples, key=lambda sample: sample["step"])]
    return groups[::-1][:SAMPLED]
