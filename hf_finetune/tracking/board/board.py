"""The board: every line of metrics.jsonl and every record, as TensorBoard shows them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from tensorboardX import summary
from tensorboardX.proto.summary_pb2 import Summary
from transformers import TrainerState

from hf_finetune.schema.watching import is_due
from hf_finetune.terminal import warn
from hf_finetune.tracking.board import hparams, layout, tags
from hf_finetune.tracking.board.kinds import (
    data,
    embeddings,
    environment,
    examples,
    positions,
    predictions,
    samples,
    tokens,
    weights,
)
from hf_finetune.tracking.board.markdown import block
from hf_finetune.tracking.callbacks import MetricsCallback
from hf_finetune.tracking.journal import Entry

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe
    from hf_finetune.records import Record
    from hf_finetune.runfolder import RunFolder
    from hf_finetune.tracking.board.events import Events

DRAWN: dict[str, Callable[[Record], Iterator[Summary]]] = {
    module.__name__.rpartition(".")[2]: module.draw
    for module in (data, environment, examples, positions, tokens, weights)
}
"""By kind; predictions and embeddings are more than a function of one record."""
HEAD = frozenset({"step", "phase", "time"})


class Board(MetricsCallback):
    """Draws a run.

    What is drawn follows from the lines, the records and the recipe alone, whenever they are handed over; so a board
    that is drawn anew equals the one that was drawn while the run went on.

    Args:
        recipe: The run's; says what is drawn how often.
        folder: The run's.
        events: Where the drawings go.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, events: Events) -> None:
        self.recipe = recipe
        self.folder = folder
        self.events = events
        self._has_begun = self._has_ended = False
        self._times: dict[tuple[str, int], float] = {}
        self._embeddings: list[str] = []
        self._undrawn: set[str] = set()
        """Kinds of records of which a warning said that they can't be drawn."""
        self._last: Record | None = None
        """The newest predictions on the validation split, which may turn out to be those of the saved model."""

    def see(self, line: Entry, state: TrainerState) -> None:
        """Draw a line."""
        self.add(line)

    def add(self, line: Entry) -> None:
        """Draw every number of a line of metrics.jsonl."""
        at = self._times[line["phase"], line["step"]] = line.get("time") or time.time()
        found = {}
        for key, value in line.items():
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if key not in HEAD and is_number and (key != "epoch" or line["phase"] == "train"):
                found[tags.of_metric(line["phase"], key)] = value
        self._add(_scalars(found), line["step"], at)

    def add_samples(self, lines: Iterable[samples.Line], step: int) -> None:
        """Show answers to the fixed prompts, lines of samples.jsonl."""
        self._add(summary.text(samples.TAG, samples.text(lines)), step, self._time("eval", step))

    def add_lock(self) -> None:
        """Show what the run was made from and on; it is known once everything is chosen."""
        if self.folder.run_lock.is_file():
            text = self.folder.run_lock.read_text(encoding="utf-8")
            self._add(summary.text("lock", block(text)), 0, self._time("train", 0))

    def draw(self, record: Record) -> None:
        """Draw a record, as often as the recipe wants it; a kind that this knows nothing of is left out."""
        if record.kind == "environment":
            self._times.setdefault(("train", record.step), record.facts["time"])
        with self._trying(record):
            if record.kind == "predictions":
                self._draw_predictions(record)
            elif record.kind == "embeddings":
                self._draw_embeddings(record)
            elif record.kind in DRAWN:
                self._add_all(DRAWN[record.kind](record), record)

    @contextmanager
    def _trying(self, record: Record) -> Iterator[None]:
        """Warn once of a kind of picture that can not be drawn: no run ends because its model says odd things."""
        try:
            yield
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            if record.kind not in self._undrawn:
                self._undrawn.add(record.kind)
                why = f"{type(error).__name__}: {error}"
                warn(f"TensorBoard lacks {record.kind} of step {record.step}: drawing them failed ({why}); report this")

    def conclude(self, line: Entry) -> None:
        """Draw the summary of a run that is done.

        Its validation metrics are also `final/...`, where the last evaluation was of the saved model already: so every
        run has these, and runs compare by them.
        """
        at = line.get("time") or time.time()
        step, has_final = line["step"], ("final", line["step"]) in self._times
        found: dict[str, float] = {}
        for key, value in line.items():
            split, _, metric = key.partition("_")
            if key in HEAD or not isinstance(value, int | float) or split == "test":
                continue
            if split != "validation":
                found[f"summary/{key}"] = value
            elif not has_final:
                found[tags.of_metric("final", metric)] = value
        self._add(_scalars(found), step, at)
        if self._last is not None and self._last.step == step and not self._keeps_best:
            with self._trying(self._last):
                self._draw_predictions(self._last, already=True)
        self._end("success", at)

    def close(self, outcome: hparams.Outcome = "failure") -> None:
        """Say how the run ended, where that was not said, and write what waits; later calls do nothing."""
        if self._has_begun and not self._has_ended:
            self._end(outcome, time.time())
        self.events.close()

    # ---- records ----

    @property
    def _keeps_best(self) -> bool:
        return self.recipe.training.best_metric is not None

    def _draw_predictions(self, record: Record, *, already: bool = False) -> None:
        """Draw what is due.

        Args:
            record: The predictions.
            already: They were drawn before, and are now known to be those of the saved model.
        """
        tracking = self.recipe.tracking
        parts = ((tracking.images, predictions.images), (tracking.histograms, predictions.histograms))
        for often, part in parts:
            was_due = self._is_due(record, often)
            if (is_due(often, 1, last=True) and not was_due) if already else was_due:
                self._add_all(part(record), record)
        if record.phase == "eval":
            self._last = record

    def _is_due(self, record: Record, often: Any) -> bool:
        earlier = {step for phase, step in self._times if phase == "eval" and step < record.step}
        return is_due(often, len(earlier) + 1, last=record.phase != "eval")

    def _draw_embeddings(self, record: Record) -> None:
        name = embeddings.name_of(record)
        if name not in self._embeddings:
            self._embeddings.append(name)
        for path, content in embeddings.files(record, self._embeddings).items():
            self.events.attach(path, content)

    def _add_all(self, made: Iterator[Summary], record: Record) -> None:
        at = self._time(record.phase, record.step)
        for found in made:
            self._add(found, record.step, at)

    # ---- the session ----

    def _time(self, phase: str, step: int) -> float:
        """When something of a step was seen."""
        return self._times.get((phase, step)) or self._times.get(("train", step)) or time.time()

    def _add(self, made: Summary, step: int, at: float) -> None:
        if not self._has_begun:
            self._begin(at)
        self.events.add(made, step, at)

    def _begin(self, at: float) -> None:
        """Say what kind of run this is."""
        self._has_begun = True
        made = [*hparams.start(self.recipe, at), layout.layout(self.recipe)]
        made.append(summary.text("recipe", block(self.recipe.dump())))
        for found in made:
            self.events.add(found, 0, at)

    def _end(self, status: hparams.Outcome, at: float) -> None:
        self._has_ended = True
        self._add(hparams.end(status, at), 0, at)


def _scalars(values: Mapping[str, float]) -> Summary:
    """One event for all numbers of a line, by tag."""
    # Not `summary.scalar`, which replaces characters of labels, and so may give two of them one tag.
    return Summary(value=[Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()])
