"""The verdict on a run, at a glance: its headline metric with an interval, beside yardsticks, and what to try next.

Everything is read off the run folder; where a fact is missing, nothing is said about it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from hf_finetune.log.text import number
from hf_finetune.reports.intervals import CONFIDENCE
from hf_finetune.reports.outcome import macro_over
from hf_finetune.reports.run import RunData, results
from hf_finetune.tasks._catalogue import METRICS, Metric
from hf_finetune.tracking import predictions

# Share of the least loss on validation by which the last one is above it, where more epochs did harm; and share of the
# loss before by which the last evaluation improved, where more would do good.
ROSE, FELL = 0.02, 0.05
# Share of training rows that are cut, from which on it is worth a word.
CUT = 0.01
# Width of the interval of a share, from which on small improvements can't be seen.
WIDE = 0.1
# Share of generated answers that should end by themselves, and labels that are named.
ENDED, NAMED = 0.9, 3

Yardstick = tuple[str, str, Mapping[str, float]]
"""Name, split and metrics."""


def of(run: RunData) -> dict[str, Any]:
    """Collect what both reports show of it."""
    yardsticks = list(untrained(run))
    shown = headline(run, yardsticks)
    return {"headline": shown, "untrained": yardsticks, "hints": list(hints(run, shown))}


def headline(run: RunData, yardsticks: Iterable[Yardstick]) -> dict[str, Any] | None:
    """Choose the number that says most of the run, on the test split where there is one; None for a run without scores.

    Args:
        run: The run.
        yardsticks: See `untrained`.

    Returns:
        `metric`, `split`, `value`, `bounds` (None where it has none), `over`: see `macro_over`, `sentence`: all of
        these, `is_share`; `others`: name, split and value of it on other splits, and of other metrics; `yardsticks`:
        name, and its value for a model that learned nothing.
    """
    if not (found := results(run)):
        return None
    last, printed = found[-1], [name for name in run.recipe.task.headline if name in found[-1].scores]
    # The metric that chose the best checkpoint, else the first that the task prints after the loss.
    ordered = [run.recipe.training.best_metric, *(name for name in printed if name != "loss"), *printed]
    metric = next((name for name in ordered if name in last.scores), None)
    if metric is None:
        return None
    value, bounds = last.scores[metric], last.intervals.bounds.get(metric)
    sure = f" ({CONFIDENCE:.0%} interval {number(bounds[0])} to {number(bounds[1])})" if bounds else ""
    over = macro_over(last.scores) if metric.endswith("_macro") else ""
    return {
        "metric": metric,
        "split": last.split,
        "value": value,
        "bounds": bounds,
        "sentence": f"{metric} on {last.split}: {number(value)}{sure}" + (f"; {over}" if over else ""),
        "over": over,
        "is_share": METRICS.get(metric, Metric()).is_share,
        "others": [
            *((metric, one.split, one.scores[metric]) for one in found[:-1] if metric in one.scores),
            *((name, last.split, last.scores[name]) for name in printed if name != metric),
        ],
        "yardsticks": [(f"{name}, {split}", scores[metric]) for name, split, scores in yardsticks if metric in scores],
    }


def untrained(run: RunData) -> Iterator[Yardstick]:
    """Yield yardsticks, as name, split and metrics: the model before training, and one that reads no row."""
    first = next((line for line in run.of("eval") if line["step"] == 0), None)
    if first is not None and run.phases.get("validation"):
        yield "before training", "validation", {k: v for k, v in first.items() if isinstance(v, int | float)}
    data, split = run.records.get(("data", "train")), next(reversed(run.phases), "")
    record = run.record("predictions", split)
    if data is not None and record is not None:
        labels, rows = data.facts.get("labels", {}).get("train") or {}, data.facts.get("kept", {}).get("train", 0)
        of_rows = predictions.of(record)
        blind = of_rows.blind([labels.get(name, 0) for name in of_rows.names], rows)
        if blind is not None and (sums := blind[1].sums()) is not None:
            yield blind[0], split, sums.whole()


def hints(run: RunData, shown: Mapping[str, Any] | None) -> Iterator[str]:
    """Say what to try next, from facts at hand and the headline; nothing where nothing stands out."""
    seen = [(line["step"], line["loss"]) for line in run.of("eval") if line["step"] and "loss" in line]
    if len(seen) > 1:
        (best, least), (_, before), (last, loss) = min(seen, key=lambda pair: pair[1]), seen[-2], seen[-1]
        if loss > least * (1 + ROSE):
            keeps = ", or training.best_metric: loss, which keeps the best checkpoint"
            yield (
                f"The loss on validation was lowest at step {best:,} of {last:,} ({number(least)}), and rose to "
                f"{number(loss)}: try fewer epochs{keeps if run.recipe.training.best_metric is None else ''}."
            )
        elif best == last and loss < before * (1 - FELL):
            yield (
                f"The loss on validation still fell at the last evaluation, from {number(before)} to {number(loss)}: "
                "try more epochs."
            )
    data = run.records.get(("data", "train"))
    cut, kept = (data.facts.get(name, {}).get("train", 0) if data is not None else 0 for name in ("cut", "kept"))
    if kept and cut / kept >= CUT:
        yield (
            f"{cut:,} of {kept:,} training rows ({cut / kept:.1%}) are cut to data.max_length "
            f"{run.recipe.data.max_length:,}: try a larger one, if what matters may stand at the end."
        )
    if shown is None:
        return
    result, metric, value = results(run)[-1], shown["metric"], shown["value"]
    rows = {name: result.scores[f"support.{name}"] for name in result.classes}
    unit = run.recipe.task.support_is
    never = [f"{name} ({n:,.0f} {unit})" for name, n in rows.items() if n and result.scores.get(f"recall.{name}") == 0]
    if never:
        more = f" and {len(never) - NAMED:,} more labels" if len(never) > NAMED else ""
        weights = ", or task.class_weights: balanced" if run.recipe.task.remedy("imbalance") else ""
        listed = ", ".join(never[:NAMED])
        yield f"On {result.split}, nothing of {listed}{more} is recognised: try more rows with such labels{weights}."
    low, high = shown["bounds"] or (value, value)
    greater = METRICS.get(metric, Metric()).greater
    for name, bar in shown["yardsticks"]:
        if (greater is True and low <= bar) or (greater is False and high >= bar):
            yield (
                f"{metric} on {result.split} may be no better than “{name}” ({number(bar)}): look at the labels, and "
                "try more epochs or another training.learning_rate."
            )
    if shown["is_share"] and high - low > WIDE:
        sure = number((high - low) / 2)
        yield f"{metric} on {result.split} is only known to about {sure} either way: more rows there tell runs apart."
    if (ended := result.scores.get("ended")) is not None and ended < ENDED:
        yield f"{1 - ended:.0%} of the answers on {result.split} were cut off: try a larger limit of new tokens."
