"""Which charts a run has: one list for the page and for the PNG files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from hf_finetune import charts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hf_finetune.records import Record
    from hf_finetune.runreport.remains import Remains

SECTIONS = ("curves", "predictions", "tokens", "layers", "speed")
SHARES = ("accuracy", "f1_macro", "matthews", "token_accuracy", "exact_match")
"""Metrics with one scale, which share a chart."""
ERRORS = ("mse", "mae")
LEARNED = ("update_to_weight", "norm_b", "gradient_norm")
"""What tells how much a module learned; the first of them that was measured is drawn."""


@dataclass(frozen=True)
class Chart:
    """One chart of the report."""

    name: str
    """Of its file, without `.png`."""
    section: str
    """Where it is shown, one of `SECTIONS`."""
    title: str
    about: str
    """For people who do not see it."""
    draw: Callable[[], Figure]


def of(run: Remains) -> list[Chart]:
    """The charts that the run has data for, in the order of the page."""
    return [*_curves(run), *(chart for split in run.phases for chart in _predictions(run, split)), *_layers(run)]


def _curves(run: Remains) -> Iterator[Chart]:
    lines = [line for line in run.lines if line.get("phase") in ("train", "eval")]
    wanted: list[tuple[str, str, str, Sequence[str]]] = [
        ("loss", "curves", "Loss", ["loss"]),
        ("scores", "curves", "Scores on validation", _measured(run, "eval", SHARES)),
        ("errors", "curves", "Errors on validation", _measured(run, "eval", ERRORS)),
        ("learning_rate", "curves", "Learning rate", ["learning_rate"]),
        ("grad_norm", "curves", "Gradient norm", _measured(run, "train", ("grad_norm", "grad_norm_clipped"))),
        ("tokens_per_second", "speed", "Tokens a second", ["tokens_per_second"]),
    ]
    for name, section, title, quantities in wanted:
        if any(quantity in line for line in lines for quantity in quantities):
            about = f"Line chart over the steps: {', '.join(quantities)}"
            yield Chart(name, section, title, about, partial(charts.curves, lines, quantities))
    if any("seconds_data" in line for line in lines):
        about = "Area chart: seconds of a step, split into data, forward, backward and optimizer"
        yield Chart("seconds", "speed", "Time of a step", about, lambda: charts.seconds(lines))


def _measured(run: Remains, phase: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if any(name in line for line in run.of(phase))]


def _predictions(run: Remains, split: str) -> Iterator[Chart]:
    """Charts of one split's predictions; of tasks that are not known here, none."""
    found = run.record("positions", split)
    if found is not None:
        yield _of_positions(found, split)
    record = run.record("predictions", split)
    if record is None:
        return
    rows, names = record.arrays["rows"], [str(name) for name in record.facts.get("names") or ()]
    problem = record.facts.get("problem")
    if problem == "single_label":
        about = f"Confusion matrix of {len(names)} classes; the numbers of each class are in a table"
        yield _chart("confusion", split, "Confusion matrix", about, lambda: charts.confusion(rows, names))
        about = "Bar chart: how often predictions of each confidence are right"
        yield _chart("reliability", split, "Calibration", about, lambda: charts.reliability(rows))
    if problem in ("single_label", "multi_label"):
        about = "Line chart: precision by recall of each class"
        yield _chart(
            "precision_recall", split, "Precision and recall", about, lambda: charts.precision_recall(rows, names)
        )
    if problem == "regression":
        yield _chart("predicted", split, "Predicted and true", "Scatter plot", lambda: charts.predicted(rows))


def _chart(name: str, split: str, title: str, about: str, draw: Callable[[], Figure]) -> Chart:
    return Chart(f"{name}-{split}", "predictions", f"{title}, {split}", f"{about} ({split})", draw)


def _of_positions(record: Record, split: str) -> Chart:
    about = f"Line chart: mean loss of the tokens at each position of a sequence ({split})"
    return Chart(f"positions-{split}", "tokens", f"Loss by position, {split}", about, lambda: charts.positions(record))


def _layers(run: Remains) -> Iterator[Chart]:
    quantity, scalars = learned(run)
    if quantity:
        about = f"Bar chart: {quantity} of the modules where it is largest; the numbers are in a table"
        title = quantity.replace("_", " ").capitalize()
        yield Chart("layers", "layers", title, about, lambda: charts.modules(scalars, quantity))


def learned(run: Remains) -> tuple[str, dict[str, float]]:
    """Which quantity tells how much each module learned, and the scalars; ("", {}) where nothing was measured."""
    for phase in ("final", "eval"):
        record = run.records.get(("weights", phase))
        scalars = dict(record.facts.get("scalars") or {}) if record is not None else {}
        for quantity in LEARNED:
            if any(name.startswith(f"{quantity}/") for name in scalars):
                return quantity, scalars
    return "", {}
