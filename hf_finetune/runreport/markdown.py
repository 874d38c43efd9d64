"""`report.md`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from hf_finetune.charts.drawing import Plot
from hf_finetune.pages.escaping import harmless, shortened
from hf_finetune.runreport import content
from hf_finetune.runreport.content import Result
from hf_finetune.runreport.remains import RunData
from hf_finetune.tables import bullets, cell, fenced, markdown


def text(run: RunData, plots: Sequence[Plot]) -> str:
    """Write the report.

    Args:
        run: What is known of the run.
        plots: Those that are in `plots/`.
    """
    found = content.of(run)
    facts, names = found["facts"], found["evaluated"]
    blocks = [f"# {cell(run.recipe.output)}", *listed("", [*found["summary"], *found["setup"]])]
    blocks += ["## Data", bullets(facts.get("rows", ())) or "What became of the rows is not known any more."]
    blocks.append("## Findings")
    if facts:
        # Everything that `data.checks` counted, whatever its level.
        rows = [[name, level, *(f"{n:,}" for n in splits.values())] for name, level, splits in facts["findings"]]
        heads = ["check", "level", *(facts["findings"][0][2] if rows else ())]
        blocks.append(markdown(heads, rows) if rows else "None of `data.checks` found anything.")
        blocks.append(bullets(facts["warnings"]))
    else:
        blocks.append("Not known any more.")
    blocks += ["## Result", *(block for result in found["results"] for block in tables_of(result))]
    blocks += [f"![{plot.title}](plots/{plot.name}.png)" for plot in plots]
    if found["evaluations"]:
        rows = [
            [str(line["step"]), *(f"{line.get(name, float('nan')):.4f}" for name in names)]
            for line in found["evaluations"]
        ]
        blocks += ["## Evaluations", markdown(["step", *names], rows)]
    for split, mistakes in found["mistakes"]:
        rows = [
            [str(row["row"]), row["label"], row["predicted"], f"{row['confidence']:.3g}", _cut(row["text"])]
            for row in mistakes
        ]
        blocks.append(f"## Worst mistakes on {split}")
        blocks.append(markdown(["row", "label", "predicted", "confidence", "text"], rows))
    for step, samples in found["samples"][:1]:
        rows = [[_cut(each["prompt"]), _cut(each["answer"]), "yes" if each["ended"] else "no"] for each in samples]
        blocks += [f"## Samples at step {step}", markdown(["prompt", "answer", "ended by itself"], rows)]
    if found["modules"]:
        rows = [[name, f"{value:.4g}"] for name, value in found["modules"]]
        blocks += ["## What learned most", markdown(["module", found["quantity"]], rows)]
    blocks += listed("## Time and cost", found["cost"])
    if found["loading"]:
        place = f"in `{run.folder.adapter}`, or with its path for `folder`"
        blocks += ["## How to load it", f"Run this {place}.", fenced(found["loading"], "python")]
    blocks += ["## What is missing", bullets(found["missing"])] if found["missing"] else []
    blocks += listed("## Environment", found["environment"])
    blocks += ["## Recipe", fenced(run.recipe.dump(), "yaml")]
    return "\n\n".join(block for block in blocks if block) + "\n"


def tables_of(result: Result, most_classes: int | None = None) -> list[str]:
    """Write the scores of a split, overall and by class, with their intervals."""
    rows = [
        [name, f"{value:.6g}", "{:.4g} to {:.4g}".format(*result.bounds[name]) if name in result.bounds else ""]
        for name, value in result.overall.items()
    ]
    blocks = [markdown([result.split, "value", "95 % interval"], rows)]
    if result.classes:
        formats = dict.fromkeys(content.PER_CLASS, "{:.4f}") | {"support": "{:,.0f}"}
        rows = []
        for name in result.classes[:most_classes]:
            values = {column: result.scores.get(f"{column}.{name}") for column in content.PER_CLASS}
            rows.append([name, *("" if v is None else formats[column].format(v) for column, v in values.items())])
        blocks.append(markdown([f"{result.split}, by class", *content.PER_CLASS], rows))
    return [*blocks, *([f"Intervals: {result.method}."] if result.method else [])]


def listed(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    """Write names and values below a title; nothing without them."""
    body = bullets(f"{name}: {value}" for name, value in rows)
    return [title, body] if body else []


def _cut(value: Any) -> str:
    return shortened(harmless(str(value)), 300)
