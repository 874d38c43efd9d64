"""What a run says in lines: about its data, model and plan while it starts, and its summary at the end."""

from __future__ import annotations

import importlib.util
import shlex
from typing import TYPE_CHECKING, Any

from hf_finetune.tasks import _likeness as likeness
from hf_finetune.terminal import clock

if TYPE_CHECKING:
    from hf_finetune.arguments import Length
    from hf_finetune.batching import Division
    from hf_finetune.data import Prepared, SplitReport
    from hf_finetune.recipe import Recipe
    from hf_finetune.runreport.outcome import Outcome
    from hf_finetune.tracking.journal import Entry


def data_lines(prepared: Prepared) -> list[str]:
    """One line a split: rows, tokens, and everything that was cut or dropped; then the labels."""
    lines = [f"{split}: {_split_line(counts)}" for split, counts in prepared.reports.items()]
    # Not `targets.counts`, which has the rows that are dropped too.
    labels = prepared.facts["train"].labels if "train" in prepared.facts else {}
    if labels:
        lines.append("labels: " + ", ".join(f"{likeness.plain(name)} {count:,}" for name, count in labels.items()))
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
        "probe_seconds": round(outcome.probe_seconds, 3),
        "trained_parameters": trained,
        "parameters": total,
        "device": outcome.machine.device,
        "world_size": outcome.machine.world_size,
    }
    if outcome.not_taken:
        facts["steps_not_taken"] = outcome.not_taken
    if outcome.reload_difference is None:
        facts["read_back"] = "equal"
    else:
        facts["reload_difference"] = outcome.reload_difference
    if outcome.peak_memory is not None:
        facts["peak_memory"] = outcome.peak_memory
    return facts | outcome.rates | scores


def summary_lines(outcome: Outcome) -> list[str]:
    """The table at the end of a run, and what to do next."""
    part = f" from step {outcome.resumed_at:,} on, where the run was resumed" if outcome.resumed_at else ""
    rows = [("steps", f"{outcome.steps:,} in {clock(outcome.seconds)}{part}")]
    if outcome.not_taken:
        rows.append(("steps not taken", f"{outcome.not_taken:,}, as loss or gradient was not finite"))
    if outcome.rates:
        speed = (
            f"{outcome.rates['samples_per_second']:.1f} samples/s, {outcome.rates['tokens_per_second']:.0f} tokens/s"
        )
        rows.append(("speed", f"{speed}, {outcome.rates['padding_share']:.1%} padding"))
    if "matmul_share" in outcome.rates:
        share, peak = outcome.rates["matmul_share"], outcome.rates["matmul_peak"]
        rows.append(("matmul peak", f"{share:.1%} of {peak / 1e12:.3g} TFLOP/s, measured here"))
    if outcome.peak_memory is not None:
        rows.append(("peak memory", f"{outcome.peak_memory / 1e9:.2f} GB"))
    for split, scores in outcome.scores.items():
        shown = [f"{name} {scores[name]:.4f}" for name in outcome.recipe.task.headline if name in scores]
        rows.append((split, "  ".join(shown)))
    page = f", {outcome.folder.page.name}" if outcome.recipe.tracking.report else ""
    if outcome.reload_difference is None:
        saved = ("saved and read back", f"{outcome.folder.adapter} (every bit of the weights is equal)")
    else:
        apart = f"logits differ by {outcome.reload_difference:.1e} of the largest"
        saved = ("saved and reloaded", f"{outcome.folder.adapter} ({apart})")
    rows += [
        saved,
        ("report", f"{outcome.folder.report}{page}"),
        ("run folder", str(outcome.folder.path)),
        *_how_to_watch(outcome),
    ]
    width = max(len(name) for name, _ in rows)
    return ["", *(f"  {name:<{width}}  {text}" for name, text in rows)]


def _how_to_watch(outcome: Outcome) -> list[tuple[str, str]]:
    """The command that shows the events, where there are any."""
    if not outcome.recipe.tracking.tensorboard:
        return []
    from hf_finetune.tracking.board.place import Place

    command = f"tensorboard --logdir {shlex.quote(Place.of(outcome.recipe, outcome.folder).folder)}"
    is_installed = importlib.util.find_spec("tensorboard") is not None
    return [("watch it with", command if is_installed else f"pip install tensorboard; {command}")]
