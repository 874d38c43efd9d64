"""The card below its header: sections in Markdown, every text of recipes, labels and data escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from hf_finetune import __version__
from hf_finetune.card import settings
from hf_finetune.card.naming import base, code, sources, title
from hf_finetune.runreport import told
from hf_finetune.runreport.markdown import cell, fenced, interval, number

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe
    from hf_finetune.runreport.remains import Remains
    from hf_finetune.runreport.told import Result
    from hf_finetune.tasks.base import Targets

CLASSES = 100
"""Labels that are listed."""
UNEVEN = 3.0
"""How many times the rows of the rarest label the commonest has, from which on that is told as a limit."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "datasets", "python")


def body(
    recipe: Recipe, targets: Targets, how: Sequence[str], run: Remains | None = None, pictures: Sequence[str] = ()
) -> list[str]:
    """Every part of the card but its header.

    Args:
        recipe: What was run.
        targets: Label names.
        how: Python that loads the model, and that uses it.
        run: How it did; None where that is not known.
        pictures: Of its charts, in Markdown.
    """
    kind = "An adapter for" if recipe.adapter.freezes_base else "A model trained from"
    return [
        f"# {title(recipe)}",
        f"{kind} {base(recipe)}. Trained by hf_finetune {__version__}.",
        *_labels(targets),
        *_how(how, _measured_on(recipe)),
        *(_results(run) if run is not None else []),
        *pictures,
        *(_limits(run, targets) if run is not None else []),
        *_training(recipe, run),
    ]


def _labels(targets: Targets) -> list[str]:
    if not targets.names:
        return []
    counts = targets.counts or ("",) * len(targets.names)
    rows = [[str(i), code(str(name)), str(n)] for i, (name, n) in enumerate(zip(targets.names, counts, strict=True))]
    more = [f"{len(rows) - CLASSES:,} more labels are in `labels.json`."] if len(rows) > CLASSES else []
    return [_table(["Id", "Label", "Training rows"], rows[:CLASSES]), *more]


def _how(blocks: Sequence[str], before: Sequence[str]) -> list[str]:
    where = "Run this in the folder of this file, or put its path or Hub id for `folder`."
    parts = ["## How to load it", where, *before, f"```python\n{blocks[0]}```"]
    return parts + [part for text in blocks[1:] if text for part in ("## How to use it", f"```python\n{text}```")]


def _measured_on(recipe: Recipe) -> list[str]:
    """That the code loads another base than the one that was measured, where the run had a quantised one."""
    kind = recipe.model.quantization
    if kind is None:
        return []
    what = f"It was trained, and every metric here measured, on the base quantised to {kind}."
    return [f"{what} This code loads the base as it is published, not quantised: that gives other numbers."]


def _results(run: Remains) -> list[str]:
    found = told.results(run)
    return ["## Results", *(part for result in found for part in _result(result))] if found else []


def _result(result: Result) -> list[str]:
    rows = [[cell(score.name), f"{score.value:.6g}", interval(score)] for score in result.scores]
    parts = [_table([result.split, "value", "95 % interval"], rows)]
    if result.classes:
        each = [
            [code(name), *("" if score is None else number(score) for score in scores)]
            for name, scores in result.classes[:CLASSES]
        ]
        parts.append(_table([f"{result.split}, by class", *told.PER_CLASS], each))
    return [*parts, *([f"Intervals: {result.method}."] if result.method else [])]


def _limits(run: Remains, targets: Targets) -> list[str]:
    """What became of the rows, and what the checks of the data counted."""
    lines = [cell(line) for line in (*told.fates(run), *_imbalance(targets))]
    for name, level, splits in told.findings(run):
        counted = ", ".join(f"{count:,} in {split}" for split, count in splits.items() if count)
        if counted:
            lines.append(f"check of the data `{name}` ({level}): {counted}")
    if not run.scores:
        lines.append("There was no held-out split: nothing is known of how good it is.")
    return ["## Limits", "\n".join(f"- {line}" for line in lines)] if lines else []


def _imbalance(targets: Targets) -> list[str]:
    counts = {str(name): count for name, count in zip(targets.names, targets.counts, strict=False)}
    if len(counts) < 2 or not max(counts.values()):
        return []
    common, rare = max(counts, key=lambda name: counts[name]), min(counts, key=lambda name: counts[name])
    if counts[common] < UNEVEN * counts[rare]:
        return []
    return [f"uneven labels: {counts[common]:,} rows of {common}, {counts[rare]:,} of {rare}"]


def _training(recipe: Recipe, run: Remains | None) -> list[str]:
    known = [f"[{part.source}](https://huggingface.co/datasets/{part.source})" for part in sources(recipe)]
    lines = [f"Data: {', '.join(dict.fromkeys(known)) or 'not on the Hub'}"]
    if run is not None:
        summary, environment = run.summary, dict(run.environment)
        lines += [f"{summary['step']:,} steps of {recipe.training.batch_size} rows"] if "step" in summary else []
        versions = [f"{name} {environment[name]}" for name in PACKAGES if name in environment]
        lines += [f"Versions: {cell(', '.join(versions))}"] if versions else []
    listed = "\n".join(f"- {line}" for line in lines)
    return ["## Training", listed, fenced(settings.public(recipe), "yaml")]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
