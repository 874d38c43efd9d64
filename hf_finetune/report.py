"""What a run says to people: lines while it starts, the summary at its end, and `report.md`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_finetune.runfolder import write_atomically
from hf_finetune.tracking.console import clock

if TYPE_CHECKING:
    from hf_finetune.arguments import Length
    from hf_finetune.batching import Division
    from hf_finetune.data import Prepared, SplitReport
    from hf_finetune.errors import Problem
    from hf_finetune.hardware import Machine
    from hf_finetune.recipe import Recipe
    from hf_finetune.runfolder import RunFolder
    from hf_finetune.tracking.journal import Entry


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    recipe: Recipe
    machine: Machine
    folder: RunFolder
    prepared: Prepared
    parameters: tuple[int, int]
    """Trained parameters, all parameters."""
    steps: int
    """Optimiser steps that were made."""
    seconds: float
    """Wall-clock seconds of training, evaluations in between included."""
    rates: dict[str, float] = field(default_factory=dict)
    """Whole-run samples and tokens per second, share of padding."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Final metrics per split."""
    warnings: tuple[Problem, ...] = ()
    """What the check before training found and did not refuse."""
    peak_memory: int | None = None
    """Most bytes that rank 0 had on its device (CPU: resident); None where that can't be known."""
    reload_difference: float = 0.0
    """Largest difference between the logits in memory and those of the saved model, relative to the largest logit."""


def data_lines(prepared: Prepared) -> list[str]:
    """One line a split: rows, tokens, and everything that was cut or dropped; then the labels."""
    lines = [f"{split}: {_split_line(counts)}" for split, counts in prepared.reports.items()]
    # Not `targets.counts`, which has the rows that are dropped too.
    labels = prepared.facts["train"].labels if "train" in prepared.facts else {}
    if labels:
        lines.append("labels: " + ", ".join(f"{name} {count:,}" for name, count in labels.items()))
    return lines


def _split_line(counts: SplitReport) -> str:
    losses = {
        "cut": f"{counts.cut:,} cut to max_length",
        "dropped": f"{counts.dropped:,} dropped as over-long",
        "empty": f"{counts.empty:,} dropped without text",
        "untrained": f"{counts.untrained:,} dropped without a trained token",
        "unused": f"{counts.unused:,} never drawn from the mix",
    }
    parts = [f"{counts.kept:,} rows", f"{counts.tokens:,} tokens"]
    if counts.trained != counts.kept:
        parts.append(f"{counts.trained:,} trained")
    parts.append(f"longest {counts.longest:,}")
    parts += [text for name, text in losses.items() if getattr(counts, name)]
    return ", ".join(parts)


def model_line(recipe: Recipe, parameters: tuple[int, int]) -> str:
    """The model and what of it is trained."""
    trained, total = parameters
    return (
        f"model {recipe.model.name}: {total:,} parameters, {trained:,} trained by {recipe.adapter.kind} "
        f"({trained / total:.2%})"
    )


def plan_line(division: Division, length: Length) -> str:
    """How the global batch is divided, and how many steps there are."""
    return (
        f"{_counted(length.total_steps, 'step')} of {division.batch_size} rows: {_counted(division.world_size, 'rank')}"
        f" x {_counted(division.accumulation, 'micro-batch')} of up to {division.micro_batch}"
    )


def _counted(number: int, thing: str) -> str:
    """`1 step`, `2 steps`, `2 micro-batches`."""
    plural = "" if number == 1 else "es" if thing.endswith("h") else "s"
    return f"{number:,} {thing}{plural}"


def summary_entry(outcome: Outcome) -> Entry:
    """The row that closes metrics.jsonl."""
    scores = {f"{split}_{name}": value for split, found in outcome.scores.items() for name, value in found.items()}
    trained, total = outcome.parameters
    facts: dict[str, Any] = {
        "step": outcome.steps,
        "phase": "summary",
        "seconds": round(outcome.seconds, 3),
        "trained_parameters": trained,
        "parameters": total,
        "reload_difference": outcome.reload_difference,
    }
    if outcome.peak_memory is not None:
        facts["peak_memory"] = outcome.peak_memory
    return facts | outcome.rates | scores


def summary_lines(outcome: Outcome) -> list[str]:
    """The table at the end of a run, and what to do next."""
    rows = [("steps", f"{outcome.steps:,} in {clock(outcome.seconds)}")]
    if outcome.rates:
        speed = (
            f"{outcome.rates['samples_per_second']:.1f} samples/s, {outcome.rates['tokens_per_second']:.0f} tokens/s"
        )
        rows.append(("speed", f"{speed}, {outcome.rates['padding_share']:.1%} padding"))
    if outcome.peak_memory is not None:
        rows.append(("peak memory", f"{outcome.peak_memory / 1e9:.2f} GB"))
    for split, scores in outcome.scores.items():
        shown = [f"{name} {scores[name]:.4f}" for name in outcome.recipe.task.headline if name in scores]
        rows.append((split, "  ".join(shown)))
    rows += [
        ("saved and reloaded", f"{outcome.folder.adapter} (logits equal to {outcome.reload_difference:.1e})"),
        ("report", str(outcome.folder.report)),
        ("run folder", str(outcome.folder.path)),
        ("watch it with", f"tensorboard --logdir {outcome.folder.tensorboard}"),
    ]
    width = max(len(name) for name, _ in rows)
    return ["", *(f"  {name:<{width}}  {text}" for name, text in rows)]


def write(outcome: Outcome, entries: list[Entry]) -> None:
    """Write report.md: what was trained on what, what was cut or dropped, how it did."""
    recipe, length = outcome.recipe, [line for line in entries if line["phase"] == "eval"]
    parts = [
        f"# {recipe.output}",
        model_line(recipe, outcome.parameters) + f"; {outcome.machine.describe()}.",
        "## Data",
        "\n".join(f"- {line}" for line in data_lines(outcome.prepared)),
        "## Findings",
        *_findings(outcome),
        "## Result",
        "\n".join(f"- {line.strip()}" for line in summary_lines(outcome) if line),
        *[_scores_table(split, scores) for split, scores in outcome.scores.items()],
    ]
    if length:
        parts += ["## Evaluations", _evaluations_table(length, recipe.task.headline)]
    parts += ["## Recipe", f"```yaml\n{recipe.dump()}```"]
    write_atomically(outcome.folder.report, "\n\n".join(parts) + "\n")


def _findings(outcome: Outcome) -> list[str]:
    """Everything that `data.checks` counted, whatever its level, and the warnings."""
    facts = outcome.prepared.facts
    levels = outcome.recipe.data.checks.model_dump()
    names = [name for name in levels if any(name in split.tallies for split in facts.values())]
    if not names:
        return ["None of `data.checks` found anything."]
    head = [f"| check | level | {' | '.join(facts)} |", "|---" * (len(facts) + 2) + "|"]
    rows = [
        f"| {name} | {levels[name]} | "
        + " | ".join(f"{split.tallies[name].count:,}" if name in split.tallies else "0" for split in facts.values())
        + " |"
        for name in names
    ]
    parts = ["\n".join(head + rows)]
    if outcome.warnings:
        parts.append("\n".join(f"- {cell(str(problem))}" for problem in outcome.warnings))
    return parts


def _scores_table(split: str, scores: dict[str, float]) -> str:
    lines = [f"| {split} | value |", "|---|---|", *(f"| {cell(k)} | {v:.6g} |" for k, v in scores.items())]
    return "\n".join(lines)


def _evaluations_table(entries: list[Entry], headline: tuple[str, ...]) -> str:
    names = [name for name in headline if name in entries[-1]]
    head = [f"| step | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    rows = [
        f"| {line['step']} | " + " | ".join(f"{line.get(n, float('nan')):.4f}" for n in names) + " |"
        for line in entries
    ]
    return "\n".join(head + rows)


def cell(text: str) -> str:
    """Text from data or labels, made safe for a markdown table."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
