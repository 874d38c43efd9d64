"""Observe the model at evaluations, as records; see `hf_finetune.records`.

Observing changes nothing: it draws no random number, leaves the model's mode as it was, and what a run computes has the
same bits with and without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import pad_across_processes, reduce
from transformers import TrainerState

from hf_finetune.hardware import Machine
from hf_finetune.observing import data, embeddings, predictions, tokens, weights
from hf_finetune.observing.predictions import Split
from hf_finetune.recipe import Recipe
from hf_finetune.records import Record, files, step_of
from hf_finetune.schema.watching import is_due
from hf_finetune.tasks.base import Batch, Predictions, tokenizer_of

if TYPE_CHECKING:
    from hf_finetune.data import Prepared
    from hf_finetune.trainer import FinetuneTrainer

Array = np.ndarray[Any, Any]

EVALUATED = "eval_runtime"
"""Every log of an evaluation during training holds this."""
LABEL_TEXT = 120
"""Characters of a text beside an embedding."""


@dataclass(frozen=True)
class Occasion:
    """One evaluation."""

    phase: str
    """eval, final or test."""
    step: int
    number: int
    """Evaluations in training up to this one; from 1."""
    last: bool
    """True if it is of the model that is saved."""

    def is_due(self, often: int | str | bool) -> bool:
        """Tell if a setting of `tracking` asks for something at this evaluation."""
        return is_due(often, self.number, last=self.last)

    @classmethod
    def of(cls, phase: str, step: int, state: TrainerState, *, keeps_best: bool) -> Occasion:
        """Describe the evaluation after a step, which has not been made yet.

        Args:
            phase: eval, final or test.
            step: Optimiser steps before it.
            state: The Trainer's.
            keeps_best: The best checkpoint is loaded after training, and evaluated once more.
        """
        # The history is part of a checkpoint, so the number is the same after a resume.
        history: list[dict[str, Any]] = state.log_history
        earlier = {logs["step"] for logs in history if EVALUATED in logs and logs["step"] < step}
        ends = step >= state.max_steps > 0 and not keeps_best
        return cls(phase, step, len(earlier) + 1, last=phase != "eval" or ends)


@dataclass(frozen=True)
class Observing:
    """Everything of a run that is looked at besides its metrics."""

    recipe: Recipe
    prepared: Prepared
    machine: Machine
    folder: Path
    """`observations/` of the run folder."""
    record: Callable[[Record], None]
    """Takes each record on rank 0, e.g. `Observers.record`."""

    def attend(self, trainer: FinetuneTrainer, say: Callable[[str], None]) -> None:
        """Watch a trainer from now on.

        Args:
            trainer: Not started yet.
            say: Takes sentences about what can't be shown.
        """
        trainer.observing = self
        tracking, has_labels = self.recipe.tracking, bool(trainer.job.targets.names)
        wanted = {
            "weight histograms": tracking.histograms,
            "losses of single tokens": tracking.examples if self.recipe.task.predicts_next_token else False,
            "embeddings": tracking.embeddings if has_labels else False,
        }
        if self.machine.is_sharded and any(wanted.values()):
            names = ", ".join(name for name, often in wanted.items() if often)
            say(f"no {names}: the weights are sharded (FSDP, ZeRO-3)")
        elif wanted["embeddings"] and embeddings.find_head(trainer.bare_model, len(trainer.job.targets.names)) is None:
            say("no embeddings: this model's head does not end in a linear layer")
        if not self.machine.is_main:
            return
        if not trainer.steps_done():
            self.record(data.record(self.prepared))

        def due(step: int) -> bool:
            if not trainer.evaluates_at(step):
                return False
            occasion = Occasion.of("eval", step, trainer.state, keeps_best=trainer.keeps_best)
            return occasion.is_due(tracking.histograms)

        if tracking.histograms is not False and not self.machine.is_sharded:
            trainer.add_callback(weights.WeightWatch(trainer.bare_model, due, self.record))

    def look(self, trainer: FinetuneTrainer, phase: str, split: str, encoded: Any) -> Look:
        """Watch the evaluation that comes next.

        Args:
            trainer: Evaluates.
            phase: eval, final or test.
            split: validation or test.
            encoded: Its rows.
        """
        raw = self.prepared.raw_test if split == "test" else self.prepared.raw_validation
        occasion = Occasion.of(phase, trainer.state.global_step, trainer.state, keeps_best=trainer.keeps_best)
        return Look(self, trainer, occasion, Split(split, encoded, raw))

    def keep_predictions(self, record: Record, occasion: Occasion) -> None:
        """Record predictions; of those that nothing is drawn of, only the newest stay on disk."""
        tracking = self.recipe.tracking
        due = {"images": occasion.is_due(tracking.images), "histograms": occasion.is_due(tracking.histograms)}
        earlier = [file for file in files(self.folder, record.kind) if file.name.startswith(f"{record.phase}-")]
        self.record(replace(record, facts={**record.facts, "due": due, "kept": any(due.values())}))
        for file in [file for file in earlier if step_of(file) < record.step][-1:]:
            before = Record.read(file)
            if before is not None and not before.facts.get("kept", True):
                file.unlink(missing_ok=True)


class Look:
    """One evaluation as it is watched; every rank has one and calls it alike, rank 0 makes the records.

    Args:
        observing: Of the run.
        trainer: Evaluates.
        occasion: Tells which evaluation this is.
        split: Its rows.
    """

    def __init__(self, observing: Observing, trainer: FinetuneTrainer, occasion: Occasion, split: Split) -> None:
        self.observing, self.occasion, self.split = observing, occasion, split
        self.job, self.model = trainer.job, trainer.bare_model
        self.tracking = observing.recipe.tracking
        self.is_main, self.is_sharded = observing.machine.is_main, observing.machine.is_sharded
        self.totals: dict[str, torch.Tensor] | None = {} if occasion.is_due(self.tracking.images) else None
        """Sums that `Task.predict` adds to; None where nobody wants them."""
        self._inputs: embeddings.HeadInputs | None = None
        self._ids: Array = np.zeros(0, dtype=np.int64)
        self._predictions: Predictions = {}
        self._token_rows: list[dict[str, Any]] = []
        if self.job.targets.names and not self.is_sharded and occasion.is_due(self.tracking.embeddings):
            head = embeddings.find_head(self.model, len(self.job.targets.names))
            if head is not None:
                rows = embeddings.chosen(len(split.encoded), self.tracking.embedding_rows)
                self._inputs = embeddings.HeadInputs(head, rows, getattr(self.model.config, "pad_token_id", None))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Evaluate the split inside; the records are made at the end."""
        with nullcontext() if self._inputs is None else self._inputs.listening():
            yield
        self._conclude()

    def announce(self, batch: Batch) -> None:
        """Say which batch comes next, still on the CPU."""
        if self._inputs is not None:
            self._inputs.announce(batch["row_ids"], batch.get(self.job.task.token_ids or ""))

    def score(self, ids: Array, found: Predictions, collate: Callable[[list[Any]], Batch]) -> dict[str, float]:
        """Take the predictions of every row, in order; returns metrics that come of looking closer.

        Args:
            ids: (N,) numbers of the rows.
            found: (N, ...) each.
            collate: Makes a batch of encoded rows.
        """
        self._ids, self._predictions = ids, found
        wanted = self.job.task.predicts_next_token and self.occasion.is_due(self.tracking.examples)
        if not wanted or self.is_sharded or not self.is_main:
            return {}

        def forward(row: dict[str, Any]) -> torch.Tensor:
            inputs = self.job.task.inputs(collate([row]))
            batch = {name: value.to(self.model.device) for name, value in inputs.items()}
            with torch.no_grad():
                logits: torch.Tensor = self.model(**batch).logits
            return logits[0]

        name, many = self.job.task.token_ids, self.tracking.example_rows
        self._token_rows = tokens.rows(forward, tokenizer_of(self.job.tokenizer), self.split.encoded, name, many)
        entropy = tokens.mean_entropy(self._token_rows)
        return {} if entropy is None else {"example_entropy": entropy}

    def _conclude(self) -> None:
        """Gather the parts of each rank, and make the records."""
        totals = {name: _over_ranks(total) for name, total in sorted((self.totals or {}).items())}
        vectors = None if self._inputs is None else self._inputs.gather()
        if not self.is_main or not len(self._ids):
            return
        task, targets, tracking, due = self.job.task, self.job.targets, self.tracking, self.occasion.is_due
        phase, step = self.occasion.phase, self.occasion.step
        tell = self.observing.record
        if (plot := task.plots(self._predictions, targets)) is not None:
            facts: dict[str, Any] = {"task": task.kind, "problem": plot.problem, "names": list(targets.names)}
            facts |= {"threshold": plot.threshold, "split": self.split.name}
            arrays = {"ids": self._ids, "rows": plot.rows}
            self.observing.keep_predictions(Record("predictions", phase, step, arrays, facts), self.occasion)
        if (judged := task.judge(self._predictions, targets)) is not None:
            if due(tracking.examples):
                rows = predictions.worst(task, self.split, self._ids, judged, tracking.example_rows)
                tell(Record("examples", phase, step, facts={"rows": rows}))
            if vectors is not None and len(vectors[0]):
                ids, found = vectors
                truth = dict(zip(self._ids[judged.places].tolist(), judged.truth, strict=True))
                kept = np.array([int(index) in truth for index in ids], dtype=bool)  # masked rows have no label
                numbers = ids[kept].tolist()
                texts = self.split.texts(task, numbers, LABEL_TEXT)
                told = {"labels": [truth[number] for number in numbers], "texts": texts}
                tell(Record("embeddings", phase, step, {"vectors": found[kept], "ids": ids[kept]}, told))
        sums = totals.get("positions")
        if sums is not None and sums.numel():
            tell(Record("positions", phase, step, tokens.positions(sums.cpu().numpy())))
        if self._token_rows:
            tell(Record("tokens", phase, step, facts={"rows": self._token_rows}))
        # At other evaluations `WeightWatch` has seen the step before, too.
        of_nothing_else = phase == "final" or step == 0
        if of_nothing_else and phase != "test" and due(tracking.histograms) and not self.is_sharded:
            tell(weights.record(phase, step, weights.modules(self.model), None))


def _over_ranks(total: torch.Tensor) -> torch.Tensor:
    """The sum of every rank's total; ranks that saw shorter rows have fewer places."""
    summed: torch.Tensor = reduce(pad_across_processes(total, dim=-1), reduction="sum")
    return summed
