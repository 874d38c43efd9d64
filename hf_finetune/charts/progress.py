"""Charts of a run's numbers over its steps, from the lines of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from math import isfinite
from typing import TYPE_CHECKING, Any

from hf_finetune.charts.paper import DASHES, LINE, SERIES, blank, drawn, legend
from hf_finetune.pages.escaping import harmless

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PHASES = ("train", "eval")
LOG_RATIO = 50.0
"""From the largest to the smallest value, from which on an axis is logarithmic."""
LINEAR = {"learning_rate"}
"""What is never shown on such an axis: schedules end near 0."""
NOISY = 60
"""Points from which on a curve is drawn smoothed, over its own values."""
SMOOTHING = 0.8
"""Weight of what was, as in TensorBoard: an exponential mean without its bias to the start (Kingma, Ba 2015)."""
AREAS = 200
"""Steps of a stacked chart; of more, every n-th."""
MARKED = 25
"""Points up to which each has a mark."""
MODULES = 20
"""Modules that are drawn: those with the largest values."""
MODULE_CHARACTERS = 44
TIMES = ("data", "forward", "backward", "optimizer")
"""What a step's time is split into: `seconds_<name>`."""


@drawn
def curves(lines: Iterable[Mapping[str, Any]], names: Sequence[str]) -> Figure:
    """One or several quantities over the steps, of training and of evaluation in one chart.

    The axis is logarithmic where all values are positive and far apart.

    Args:
        lines: Of metrics.jsonl.
        names: Quantities, e.g. `["loss"]`, or `["grad_norm", "grad_norm_clipped"]`.
    """
    figure, axes = blank(2.6)
    listed = list(lines)
    found = {(phase, name): _points(listed, phase, name) for phase in PHASES for name in names}
    drawn_ones = {key: points for key, points in found.items() if points}
    phases = {phase for phase, _ in drawn_ones}
    for index, ((phase, name), points) in enumerate(drawn_ones.items()):
        label = " ".join([phase] * (len(phases) > 1 or len(names) == 1) + [name] * (len(names) > 1))
        _curve(axes, points, index, label)
    values = [value for points in drawn_ones.values() for _, value in points]
    if values and not LINEAR & set(names) and min(values) > 0 and max(values) / min(values) > LOG_RATIO:
        axes.set_yscale("log")
        _plain_numbers(axes)
    else:
        axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(axis="y", color=LINE, linewidth=0.6)
    _steps(axes)
    axes.set_ylabel(", ".join(dict.fromkeys(name for _, name in drawn_ones)) or names[0])
    legend(axes)
    return figure


@drawn
def modules(scalars: Mapping[str, float], prefix: str) -> Figure:
    """Bars of one quantity by module, the largest first.

    Args:
        scalars: `<prefix>/<module>` -> value, as in a record of kind `weights`; other prefixes are left out.
        prefix: E.g. `update_to_weight`.
    """
    found = largest_modules(scalars, prefix)[:MODULES]
    figure, axes = blank(0.7 + 0.2 * max(len(found), 2))
    places = range(len(found))
    axes.barh(places, [value for _, value in found], height=0.72, color=SERIES[0])
    axes.set_yticks(places, [_ending(name) for name, _ in found], size=6.5)
    axes.invert_yaxis()
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    axes.set_xlabel(prefix.replace("_", " "))
    return figure


@drawn
def seconds(lines: Iterable[Mapping[str, Any]]) -> Figure:
    """What a training step spends its time on, over the steps, stacked; missing parts count as nothing.

    Args:
        lines: Of metrics.jsonl, with `seconds_data`, `seconds_forward`, ...
    """
    train = [line for line in lines if line.get("phase") == "train" and f"seconds_{TIMES[0]}" in line]
    train = train[:: max(1, -(-len(train) // AREAS))]
    steps = [line["step"] for line in train]
    parts = [[float(line.get(f"seconds_{name}", 0.0)) for line in train] for name in TIMES]
    figure, axes = blank(2.6)
    if steps:
        if len(steps) == 1:
            steps, parts = [0, *steps], [part * 2 for part in parts]
        axes.stackplot(steps, parts, labels=TIMES, colors=SERIES[: len(TIMES)], alpha=0.8)
    axes.set_ylim(bottom=0)
    _steps(axes)
    axes.set_ylabel("seconds a step")
    legend(axes, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def largest_modules(scalars: Mapping[str, float], prefix: str) -> list[tuple[str, float]]:
    """Module and value of every `<prefix>/<module>`, the largest first; what is no finite number is left out."""
    found = [
        (name.removeprefix(f"{prefix}/"), float(value))
        for name, value in scalars.items()
        if name.startswith(f"{prefix}/") and isinstance(value, int | float) and isfinite(value)
    ]
    return sorted(found, key=lambda pair: -pair[1])


def _points(lines: Sequence[Mapping[str, Any]], phase: str, name: str) -> list[tuple[int, float]]:
    """Step and value, where it is a finite number."""
    values = ((line["step"], line.get(name)) for line in lines if line.get("phase") == phase)
    return [(step, value) for step, value in values if isinstance(value, int | float) and isfinite(value)]


def _curve(axes: Axes, points: list[tuple[int, float]], index: int, label: str) -> None:
    """One curve; of many points a smoothed one, over the faint values."""
    steps, values = [step for step, _ in points], [value for _, value in points]
    ink: dict[str, Any] = {"color": SERIES[index % len(SERIES)]}
    if len(points) > NOISY and _is_noisy(values):
        axes.plot(steps, values, linewidth=0.7, alpha=0.35, **ink)
        values = _smoothed(values)
    mark = "o" if len(points) <= MARKED else ""
    axes.plot(
        steps,
        values,
        marker=mark,
        markersize=2.8,
        linewidth=1.5,
        linestyle=DASHES[index % len(DASHES)],
        label=label,
        **ink,
    )


def _steps(axes: Axes) -> None:
    """Whole numbers below the axis."""
    from matplotlib import ticker

    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
    axes.set_xlabel("step")


def _plain_numbers(axes: Axes) -> None:
    """`0.01` at the ticks of a logarithmic axis, not a formula."""
    from matplotlib import ticker

    axes.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())


def _is_noisy(values: Sequence[float]) -> bool:
    """Whether the values go up and down: their way is much longer than from the least to the most."""
    way = sum(abs(after - before) for before, after in pairwise(values))
    return way > 3 * (max(values) - min(values))


def _smoothed(values: Sequence[float]) -> list[float]:
    mean, out = 0.0, []
    for count, value in enumerate(values, start=1):
        mean = SMOOTHING * mean + (1 - SMOOTHING) * value
        out.append(mean / (1 - SMOOTHING**count))
    return out


def _ending(name: str) -> str:
    """The last characters of a module's name, which tell modules apart."""
    name = harmless(name)
    return name if len(name) <= MODULE_CHARACTERS else "…" + name[-MODULE_CHARACTERS + 1 :]
