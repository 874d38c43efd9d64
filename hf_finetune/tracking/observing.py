"""Observe the model at evaluations, as records; see `hf_finetune.tracking.records`.

Observing changes nothing: it draws no random number, leaves the model's mode as it was, and what a run computes has the
same bits with and without it.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import pad_across_processes, reduce

from hf_finetune.config.blocks import is_due
from hf_finetune.data.batches import lengths_of
from hf_finetune.data.prepare import Prepared
from hf_finetune.device import Machine
from hf_finetune.errors import RecipeError
from hf_finetune.log import warn
from hf_finetune.log.text import shortened
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import Batch, Judged, Predictions, tokenizer_of
from hf_finetune.tracking import probes
from hf_finetune.tracking.records import Record, files, step_of

Array = np.ndarray[Any, Any]

# Every log of an evaluation during training holds this.
EVALUATED = "eval_runtime"
# Characters of a text in a table, and beside an embedding.
TEXT, LABEL_TEXT = 500, 120
# Bins of the lengths; the last one takes the longest too.
BINS = 32
# Counts of the rows of a split, as in `SplitReport`.
FATES = ("rows", "kept", "cut", "dropped", "untrained", "empty", "unused", "tokens", "trained")
PACKAGES = (
    "hf_finetune", "torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "tensorboardX", "numpy",
    "bitsandbytes", "deepspeed", "flash_attn",
)  # fmt: skip


class Observing:
    """Everything of a run that is looked at besides its metrics.

    Args:
        recipe: The run's.
        prepared: Its data.
        machine: Tells which rank this is.
        folder: `observations/` of the run folder.
        record: Takes each record on rank 0, e.g. `Tracker.record`.
    """

    def __init__(
        self, recipe: Recipe, prepared: Prepared, machine: Machine, folder: Path, record: Callable[[Record], None]
    ) -> None:
        self.recipe, self.prepared, self.machine = recipe, prepared, machine
        self.folder, self.record = folder, record
        self._yardsticks: dict[str, dict[str, Predictions]] = {}

    def yardstick(self, split: str) -> dict[str, Predictions]:
        """Return what the task's first yardstick predicts for all raw rows, by its name; none where it has none."""
        if split not in self._yardsticks:
            raw = self.prepared.raw_test if split == "test" else self.prepared.raw_validation
            self._yardsticks[split] = {}
            for name in self.recipe.task.yardsticks[:1] if raw is not None else ():
                try:
                    self._yardsticks[split][name] = self.recipe.task.yardstick(name, raw)
                except RecipeError as error:
                    warn(f"no yardstick: {error}")
        return self._yardsticks[split]

    def watch(self, trainer: Any, say: Callable[[str], None]) -> None:
        """Watch a trainer from now on.

        Args:
            trainer: A `FinetuneTrainer`, not started yet.
            say: Takes sentences about what can't be shown.
        """
        trainer.observing = self
        tracking, names = self.recipe.tracking, trainer.job.targets.names
        wanted = {
            "weight histograms": tracking.histograms,
            "losses of single tokens": tracking.examples if self.recipe.task.predicts_next_token else False,
            "embeddings": tracking.embeddings if names else False,
        }
        if self.machine.is_sharded and any(wanted.values()):
            listed = ", ".join(name for name, often in wanted.items() if often)
            say(f"no {listed}: the weights are sharded (FSDP, ZeRO-3)")
        elif wanted["embeddings"] and probes.find_head(trainer.bare_model, len(names)) is None:
            say("no embeddings: this model's head does not end in a linear layer")
        if not self.machine.is_main:
            return
        if not trainer.steps_done():
            self.record(data(self.prepared))

        def due(step: int) -> bool:
            return trainer.evaluates_at(step) and Occasion("eval", step, trainer).is_due(tracking.histograms)

        if tracking.histograms is not False and not self.machine.is_sharded:
            trainer.add_callback(probes.WeightWatch(trainer.bare_model, due, self.record))

    def look(self, trainer: Any, phase: str, split: str, encoded: Any) -> Look:
        """Watch the evaluation that comes next.

        Args:
            trainer: Evaluates.
            phase: eval, final or test.
            split: validation or test.
            encoded: Its rows; `row` is the number of the raw row, from 0.
        """
        return Look(self, trainer, Occasion(phase, trainer.state.global_step, trainer), split, encoded)


class Occasion:
    """One evaluation, which may not have been made yet.

    Args:
        phase: eval, final or test.
        step: Optimiser steps before it.
        trainer: Evaluates.
    """

    def __init__(self, phase: str, step: int, trainer: Any) -> None:
        self.phase, self.step, state = phase, step, trainer.state
        # The history is part of a checkpoint, so the number is the same after a resume.
        earlier = {logs["step"] for logs in state.log_history if EVALUATED in logs and logs["step"] < step}
        self._number = len(earlier) + 1
        # Where the best checkpoint is kept, it is loaded after training, and evaluated once more.
        self._is_last = phase != "eval" or (step >= state.max_steps > 0 and not trainer.keeps_best)

    def is_due(self, often: int | str | bool) -> bool:
        """Tell if a setting of `tracking` asks for something at this evaluation."""
        return is_due(often, self._number, last=self._is_last)


class Look:
    """One evaluation as it is watched; every rank has one and calls it alike, rank 0 makes the records."""

    def __init__(self, observing: Observing, trainer: Any, occasion: Occasion, split: str, encoded: Any) -> None:
        self.observing, self.occasion, self.split, self.encoded = observing, occasion, split, encoded
        self.job, self.model = trainer.job, trainer.bare_model
        self.tracking = observing.recipe.tracking
        self.is_main, self.is_sharded = observing.machine.is_main, observing.machine.is_sharded
        self.totals: dict[str, torch.Tensor] | None = {} if occasion.is_due(self.tracking.images) else None
        """Sums that `Task.predict` adds to; None where nobody wants them."""
        self._inputs: probes.HeadInputs | None = None
        self._ids: Array = np.zeros(0, dtype=np.int64)
        self._predictions: Predictions = {}
        self._token_rows: list[dict[str, Any]] = []
        if self.job.targets.names and not self.is_sharded and occasion.is_due(self.tracking.embeddings):
            head = probes.find_head(self.model, len(self.job.targets.names))
            if head is not None:
                rows = probes.chosen(len(encoded), self.tracking.embedding_rows)
                self._inputs = probes.HeadInputs(head, rows, getattr(self.model.config, "pad_token_id", None))

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
        one = self.job.task.sequences == 1
        wanted = one and self.job.task.predicts_next_token and self.occasion.is_due(self.tracking.examples)
        if not wanted or self.is_sharded or not self.is_main:
            return {}

        def forward(row: dict[str, Any]) -> torch.Tensor:
            inputs = self.job.task.inputs(collate([row]))
            batch = {name: value.to(self.model.device) for name, value in inputs.items()}
            with torch.no_grad():
                logits: torch.Tensor = self.model(**batch).logits
            return logits[0]

        name, many = self.job.task.token_ids, self.tracking.example_rows
        self._token_rows = probes.rows(forward, tokenizer_of(self.job.tokenizer), self.encoded, name, many)
        entropy = probes.mean_entropy(self._token_rows)
        return {} if entropy is None else {"example_entropy": entropy}

    def _conclude(self) -> None:
        """Gather the parts of each rank, and make the records."""
        # Ranks that saw shorter rows have fewer places.
        totals = {
            name: reduce(pad_across_processes(total, dim=-1), reduction="sum")
            for name, total in sorted((self.totals or {}).items())
        }
        vectors = None if self._inputs is None else self._inputs.gather()
        if not self.is_main or not len(self._ids):
            return
        task, targets, tracking, due = self.job.task, self.job.targets, self.tracking, self.occasion.is_due
        phase, step, names = self.occasion.phase, self.occasion.step, list(self.job.targets.names)
        if (plot := task.plots(self._predictions, targets)) is not None:
            facts = {"task": task.kind, "problem": plot.kind, "threshold": plot.threshold, "split": self.split}
            arrays = {"rows": plot.rows}
            for name, bar in self.observing.yardstick(self.split).items():
                numbers = self._numbers(self._ids.tolist())
                if (beside := task.plots({key: rows[numbers] for key, rows in bar.items()}, targets)) is not None:
                    arrays["yardstick"], facts["yardstick"] = beside.rows, name
            self._keep("predictions", arrays, {**facts, "names": names})
        else:
            # Nothing is drawn of these, but the report's intervals are made of them.
            self._keep("outputs", self._predictions, {"names": names})
        if (judged := task.judge(self._predictions, targets)) is not None:
            if due(tracking.examples):
                self._tell("examples", {}, {"rows": self._worst(judged)})
            if vectors is not None and len(vectors[0]):
                ids, found = vectors
                truth = dict(zip(self._ids[judged.places].tolist(), judged.truth, strict=True))
                kept = np.array([int(index) in truth for index in ids], dtype=bool)  # masked rows have no label
                numbers = ids[kept].tolist()
                texts = self._texts(numbers, LABEL_TEXT)
                told = {"labels": [truth[number] for number in numbers], "texts": texts}
                self._tell("embeddings", {"vectors": found[kept], "ids": ids[kept]}, told)
        sums = totals.get("positions")
        if sums is not None and sums.numel():
            self._tell("positions", probes.positions(sums.cpu().numpy()), {})
        if self._token_rows:
            self._tell("tokens", {}, {"rows": self._token_rows})
        # At other evaluations `WeightWatch` has seen the step before, too.
        of_nothing_else = phase == "final" or step == 0
        if of_nothing_else and phase != "test" and due(tracking.histograms) and not self.is_sharded:
            self.observing.record(probes.record(phase, step, probes.modules(self.model), None))

    def _tell(self, kind: str, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        self.observing.record(Record(kind, self.occasion.phase, self.occasion.step, arrays, facts))

    def _keep(self, kind: str, arrays: Mapping[str, Array], facts: Mapping[str, Any]) -> None:
        """Record predictions; of those that nothing is drawn of, only the newest stay on disk."""
        folder, phase, is_due = self.observing.folder, self.occasion.phase, self.occasion.is_due
        due = {"images": is_due(self.tracking.images), "histograms": is_due(self.tracking.histograms)}
        earlier = [file for file in files(folder, kind) if file.name.startswith(f"{phase}-")]
        self._tell(kind, {"ids": self._ids, **arrays}, {**facts, "due": due, "kept": any(due.values())})
        for file in [file for file in earlier if step_of(file) < self.occasion.step][-1:]:
            before = Record.read(file)
            if before is not None and not before.facts.get("kept", True):
                file.unlink(missing_ok=True)

    def _worst(self, judged: Judged) -> list[dict[str, Any]]:
        """List the most confidently wrong rows, worst first, as the record `examples` holds them."""
        order = np.argsort(-judged.confidence, kind="stable")
        chosen = order[judged.wrong[order]][: self.tracking.example_rows]
        places = self._ids[judged.places[chosen]].tolist()
        texts = self._texts(places, TEXT)
        return [
            {
                "row": number + 1,
                "text": text,
                "label": judged.truth[index],
                "predicted": judged.predicted[index],
                "confidence": float(judged.confidence[index]),
            }
            for index, number, text in zip(chosen.tolist(), self._numbers(places), texts, strict=True)
        ]

    def _texts(self, ids: Sequence[int], limit: int) -> list[str]:
        """Describe some rows, in at most so many characters each."""
        prepared = self.observing.prepared
        raw = prepared.raw_test if self.split == "test" else prepared.raw_validation
        if raw is None or not len(ids):
            return [""] * len(ids)
        return [shortened(self.job.task.describe(row), limit) for row in raw.select(self._numbers(ids))]

    def _numbers(self, ids: Sequence[int]) -> list[int]:
        """Return the numbers of the raw rows, from 0: encoding may have dropped some."""
        return [int(number) for number in self.encoded.select_columns("row")[list(ids)]["row"]]


def data(prepared: Prepared) -> Record:
    """Record `data`: tokens a row after cutting, in bins that all splits share, labels, and what became of the rows.

    The lengths of a stream are not known.
    """
    splits = {"train": prepared.train, "validation": prepared.validation, "test": prepared.test}
    lengths = {name: lengths_of(rows) for name, rows in splits.items() if hasattr(rows, "column_names")}
    longest = max((int(found.max(initial=0)) for found in lengths.values()), default=0)
    step = max(1, -(-(longest + 1) // BINS))
    edges = np.arange(0, longest + 1 + step, step)
    counts = {f"lengths.{name}": np.histogram(found, edges)[0].astype(np.int64) for name, found in lengths.items()}
    reports = {name: asdict(report) for name, report in prepared.reports.items()}
    facts: dict[str, Any] = {
        "labels": {name: dict(found.labels) for name, found in prepared.facts.items()},
        **{fate: {name: report[fate] for name, report in reports.items()} for fate in FATES},
    }
    return Record("data", "train", 0, {"edges": edges.astype(np.int64), **counts}, facts)


def environment(machine: Machine, step: int) -> Record:
    """Record `environment`: versions of packages, and the machine.

    Args:
        machine: This run's.
        step: Where the process begins.
    """
    devices = platform.processor() or platform.machine()
    if machine.device == "cuda":
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        devices = ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))
    table = {
        "machine": machine.describe(),
        "devices": devices,
        "cores": str(os.cpu_count()),
        "platform": platform.platform(),
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            table[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        table["cuda"] = str(torch.version.cuda)
    return Record("environment", "train", step, facts={"table": table, "time": round(time.time(), 3)})
