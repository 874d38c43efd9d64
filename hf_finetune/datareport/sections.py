"""What each section of the page says: numbers and texts, ready to be laid out by the template."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

import hf_finetune
from hf_finetune.charts import drawing, runs
from hf_finetune.datareport import examples, summary
from hf_finetune.pages.escaping import exact

if TYPE_CHECKING:
    from hf_finetune.data import SplitReport
    from hf_finetune.data.facts import Facts, Tally
    from hf_finetune.datareport import Page
    from hf_finetune.schema.checks import Checks

EXAMPLES = 8
"""Training sequences that the page shows."""
LABELS_DRAWN, LABELS_LISTED = 12, 200
CLASSES = 24
"""Labels of which frequent tokens are shown."""
FREQUENT = 12
"""Tokens that are shown of each."""
FINDINGS = 300
REPEATED = ("leakage", "duplicates", "conflicting_labels")
"""Checks about rows that are there more than once."""
FATES = (
    ("rows", "Rows", "read from the source"),
    ("kept", "Kept", "trained on or evaluated"),
    ("cut", "Cut", "kept, but truncated to max_length"),
    ("dropped", "Dropped", "left out as over-long"),
    ("empty", "Empty", "left out without text"),
    ("untrained", "Untrained", "left out: nothing in them counts in the loss"),
    ("unused", "Unused", "of the mix, never drawn"),
    ("tokens", "Tokens", "of the kept rows, after cutting"),
    ("trained", "Trained", "items that the loss counts: rows, or tokens"),
    ("longest", "Longest", "tokens of the longest row, before cutting"),
)
"""Field of a split's report, its name and what it means."""
OF_TOKENS = ("unknown_tokens",)
"""Checks that count tokens; the others count rows."""
RARE = {"empty", "unused"}
"""Fields that are shown where they are not 0."""


@dataclass(frozen=True)
class Part:
    """A count and its share in percent."""

    count: int
    share: float


@dataclass(frozen=True)
class Balance:
    """How often each label occurs in each split."""

    chart: Markup
    splits: list[str]
    rows: list[tuple[str, list[Part]]]
    """Label, and a number for each split; shares are of its kept rows."""
    undrawn: int
    """Labels that are not in the chart."""
    hidden: int
    """Labels that are not in `rows`."""


@dataclass(frozen=True)
class Lengths:
    """How long the rows of a split are."""

    split: str
    chart: Markup
    report: SplitReport
    over: Part
    """Rows beyond `max_length`."""


@dataclass(frozen=True)
class Strike:
    """How often a check struck in each split."""

    check: str
    level: str
    """What the recipe makes of it."""
    unit: str
    splits: list[tuple[str, Part, list[str]]]
    """Split, how often, and where the first of them are."""


@dataclass(frozen=True)
class Frequent:
    """The most frequent tokens of a label."""

    label: str
    tokens: list[tuple[str, Part]]
    """With their count, and that in percent of the first."""


def context(page: Page) -> dict[str, Any]:
    """Everything that the template prints."""
    prepared, findings = page.prepared, list(page.findings)
    # Not `reports`: what was read of a stream for the examples is no count of it.
    reports, facts = prepared.counted, prepared.facts
    strikes = _strikes(facts, reports, page.recipe.data.checks)
    return {
        "recipe": page.recipe,
        "summary": summary.lines(page.recipe),
        "findings": findings[:FINDINGS],
        "more_findings": len(findings) - FINDINGS,
        "errors": len(page.findings.errors),
        "warnings": len(page.findings.warnings),
        "plan": page.plan,
        "splits": list(reports),
        "fates": _fates(reports),
        "balance": _balance(facts, reports),
        "lengths": _lengths(facts, reports, page.recipe.data.max_length),
        "repeated": [strike for strike in strikes if strike.check in REPEATED],
        "strikes": [strike for strike in strikes if strike.check not in REPEATED],
        "frequent": _frequent(facts)[:CLASSES],
        "more_frequent": len(_frequent(facts)) - CLASSES,
        "examples": examples.first(page.recipe, prepared, page.tokenizer, EXAMPLES),
        "fold": examples.FOLD,
        "fingerprint": prepared.fingerprint,
        "version": hf_finetune.__version__,
    }


def _fates(reports: Mapping[str, SplitReport]) -> list[tuple[str, str, list[Part]]]:
    """Name, meaning and a number for each split."""
    table = []
    for field, name, meaning in FATES:
        counts = [int(getattr(report, field, 0)) for report in reports.values()]
        if field not in RARE or any(counts):
            parts = [_part(count, report.rows) for count, report in zip(counts, reports.values(), strict=True)]
            table.append((name, meaning, parts))
    return table


def _balance(facts: Mapping[str, Facts], reports: Mapping[str, SplitReport]) -> Balance | None:
    """Label counts side by side, the most frequent of training first; None for tasks without labels."""
    counted = {split: found.labels for split, found in facts.items() if found.labels}
    if not counted:
        return None
    totals = {split: reports[split].kept for split in counted}
    names = list(dict.fromkeys(name for labels in counted.values() for name in labels))
    names.sort(key=lambda name: [-labels.get(name, 0) for labels in counted.values()])
    shares = {
        split: [_part(labels.get(name, 0), totals[split]).share for name in names[:LABELS_DRAWN]]
        for split, labels in counted.items()
    }
    rows = [
        (name, [_part(labels.get(name, 0), totals[split]) for split, labels in counted.items()])
        for name in names[:LABELS_LISTED]
    ]
    about = f"Bar chart: share of each label in {', '.join(counted)}; the numbers are in the table beside it"
    chart = Markup(drawing.svg(runs.shares(names[:LABELS_DRAWN], shares), "shares", about))  # noqa: S704
    hidden = [max(0, len(names) - most) for most in (LABELS_DRAWN, LABELS_LISTED)]
    return Balance(chart, list(counted), rows, *hidden)


def _lengths(facts: Mapping[str, Facts], reports: Mapping[str, SplitReport], limit: int) -> list[Lengths]:
    """A histogram for each split that has one."""
    drawn = []
    for index, (split, found) in enumerate(facts.items()):
        if not sum(found.lengths):
            continue
        report = reports[split]
        over = _part(report.cut + report.dropped, report.rows)
        about = (
            f"Histogram of tokens a row of {split}, longest {report.longest:,}; "
            f"{over.count:,} rows ({over.share:.1f} %) are cut or dropped at max_length {limit:,}"
        )
        figure = runs.lengths(found.length_edges, found.lengths, limit, index)
        svg = drawing.svg(figure, f"lengths{index}", about)
        drawn.append(Lengths(split, Markup(svg), report, over))  # noqa: S704
    return drawn


def _strikes(facts: Mapping[str, Facts], reports: Mapping[str, SplitReport], checks: Checks) -> list[Strike]:
    """Every check that struck, in the order of their table."""
    strikes = []
    for check, level in checks:
        of_tokens = check in OF_TOKENS
        splits = []
        for split, found in facts.items():
            if check in found.tallies:
                tally, report = found.tallies[check], reports[split]
                part = _part(tally.count, report.tokens if of_tokens else report.rows)
                splits.append((split, part, _places(tally)))
        if splits:
            strikes.append(Strike(check, str(level), "tokens" if of_tokens else "rows", splits))
    return strikes


def _places(tally: Tally) -> list[str]:
    """`train.csv: rows 3, 9`, one text a source."""
    by_source: dict[str, list[int]] = {}
    for source, row in tally.rows:
        by_source.setdefault(source, []).append(row)
    return [
        f"{source}: row{'s' if len(rows) > 1 else ''} {', '.join(f'{row:,}' for row in rows)}"
        for source, rows in by_source.items()
    ]


def _frequent(facts: Mapping[str, Facts]) -> list[Frequent]:
    """Of the training rows, or of the first split where those are streamed; the commonest label first."""
    found = facts.get("train") or next(iter(facts.values()), None)
    tables = [] if found is None else sorted(found.frequent.items(), key=lambda table: -found.labels.get(table[0], 0))
    return [
        Frequent(
            label,
            [
                (exact(token).replace(" ", examples.SPACE), _part(count, tokens[0][1]))
                for token, count in tokens[:FREQUENT]
            ],
        )
        for label, tokens in tables
        if tokens
    ]


def _part(count: int, whole: int) -> Part:
    return Part(count, 100 * count / whole if whole else 0.0)
