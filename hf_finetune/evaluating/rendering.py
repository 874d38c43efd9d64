"""An evaluation's document as text for a terminal, or as markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hf_finetune import tables
from hf_finetune.terminal.message import printable

WIDE = 120
"""Columns of a terminal from which on each metric of a slice shows its interval."""
Table = tuple[str, list[str], list[list[str]]]
"""Title, heads, rows."""


def render(document: Mapping[str, Any], form: str, headline: Sequence[str], *, everything: bool) -> str:
    """The document for people or machines.

    Args:
        document: What `Evaluation.as_json` gave.
        form: `text`, `json` or `markdown`.
        headline: Metrics that are shown first, and for slices.
        everything: Metrics of each class too.
    """
    if form == "json":
        return json.dumps(document, indent=2, ensure_ascii=False)
    found = list(_tables(document, headline, everything=everything, narrow=form == "text" and tables.width() < WIDE))
    head = _head(document)
    if form == "markdown":
        blocks = [f"**{tables.cell(title)}**\n\n{tables.markdown(heads, rows)}" for title, heads, rows in found]
        return "\n\n".join([tables.cell(head), *blocks, *(tables.cell(note) for note in _notes(document))])
    lines = [printable(head)]
    for title, heads, rows in found:
        lines += ["", *tables.text([title, *heads[1:]], [rows])]
    notes = [printable(note) for note in _notes(document)]
    return "\n".join([*lines, *(["", *notes] if notes else [])])


def _head(document: Mapping[str, Any]) -> str:
    data = document["data"]
    fates = [f"{data[name]:,} {said}" for name, said in FATES.items() if data.get(name)]
    told = f" ({', '.join(fates)})" if fates else ""
    return f"{document['run']} on {data['name']}: {data['evaluated']:,} of {data['rows']:,} rows{told}"


FATES = {
    "cut": "cut",
    "dropped": "over-long and dropped",
    "untrained": "without anything that counts",
    "empty": "without text",
}
"""Field of `data` -> what became of so many rows."""


def _tables(document: Mapping[str, Any], headline: Sequence[str], *, everything: bool, narrow: bool) -> Iterator[Table]:
    metrics = document["metrics"]
    shown = _chosen(metrics, headline, everything=everything)
    yield "metric", ["metric", "value", "95 % interval"], [[name, *_value(metrics[name])] for name in shown]
    for column, parts in document["slices"].items():
        names = [name for name in headline if any(name in part["metrics"] for part in parts)]
        rows = [
            [part["value"], f"{part['rows']:,}", *(_short(part["metrics"].get(name), narrow) for name in names)]
            for part in parts
        ]
        if narrow and len(names) > 1:  # all intervals would fold into splinters: the main metric keeps its own
            bounds = [_value(part["metrics"][names[1]])[1] if names[1] in part["metrics"] else "-" for part in parts]
            names = [*names, f"{names[1]}: 95 % interval"]
            rows = [[*row, interval] for row, interval in zip(rows, bounds, strict=True)]
        yield f"by {column}", [f"by {column}", "rows", *names], rows
    for versus in document["against"]:
        compared = _chosen(versus["differences"], headline, everything=everything)
        rows = [
            [name, tables.number(versus["metrics"][name]), *_value(versus["differences"][name], signed=True)]
            for name in compared
        ]
        title = f"against {versus['name']}"
        yield title, [title, versus["name"], "difference", "95 % interval"], rows


def _notes(document: Mapping[str, Any]) -> list[str]:
    notes = [document["intervals"]] if document["intervals"] else []
    for column, left in document["slices_not_shown"].items():
        notes.append(f"by {column}: {left['slices']:,} smaller slices with {left['rows']:,} rows are not shown")
    for versus in document["against"]:
        notes += versus["notes"]
        test = versus["mcnemar"]
        if test is not None:
            counts = f"only this run is right in {test['only_this']:,} rows, only {versus['name']} in"
            notes.append(
                f"{test['metric']}: {counts} {test['only_other']:,}; McNemar's exact p = {test['p_value']:.3g}"
            )
    return notes


def _chosen(metrics: Mapping[str, Any], headline: Sequence[str], *, everything: bool) -> list[str]:
    """Main metrics first; those of single classes (`f1.NAME`) only where everything is asked for."""
    rest = [name for name in metrics if name not in headline and (everything or "." not in name)]
    return [*(name for name in headline if name in metrics), *rest]


def _value(metric: Mapping[str, Any], *, signed: bool = False) -> list[str]:
    sign = "+" if signed and float(metric["value"]) > 0 else ""
    bounds = f"{tables.number(metric['low'])} .. {tables.number(metric['high'])}" if "low" in metric else "-"
    return [sign + tables.number(float(metric["value"])), bounds]


def _short(metric: Mapping[str, Any] | None, narrow: bool) -> str:
    if metric is None:
        return "-"
    value, bounds = _value(metric)
    return value if bounds == "-" or narrow else f"{value} ({bounds})"
