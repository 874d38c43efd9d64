"""Documents of evaluations: kept as JSON in `RUN/evaluations/`, and rendered for a terminal or as markdown."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_finetune.log import text
from hf_finetune.log.lines import printable
from hf_finetune.reports.outcome import macro_over
from hf_finetune.run.files import write_atomically, writing

VERSION = 1
FOLDER = "evaluations"
# A terminal with so many columns shows an interval for each metric of a slice.
WIDE = 120
# Field of `data` -> what became of so many rows.
FATES = {
    "cut": "cut",
    "dropped": "over-long and dropped",
    "untrained": "without anything that counts",
    "empty": "without text",
}
Table = tuple[str, list[str], list[list[str]]]  # title, heads, rows


def write(run: Path, title: str, document: Mapping[str, Any], key: Sequence[str]) -> Path:
    """Write `RUN/evaluations/TITLE-HASH.json`; the same evaluation made again replaces it.

    The hash is of `key`, which is everything that makes it another evaluation.
    """
    digest = hashlib.sha256(json.dumps(list(key)).encode()).hexdigest()[:8]
    # A title may be paths of data files, as long as the user likes.
    name = re.sub(r"[^\w.-]+", "-", title).strip("-.")[:60] or "data"
    file = run / FOLDER / f"{name}-{digest}.json"
    with writing(file):
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    return file


def render(document: Mapping[str, Any], form: str, headline: Sequence[str], *, everything: bool) -> str:
    """Render an evaluation as `text`, `json` or `markdown`: metrics of the headline first, with `everything` all."""
    if form == "json":
        return json.dumps(document, indent=2, ensure_ascii=False)
    tables = list(_tables(document, headline, everything=everything, narrow=form == "text" and text.width() < WIDE))
    data = document["data"]
    fates = ", ".join(f"{data[name]:,} {fate}" for name, fate in FATES.items() if data.get(name))
    head = f"{document['run']} on {data['name']}: {data['evaluated']:,} of {data['rows']:,} rows"
    head += f" ({fates})" if fates else ""
    notes = _notes(document)
    if form == "markdown":
        blocks = [f"**{text.cell(title)}**\n\n{text.markdown(heads, rows)}" for title, heads, rows in tables]
        return "\n\n".join([text.cell(head), *blocks, *map(text.cell, notes)])
    lines = [printable(head)]
    for title, heads, rows in tables:
        lines += ["", *text.text([title, *heads[1:]], [rows])]
    return "\n".join([*lines, *(["", *map(printable, notes)] if notes else [])])


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
        # All intervals would fold into splinters: the main metric alone keeps its own.
        if narrow and len(names) > 1:
            bounds = [_value(part["metrics"][names[1]])[1] if names[1] in part["metrics"] else "-" for part in parts]
            names = [*names, f"{names[1]}: 95 % interval"]
            rows = [[*row, interval] for row, interval in zip(rows, bounds, strict=True)]
        yield f"by {column}", [f"by {column}", "rows", *names], rows
    for versus in document["against"]:
        compared = _chosen(versus["differences"], headline, everything=everything)
        rows = [
            [name, text.number(versus["metrics"][name]), *_value(versus["differences"][name], signed=True)]
            for name in compared
        ]
        title = f"against {versus['name']}"
        yield title, [title, versus["name"], "difference", "95 % interval"], rows


def _notes(document: Mapping[str, Any]) -> list[str]:
    notes = [document["intervals"]] if document["intervals"] else []
    notes += [f"{name}: {text}" for name, text in document.get("signatures", {}).items() if name in document["metrics"]]
    if over := macro_over({name: metric["value"] for name, metric in document["metrics"].items()}):
        notes.append(over)
    for column, left in document["slices_not_shown"].items():
        notes.append(f"by {column}: {left['slices']:,} smaller slices with {left['rows']:,} rows are not shown")
    for versus in document["against"]:
        notes += versus["notes"]
        test = versus["mcnemar"]
        if test is not None:
            counts = f"only this run is right in {test['only_this']:,} rows, only {versus['name']} in"
            p_value = f"McNemar's exact p = {test['p_value']:.3g}"
            notes.append(f"{test['metric']}: {counts} {test['only_other']:,}; {p_value}")
    return notes


def _chosen(metrics: Mapping[str, Any], headline: Sequence[str], *, everything: bool) -> list[str]:
    """Put the main metrics first; those of single classes (`f1.NAME`) only come where everything is asked for."""
    rest = [name for name in metrics if name not in headline and (everything or "." not in name)]
    return [*(name for name in headline if name in metrics), *rest]


def _value(metric: Mapping[str, Any], *, signed: bool = False) -> list[str]:
    written = text.difference if signed else text.number
    bounds = f"{written(metric['low'])} .. {written(metric['high'])}" if "low" in metric else "-"
    return [written(float(metric["value"])), bounds]


def _short(metric: Mapping[str, Any] | None, narrow: bool) -> str:
    if metric is None:
        return "-"
    value, bounds = _value(metric)
    return value if bounds == "-" or narrow else f"{value} ({bounds})"
