"""`report.md`: what was trained on what, how it did, what was cut or dropped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from hf_finetune.pages.escaping import harmless, shortened
from hf_finetune.runreport import lines, told

if TYPE_CHECKING:
    from hf_finetune.charts.drawing import Plot
    from hf_finetune.runreport.remains import Remains
    from hf_finetune.tracking.journal import Entry

TEXT_CHARACTERS = 300


def text(run: Remains, charts: Sequence[Plot]) -> str:
    """The report as Markdown.

    Args:
        run: What there is.
        charts: Those that are in `plots/`.
    """
    recipe, outcome = run.recipe, run.outcome
    parts = [f"# {cell(recipe.output)}"]
    if outcome is not None:
        parts.append(lines.model_line(recipe, outcome.parameters) + f"; {outcome.machine.describe()}.")
    parts += _listed("", told.trained(run))
    parts += ["## Data", _bullets(told.fates(run)) or "What became of the rows is not known any more."]
    parts += ["## Findings", *_findings(run)]
    parts += ["## Result", *_results(run), _bullets(line.strip() for line in _summary(run))]
    parts += [f"![{chart.title}](plots/{chart.name}.png)" for chart in charts]
    parts += _evaluations(run.of("eval"), recipe.task.headline)
    parts += [part for split in run.phases for part in _mistakes(run, split)]
    parts += _samples(run)
    parts += _modules(run)
    parts += _listed("## Time and cost", told.cost(run))
    if run.loading:
        where = f"in `{run.folder.adapter}`, or with its path for `folder`"
        parts += ["## How to load it", f"Run this {where}.", f"```python\n{run.loading}```"]
    parts += ["## What is missing", _bullets(run.missing)] if run.missing else []
    parts += _listed("## Environment", run.environment)
    parts += ["## Recipe", fenced(recipe.dump(), "yaml")]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(run: Remains) -> list[str]:
    return [line for line in lines.summary_lines(run.outcome) if line] if run.outcome is not None else []


def _listed(title: str, rows: Iterable[tuple[str, str]]) -> list[str]:
    body = _bullets(f"{name}: {value}" for name, value in rows)
    return [part for part in (title, body) if part] if body else []


def _bullets(texts: Iterable[str]) -> str:
    return "\n".join(f"- {cell(text)}" for text in texts)


def _findings(run: Remains) -> list[str]:
    """Everything that `data.checks` counted, whatever its level, and the warnings."""
    struck = told.findings(run)
    if not struck:
        parts = ["None of `data.checks` found anything."] if run.outcome is not None else ["Not known any more."]
    else:
        rows = [[name, level, *(f"{count:,}" for count in splits.values())] for name, level, splits in struck]
        parts = [_table(["check", "level", *struck[0][2]], rows)]
    if run.outcome is not None and run.outcome.warnings:
        parts.append(_bullets(str(problem) for problem in run.outcome.warnings))
    return parts


def _results(run: Remains) -> list[str]:
    parts: list[str] = []
    for result in told.results(run):
        rows = [[score.name, f"{score.value:.6g}", interval(score)] for score in result.scores]
        parts.append(_table([result.split, "value", "95 % interval"], rows))
        if result.classes:
            body = [
                [name, *("" if score is None else number(score) for score in scores)] for name, scores in result.classes
            ]
            parts.append(_table([f"{result.split}, by class", *told.PER_CLASS], body))
        if result.method:
            parts.append(f"Intervals: {result.method}.")
    return parts


def interval(score: told.Score) -> str:
    """`0.812 to 0.874`, or nothing."""
    return "" if score.bounds is None else f"{score.bounds[0]:.4g} to {score.bounds[1]:.4g}"


def number(score: told.Score) -> str:
    """A score of a class; rows are whole."""
    return f"{score.value:,.0f}" if score.name.startswith("support.") else f"{score.value:.4f}"


def _evaluations(entries: list[Entry], headline: tuple[str, ...]) -> list[str]:
    if not entries:
        return []
    names = [name for name in headline if name in entries[-1]]
    rows = [[str(line["step"]), *(f"{line.get(name, float('nan')):.4f}" for name in names)] for line in entries]
    return ["## Evaluations", _table(["step", *names], rows)]


def _mistakes(run: Remains, split: str) -> list[str]:
    record = run.record("examples", split)
    rows = record.facts.get("rows") if record is not None else None
    if not rows:
        return []
    body = [
        [str(row["row"]), row["label"], row["predicted"], f"{row['confidence']:.3g}", _cut(row["text"])] for row in rows
    ]
    return [f"## Worst mistakes on {split}", _table(["row", "label", "predicted", "confidence", "text"], body)]


def _samples(run: Remains) -> list[str]:
    last = [sample for sample in run.samples if sample["step"] == run.samples[-1]["step"]]
    if not last:
        return []
    rows = [[_cut(sample["prompt"]), _cut(sample["answer"]), "yes" if sample["ended"] else "no"] for sample in last]
    return [f"## Samples at step {last[0]['step']}", _table(["prompt", "answer", "ended by itself"], rows)]


def _modules(run: Remains) -> list[str]:
    quantity, found = told.modules(run)
    if not found:
        return []
    return ["## What learned most", _table(["module", quantity], [[name, f"{value:.4g}"] for name, value in found])]


def _cut(text: Any) -> str:
    return shortened(harmless(str(text)), TEXT_CHARACTERS)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines_ = ["| " + " | ".join(cell(name) for name in head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines_, *("| " + " | ".join(cell(value) for value in row) + " |" for row in rows)])


def fenced(text: str, language: str) -> str:
    """A block of code that nothing in it can end."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def cell(text: str) -> str:
    """Text from data or labels, made safe for a markdown table: one line, no markup, no links, no images."""
    shown = harmless(text.replace("\n", " ").replace("\\", "\\\\"))
    for mark in "|[`":
        shown = shown.replace(mark, f"\\{mark}")
    return shown.replace("<", "&lt;")
