"""Lines for the terminal: data, model and plan while a run starts, and its summary at the end."""

from __future__ import annotations

import importlib.util
import shlex
from typing import TYPE_CHECKING

from hf_finetune.recipe import Recipe
from hf_finetune.tasks import _likeness as likeness
from hf_finetune.terminal import clock
from hf_finetune.tracking.journal import Entry

if TYPE_CHECKING:
    from hf_finetune.batching import Division
    from hf_finetune.data import Prepared
    from hf_finetune.job import Length
    from hf_finetune.runreport.outcome import Outcome


def data_lines(prepared: Prepared) -> list[str]:
    """Count rows and tokens of each split, and everything that was cut or dropped; then the labels."""
    lines = []
    for split, counts in prepared.reports.items():
        parts = [f"{counts.kept:,} rows", f"{counts.tokens:,} tokens"]
        parts += [f"{counts.trained:,} trained"] if counts.trained != counts.kept else []
        parts.append(f"longest {counts.longest:,}")
        losses = (
            (counts.cut, "cut to max_length"),
            (counts.dropped, "dropped as over-long"),
            (counts.empty, "dropped without text"),
            (counts.untrained, "dropped without a trained token"),
            (counts.unused, "never drawn from the mix"),
        )
        parts += [f"{count:,} {loss}" for count, loss in losses if count]
        lines.append(f"{split}: {', '.join(parts)}")
    # Not `targets.counts`, which has the rows that are dropped too.
    labels = prepared.facts["train"].labels if "train" in prepared.facts else {}
    if labels:
        lines.append("labels: " + ", ".join(f"{likeness.plain(name)} {count:,}" for name, count in labels.items()))
    return lines


def model_line(recipe: Recipe, parameters: tuple[int, int]) -> str:
    """Name the model, and how much of it is trained."""
    trained, total = parameters
    share = f"{trained:,} trained by {recipe.adapter.kind} ({trained / total:.2%})"
    return f"model {recipe.model.name}: {total:,} parameters, {share}"


def plan_line(division: Division, length: Length) -> str:
    """Say how the global batch is divided, and how many steps there are."""

    def counted(number: int, thing: str) -> str:
        plural = "" if number == 1 else "es" if thing.endswith("h") else "s"
        return f"{number:,} {thing}{plural}"

    return (
        f"{counted(length.total_steps, 'step')} of {division.batch_size} rows: {counted(division.world_size, 'rank')}"
        f" x {counted(division.accumulation, 'micro-batch')} of up to {division.micro_batch}"
    )


def summary_entry(outcome: Outcome) -> Entry:
    """Make the row that closes metrics.jsonl."""
    trained, total = outcome.parameters
    row: Entry = {
        "step": outcome.steps,
        "phase": "summary",
        "seconds": round(outcome.seconds, 3),
        "probe_seconds": round(outcome.probe_seconds, 3),
        "trained_parameters": trained,
        "parameters": total,
        "device": outcome.machine.device,
        "world_size": outcome.machine.world_size,
    }
    if outcome.not_taken:
        row["steps_not_taken"] = outcome.not_taken
    if outcome.reload_difference is None:
        row["read_back"] = "equal"
    else:
        row["reload_difference"] = outcome.reload_difference
    if outcome.peak_memory is not None:
        row["peak_memory"] = outcome.peak_memory
    scores = {f"{split}_{name}": value for split, found in outcome.scores.items() for name, value in found.items()}
    return row | outcome.rates | scores


def summary_lines(outcome: Outcome) -> list[str]:
    """Write the table at the end of a run, and what to do next."""
    recipe, folder, rates = outcome.recipe, outcome.folder, outcome.rates
    part = f" from step {outcome.resumed_at:,} on, where the run was resumed" if outcome.resumed_at else ""
    rows = [("steps", f"{outcome.steps:,} in {clock(outcome.seconds)}{part}")]
    if outcome.not_taken:
        rows.append(("steps not taken", f"{outcome.not_taken:,}, as loss or gradient was not finite"))
    if rates:
        speed = f"{rates['samples_per_second']:.1f} samples/s, {rates['tokens_per_second']:.0f} tokens/s"
        rows.append(("speed", f"{speed}, {rates['padding_share']:.1%} padding"))
    if "matmul_share" in rates:
        share, peak = rates["matmul_share"], rates["matmul_peak"]
        rows.append(("matmul peak", f"{share:.1%} of {peak / 1e12:.3g} TFLOP/s, measured here"))
    if outcome.peak_memory is not None:
        rows.append(("peak memory", f"{outcome.peak_memory / 1e9:.2f} GB"))
    for split, scores in outcome.scores.items():
        rows.append((split, "  ".join(f"{name} {scores[name]:.4f}" for name in recipe.task.headline if name in scores)))
    if outcome.reload_difference is None:
        rows.append(("saved and read back", f"{folder.adapter} (every bit of the weights is equal)"))
    else:
        apart = f"logits differ by {outcome.reload_difference:.1e} of the largest"
        rows.append(("saved and reloaded", f"{folder.adapter} ({apart})"))
    page = f", {folder.page.name}" if recipe.tracking.report else ""
    rows += [("report", f"{folder.report}{page}"), ("run folder", str(folder.path))]
    if recipe.tracking.tensorboard:
        from hf_finetune.tracking.logdir import LogDir

        watch = f"tensorboard --logdir {shlex.quote(LogDir.of(recipe, folder).folder)}"
        is_installed = importlib.util.find_spec("tensorboard") is not None
        rows.append(("watch it with", watch if is_installed else f"pip install tensorboard; {watch}"))
    width = max(len(name) for name, _ in rows)
    return ["", *(f"  {name:<{width}}  {text}" for name, text in rows)]
