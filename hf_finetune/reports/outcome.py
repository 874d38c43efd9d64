"""Lines that a run prints: of its data, model and plan as it starts, and of what it came to at its end."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_finetune import log
from hf_finetune.errors import Problem
from hf_finetune.log.lines import clock
from hf_finetune.log.text import number
from hf_finetune.recipe import Recipe
from hf_finetune.run.folder import RunFolder
from hf_finetune.run.journal import Entry
from hf_finetune.tasks import _likeness as likeness

if TYPE_CHECKING:
    from hf_finetune.data.job import Job
    from hf_finetune.data.prepare import Prepared
    from hf_finetune.device import Machine

MOST_LABELS = 10
"""Labels up to which a line counts all; of more, it has the `COMMONEST` and the `RAREST`."""
COMMONEST, RAREST = 5, 3


def data_lines(recipe: Recipe, prepared: Prepared, *, every_label: bool | None = None) -> list[str]:
    """Count rows and tokens of each split, and everything that was cut or dropped; then the labels.

    Args:
        recipe: Says what a row is made of.
        prepared: The data.
        every_label: Name all labels, however many there are; None does where `--verbose` was given.
    """
    lines = []
    for split, counts in prepared.reports.items():
        parts = [f"{counts.kept:,} {recipe.task.rows_are}"]
        parts += [f"{counts.tokens:,} tokens"] if recipe.task.token_ids else []
        parts += [f"{counts.trained:,} trained"] if counts.trained != counts.kept else []
        parts += [f"longest {counts.longest:,}"] if recipe.task.token_ids else []
        losses = (
            (counts.cut, "cut to max_length"),
            (counts.split, "over-long and split"),
            (counts.dropped, "dropped as over-long"),
            (counts.empty, "dropped without text"),
            (counts.untrained, "dropped without a trained token"),
            (counts.unused, "never drawn from the mix"),
        )
        parts += [f"{count:,} {loss}" for count, loss in losses if count]
        if (facts := prepared.facts.get(split)) is not None and (
            tally := facts.tallies.get("converted_chats")
        ) is not None:
            parts.append(f"{tally.count:,} {tally.detail}")
        lines.append(f"{split}: {', '.join(parts)}")
    # Not `targets.counts`, which has the rows that are dropped too.
    labels = prepared.facts["train"].labels if "train" in prepared.facts else {}
    if labels:
        is_all = log.is_verbose() if every_label is None else every_label
        lines.append("labels: " + _counted(labels, every_label=is_all))
    return lines


def _counted(labels: Mapping[str, int], *, every_label: bool) -> str:
    """Count how often each label is given; of many labels only the commonest and the rarest, unless all are wanted."""

    def named(pairs: Iterable[tuple[str, int]]) -> str:
        return ", ".join(f"{likeness.plain(name)} {count:,}" for name, count in pairs)

    if every_label or len(labels) <= MOST_LABELS:
        return named(labels.items())
    ranked = sorted(labels.items(), key=lambda pair: -pair[1])
    return (
        f"{len(labels):,}, most often {named(ranked[:COMMONEST])}, least often {named(ranked[-RAREST:])} "
        "(--verbose names them all)"
    )


def model_line(recipe: Recipe, parameters: tuple[int, int]) -> str:
    """Name the model, and how much of it is trained."""
    trained, total = parameters
    share = f"{trained:,} trained by {recipe.adapter.kind} ({trained / total:.2%})"
    return f"model {recipe.model.name}: {total:,} parameters, {share}"


def plan_line(job: Job) -> str:
    """Say how the global batch is divided, and how many steps there are; of running text, also passes and tokens."""
    division, length = job.division, job.length

    def counted(number: int, thing: str) -> str:
        plural = "" if number == 1 else "es" if thing.endswith("h") else "s"
        return f"{number:,} {thing}{plural}"

    seen = ""
    if job.task.is_running_text and length.steps_per_epoch:
        passes = length.total_steps / length.steps_per_epoch
        seen = f" ({passes:.3g} passes, about {job.prepared.reports['train'].tokens * passes:,.0f} tokens)"
    return (
        f"{counted(length.total_steps, 'step')} of {division.batch_size} rows{seen}: "
        f"{counted(division.world_size, 'rank')} x {counted(division.accumulation, 'micro-batch')} "
        f"of up to {division.micro_batch}"
    )


@dataclass(frozen=True)
class Outcome:
    """Results of a finished run."""

    recipe: Recipe
    machine: Machine
    folder: RunFolder
    prepared: Prepared
    parameters: tuple[int, int]
    """Trained parameters, all parameters."""
    steps: int
    seconds: float
    """Wall-clock seconds of training since it began or was resumed, evaluations in between included."""
    rates: dict[str, float] = field(default_factory=dict)
    """Whole-run samples and tokens per second, share of padding."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Final metrics per split."""
    kept: int | None = None
    """The step of the best checkpoint, which is what was saved; None where that is the last step's."""
    warnings: tuple[Problem, ...] = ()
    peak_memory: int | None = None
    """Most bytes that rank 0 had on its device (CPU: resident); None where that can't be known."""
    reload_difference: float | None = 0.0
    """Largest difference between the logits in memory and those of the saved model, relative to the largest logit.

    None where a second model would not fit (divided or quantised weights): every bit of the saved weights was compared.
    """
    probe_seconds: float = 0.0
    """Wall-clock seconds before training that went into choosing fast paths."""
    resumed_at: int = 0
    """The step from which this process went on; 0 if it began the run."""
    step_seconds: float = 0.0
    """Wall-clock seconds of all steps of the run, earlier processes included, without evaluations."""
    not_taken: int = 0
    """Steps that the optimiser did not take, because loss or gradient was not finite."""

    def facts(self) -> dict[str, Any]:
        """Collect what the report tells and no other file of the run folder does, as JSON holds it."""
        splits, levels = self.prepared.facts, self.recipe.data.checks.model_dump()
        struck = [name for name in levels if any(name in found.tallies for found in splits.values())]
        counts = {
            name: {split: found.tallies[name].count if name in found.tallies else 0 for split, found in splits.items()}
            for name in struck
        }
        return {
            "fingerprint": self.prepared.fingerprint,
            "rows": data_lines(self.recipe, self.prepared, every_label=True),
            "findings": [[name, str(levels[name]), counts[name]] for name in struck],
            "warnings": [str(problem) for problem in self.warnings],
            "signatures": dict(self.recipe.task.signatures()),
        }


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
    done = f"{outcome.steps:,} in {clock(outcome.seconds)}"
    if outcome.resumed_at:
        here, all_steps = outcome.steps - outcome.resumed_at, clock(outcome.step_seconds)
        done = f"{outcome.steps:,}: {here:,} in {clock(outcome.seconds)} since the run was resumed at step "
        done += f"{outcome.resumed_at:,}; all steps together took {all_steps}, evaluations not counted"
    rows = [("steps", done)]
    if outcome.not_taken:
        rows.append(("steps not taken", f"{outcome.not_taken:,}, as loss or gradient was not finite"))
    if rates:
        rows.append(("speed", ", ".join(speed(recipe, rates))))
    if outcome.peak_memory is not None:
        rows.append(("peak memory", f"{outcome.peak_memory / 1e9:.2f} GB"))
    if outcome.kept is not None:
        best = recipe.training.best_metric
        last = ", the last one" if outcome.kept == outcome.steps else f" of {outcome.steps:,}"
        rows.append(("kept", f"step {outcome.kept:,}{last}, with the best {best} on validation"))
    for split, scores in outcome.scores.items():
        shown = [f"{name} {number(scores[name])}" for name in recipe.task.headline if name in scores]
        rows.append((split, "  ".join(shown)))
        if note := macro_over(scores):
            rows.append(("", note))
    if outcome.reload_difference is None:
        rows.append(("saved and read back", f"{folder.adapter} (every bit of the weights is equal)"))
    else:
        rows.append(("saved and reloaded", f"{folder.adapter} ({apart(outcome.reload_difference)})"))
    pages = f"{folder.page}, {folder.report.name}; pictures in {folder.plots.name}/"
    rows += [("report", pages if recipe.tracking.report else str(folder.report))]
    rows += [("" if number else "next", command) for number, command in enumerate(_next_commands(outcome))]
    width = max(len(name) for name, _ in rows)
    return ["", *(f"  {name:<{width}}  {text}" for name, text in rows)]


def macro_over(scores: Mapping[str, float]) -> str:
    """Say how many labels a macro average is over, where some have no rows; empty where all have.

    Like scikit-learn's, it leaves out labels that occur neither in truth nor in predictions.
    """
    names = [name.removeprefix("support.") for name in scores if name.startswith("support.")]
    none = sum(not scores[f"support.{name}"] for name in names)
    if "f1_macro" not in scores or not none:
        return ""
    counted = sum(f"f1.{name}" in scores for name in names)
    return f"macro over {counted:,} of {len(names):,} labels; {none:,} {'has' if none == 1 else 'have'} no rows"


def speed(recipe: Recipe, rates: Mapping[str, float]) -> list[str]:
    """Write the rates of `Tally.rates`: of images there are no tokens, and all have one size."""
    rows = f"{rates['samples_per_second']:.1f} {'samples' if recipe.task.token_ids else recipe.task.rows_are}/s"
    if recipe.task.token_ids is None:
        return [rows]
    return [rows, f"{rates['tokens_per_second']:,.0f} tokens/s", f"{rates['padding_share']:.1%} padding"]


def _next_commands(outcome: Outcome) -> Iterator[str]:
    """Give the commands that one is likely to want now, to be copied."""
    recipe, place = outcome.recipe, shlex.quote(str(outcome.folder.path))
    yield f"hf-finetune predict {place} --input FILE"
    if recipe.task.generates:
        yield f"hf-finetune chat {place}"
    is_scored = recipe.data.has_validation or recipe.data.test is not None
    yield f"hf-finetune evaluate {place} {'--against base' if is_scored else '--data FILE'}"
    yield f"hf-finetune merge {place} --to FOLDER"
    if recipe.hub is None:
        yield f"hf-finetune push {place} --repo OWNER/NAME"
    if recipe.tracking.tensorboard:
        yield f"hf-finetune tensorboard {place}"


def apart(difference: float) -> str:
    """Say how far the logits of the saved model are from those in memory."""
    return f"logits differ by {difference:.1e} of the largest" if difference else "its logits are equal"
