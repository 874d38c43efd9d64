"""Content of the data report's sections: numbers and texts, ready to be laid out by the template."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

import hf_finetune
from hf_finetune.charts import drawing, runs
from hf_finetune.datareport import Page, examples
from hf_finetune.pages.escaping import exact
from hf_finetune.runreport.content import recipe_lines
from hf_finetune.schema.checks import Checks

if TYPE_CHECKING:
    from hf_finetune.data import SplitReport
    from hf_finetune.data.facts import Facts

# Shown at most.
EXAMPLES, FINDINGS = 8, 300
LABELS_DRAWN, LABELS_LISTED = 12, 200
CLASSES, FREQUENT = 24, 12  # labels, and the most frequent tokens of each
REPEATED = ("leakage", "duplicates", "conflicting_labels")  # checks about rows that occur more than once
OF_TOKENS = ("unknown_tokens",)  # checks that count tokens; the others count rows
# Field of a split's report, its name and meaning.
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
RARE = ("empty", "unused")  # fields that are shown only where they are not 0


def context(page: Page) -> dict[str, Any]:
    """Collect everything that the template prints."""
    prepared, findings = page.prepared, list(page.findings)
    # Not `reports`: what was read of a stream for the examples is no count of it.
    reports, facts = prepared.counted, prepared.facts
    strikes = list(_strikes(facts, reports, page.recipe.data.checks))
    frequent = list(_frequent(facts))
    return {
        "recipe": page.recipe,
        "summary": recipe_lines(page.recipe),
        "findings": findings[:FINDINGS],
        "more_findings": len(findings) - FINDINGS,
        "errors": len(page.findings.errors),
        "warnings": len(page.findings.warnings),
        "plan": page.plan,
        "splits": list(reports),
        "fates": list(_fates(reports)),
        "balance": _balance(facts, reports),
        "lengths": list(_lengths(facts, reports, page.recipe.data.max_length)),
        "repeated": [strike for strike in strikes if strike["check"] in REPEATED],
        "strikes": [strike for strike in strikes if strike["check"] not in REPEATED],
        "frequent": frequent[:CLASSES],
        "more_frequent": len(frequent) - CLASSES,
        "examples": examples.first(page.recipe, prepared, page.tokenizer, EXAMPLES),
        "fold": examples.FOLD,
        "fingerprint": prepared.fingerprint,
        "version": hf_finetune.__version__,
    }


def _part(number: int, whole: int) -> dict[str, float]:
    """Pair a count with its share in percent."""
    return {"number": number, "share": 100 * number / whole if whole else 0.0}


def _fates(reports: Mapping[str, SplitReport]) -> Iterator[tuple[str, str, list[dict[str, float]]]]:
    """Say what became of the rows: name, meaning and a number for each split."""
    for field, name, meaning in FATES:
        counts = [(int(getattr(report, field, 0)), report.rows) for report in reports.values()]
        if field not in RARE or any(count for count, _ in counts):
            yield name, meaning, [_part(count, rows) for count, rows in counts]


def _balance(facts: Mapping[str, Facts], reports: Mapping[str, SplitReport]) -> dict[str, Any] | None:
    """Put label counts side by side, the most frequent of training first; None for tasks without labels."""
    counted = {split: found.labels for split, found in facts.items() if found.labels}
    if not counted:
        return None
    names = list(dict.fromkeys(name for labels in counted.values() for name in labels))
    names.sort(key=lambda name: [-labels.get(name, 0) for labels in counted.values()])
    table = {
        split: [_part(labels.get(name, 0), reports[split].kept) for name in names[:LABELS_LISTED]]
        for split, labels in counted.items()
    }
    shares = {split: [part["share"] for part in parts[:LABELS_DRAWN]] for split, parts in table.items()}
    about = f"Bar chart: share of each label in {', '.join(counted)}; the numbers are in the table beside it"
    return {
        "chart": Markup(drawing.svg(runs.shares(names[:LABELS_DRAWN], shares), "shares", about)),  # noqa: S704 - drawn here
        "splits": list(counted),
        "rows": list(zip(names, map(list, zip(*table.values(), strict=True)), strict=False)),
        "undrawn": max(0, len(names) - LABELS_DRAWN),
        "hidden": max(0, len(names) - LABELS_LISTED),
    }


def _lengths(facts: Mapping[str, Facts], reports: Mapping[str, SplitReport], limit: int) -> Iterator[dict[str, Any]]:
    """Draw a histogram for each split whose lengths are known."""
    for index, (split, found) in enumerate(facts.items()):
        if sum(found.lengths):
            report = reports[split]
            over = _part(report.cut + report.dropped, report.rows)
            about = (
                f"Histogram of tokens a row of {split}, longest {report.longest:,}; "
                f"{over['number']:,} rows ({over['share']:.1f} %) are cut or dropped at max_length {limit:,}"
            )
            figure = runs.lengths(found.length_edges, found.lengths, limit, index)
            svg = drawing.svg(figure, f"lengths{index}", about)
            yield {"split": split, "chart": Markup(svg), "longest": report.longest, "over": over}  # noqa: S704


def _strikes(
    facts: Mapping[str, Facts], reports: Mapping[str, SplitReport], checks: Checks
) -> Iterator[dict[str, Any]]:
    """Say how often each check struck in each split, and where the first rows are."""
    for check, level in checks:
        unit = "tokens" if check in OF_TOKENS else "rows"
        splits = []
        for split, found in facts.items():
            if check in found.tallies:
                tally = found.tallies[check]
                by_source: dict[str, list[str]] = {}
                for source, row in tally.rows:
                    by_source.setdefault(source, []).append(f"{row:,}")
                places = [
                    f"{source}: row{'s' if len(rows) > 1 else ''} {', '.join(rows)}"
                    for source, rows in by_source.items()
                ]
                splits.append((split, _part(tally.count, getattr(reports[split], unit)), places))
        if splits:
            yield {"check": check, "level": str(level), "unit": unit, "splits": splits}


def _frequent(facts: Mapping[str, Facts]) -> Iterator[dict[str, Any]]:
    """List frequent tokens of the training rows, or of the first split where those are streamed, by label."""
    found = facts.get("train") or next(iter(facts.values()), None)
    if found is None:
        return
    for label, tokens in sorted(found.frequent.items(), key=lambda table: -found.labels.get(table[0], 0)):
        if tokens:
            most = tokens[0][1]
            shown = [(exact(token).replace(" ", examples.SPACE), _part(n, most)) for token, n in tokens[:FREQUENT]]
            yield {"label": label, "tokens": shown}
