"""An evaluation as a document: what JSON holds and `RUN/evaluations/` keeps."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune.errors import StorageError
from hf_finetune.log import text
from hf_finetune.log.lines import jsonable, printable
from hf_finetune.run.files import write_atomically

if TYPE_CHECKING:
    from hf_finetune.inference.evaluate import Scored, Versus
    from hf_finetune.inference.load import Finished

VERSION = 1
FOLDER = "evaluations"


@dataclass(frozen=True)
class Slice:
    """The rows that have one value in a column."""

    value: str
    scored: Scored


@dataclass(frozen=True)
class Evaluation:
    """What was evaluated, and what came of it."""

    run: Finished
    title: str
    """What messages call the rows: a split or files."""
    data: Mapping[str, Any]
    """What the rows are and what became of them."""
    overrides: Sequence[str]
    scored: Scored
    slices: Mapping[str, Sequence[Slice]] = field(default_factory=dict)
    """By column."""
    unsliced: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """By column: slices and rows that are too many to be shown."""
    against: Sequence[Versus] = ()

    def as_json(self) -> dict[str, Any]:
        """Everything, as JSON holds it; NaN and infinity as text."""
        machine = self.run.machine
        settings = {"device": machine.device, "precision": machine.precision, "attention": machine.attention}
        whole = self.scored.intervals()
        made: dict[str, Any] = jsonable(
            {
                "version": VERSION,
                "run": str(self.run.folder.path),
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "task": self.run.recipe.task.kind,
                "data": dict(self.data),
                "settings": settings | {"overrides": list(self.overrides)},
                "intervals": whole.method,
                "metrics": _bounded(self.scored.metrics(), whole.bounds),
                "slices": {column: [_slice(part) for part in parts] for column, parts in self.slices.items()},
                "slices_not_shown": {
                    column: {"slices": count, "rows": rows} for column, (count, rows) in self.unsliced.items()
                },
                "against": [_versus(versus) for versus in self.against],
            }
        )
        return made

    def write(self, document: Mapping[str, Any], key: Sequence[str]) -> Path:
        """Keep the document; the same evaluation made again replaces it.

        Args:
            document: What `as_json` gave.
            key: What identifies the rows.

        Raises:
            StorageError: It can't be written.
        """
        settings = [*key, *self.overrides, *self.slices, *(versus.name for versus in self.against)]
        return write(self.run.folder.path, self.title, document, settings)


def write(run: Path, title: str, document: Mapping[str, Any], key: Sequence[str]) -> Path:
    """Write `RUN/evaluations/TITLE-HASH.json`.

    Args:
        run: The run folder.
        title: Of which the name is made.
        document: What it holds.
        key: What makes it another evaluation.

    Raises:
        StorageError: It can't be written.
    """
    folder = run / FOLDER
    digest = hashlib.sha256(json.dumps(list(key)).encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]+", "-", title).strip("-.")[:60] or "data"
    file = folder / f"{name}-{digest}.json"
    try:
        folder.mkdir(exist_ok=True)
        write_atomically(file, json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise StorageError(f"{file} can't be written: {error.strerror or error}") from error
    return file


def _bounded(metrics: Mapping[str, float], bounds: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Each metric with its interval, where it has one."""
    found = {}
    for name, value in metrics.items():
        found[name] = {"value": value}
        if name in bounds:
            found[name]["low"], found[name]["high"] = bounds[name]
    return found


def _slice(part: Slice) -> dict[str, Any]:
    metrics = _bounded(part.scored.metrics(), part.scored.intervals().bounds)
    return {"value": part.value, "rows": len(part.scored.numbers), "metrics": metrics}


def _versus(versus: Versus) -> dict[str, Any]:
    return {
        "name": versus.name,
        "rows": versus.rows,
        "metrics": dict(versus.metrics),
        "differences": _bounded(versus.differences, versus.bounds),
        "mcnemar": None if versus.mcnemar is None else asdict(versus.mcnemar),
        "notes": versus.notes,
    }


# An evaluation's document as text for a terminal, or as markdown.

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
    found = list(_tables(document, headline, everything=everything, narrow=form == "text" and text.width() < WIDE))
    head = _head(document)
    if form == "markdown":
        blocks = [f"**{text.cell(title)}**\n\n{text.markdown(heads, rows)}" for title, heads, rows in found]
        return "\n\n".join([text.cell(head), *blocks, *(text.cell(note) for note in _notes(document))])
    lines = [printable(head)]
    for title, heads, rows in found:
        lines += ["", *text.text([title, *heads[1:]], [rows])]
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
            [name, text.number(versus["metrics"][name]), *_value(versus["differences"][name], signed=True)]
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
    bounds = f"{text.number(metric['low'])} .. {text.number(metric['high'])}" if "low" in metric else "-"
    return [sign + text.number(float(metric["value"])), bounds]


def _short(metric: Mapping[str, Any] | None, narrow: bool) -> str:
    if metric is None:
        return "-"
    value, bounds = _value(metric)
    return value if bounds == "-" or narrow else f"{value} ({bounds})"
