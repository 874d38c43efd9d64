"""Runs a model over encoded rows, and keeps what it said of each, so that any part of them can be scored.

Shapes: N rows, K numbers a row (as `Task.eval_rows` makes them), M answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_finetune import batching, hardware
from hf_finetune.errors import DivergedError, OutOfMemoryError, Problem
from hf_finetune.resources import is_out_of_memory
from hf_finetune.runreport import intervals
from hf_finetune.runreport.intervals import Intervals, Sums
from hf_finetune.terminal import phase

if TYPE_CHECKING:
    from hf_finetune.data.onesplit import OneSplit
    from hf_finetune.finished import Finished, Serving
    from hf_finetune.hardware import EvalBatch
    from hf_finetune.tasks.base import Targets, Task

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Scored:
    """What a model said of rows, and what they should be."""

    task: Task
    targets: Targets
    rows: Array
    """(N, K) float32."""
    numbers: Array
    """(N,) number of each raw row, from 0."""
    answered: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """(M,) numbers of the raw rows whose answers were generated."""
    answers: Mapping[str, Array] = field(default_factory=dict)
    """Values (M,) by metric."""

    def only(self, numbers: Array) -> Scored:
        """The part that is about some raw rows."""
        kept = np.isin(self.numbers, numbers)
        return replace(self, rows=self.rows[kept], numbers=self.numbers[kept]).answering(numbers)

    def answering(self, numbers: Array) -> Scored:
        """The same, with the generated answers to some raw rows alone."""
        kept = np.isin(self.answered, numbers)
        answers = {name: values[kept] for name, values in self.answers.items()} if kept.any() else {}
        return replace(self, answered=self.answered[kept], answers=answers)

    def metrics(self) -> dict[str, float]:
        """The task's metrics; those that are undefined on these rows are left out.

        Raises:
            DivergedError: An output or the loss is not finite.
        """
        found = self.task.metrics(self.rows, self.targets)
        if not np.isfinite(found.get("loss", 0.0)):
            raise DivergedError(f"the loss on these rows is {found['loss']}; the model gives no finite numbers")
        return found | {name: float(values.mean()) for name, values in self.answers.items()}

    def sums(self) -> list[Sums]:
        """What those metrics are made of that follow from sums over rows."""
        of_rows = intervals.sums_of(self.rows, self._facts())
        found = [] if of_rows is None else [of_rows]
        return [*found, intervals.of_means(self.answers)] if self.answers else found

    def intervals(self) -> Intervals:
        """95 % bootstrap intervals of those metrics."""
        parts = [intervals.of_sums(sums) for sums in self.sums()]
        bounds = {name: pair for part in parts for name, pair in part.bounds.items()}
        wilson = tuple(name for part in parts for name in part.by_wilson)
        return Intervals(bounds, parts[0].resamples, parts[0].rows, wilson) if parts else Intervals()

    def right(self) -> tuple[str, Array, Array] | None:
        """A metric that counts right rows, the numbers of the rows, and which are right; None where none does."""
        if self.answers:
            return "exact_match", self.answered, self.answers["exact_match"] > 0
        problem, classes = getattr(self.task, "problem", None), len(self.targets.names)
        logits, labels = self.rows[:, :classes], self.rows[:, classes:]
        if problem == "single_label":
            return "accuracy", self.numbers, logits.argmax(axis=1) == labels[:, 0]
        if problem == "multi_label":
            threshold = getattr(self.task, "threshold", 0.5)
            cells = 1 / (1 + np.exp(-logits.astype(np.float64))) >= threshold
            return "accuracy", self.numbers, (cells == (labels > 0.5)).all(axis=1)
        return None

    def _facts(self) -> dict[str, Any]:
        problem = getattr(self.task, "problem", None)
        threshold = getattr(self.task, "threshold", None) if problem == "multi_label" else None
        return {"problem": problem, "names": list(self.targets.names), "threshold": threshold}


def score(run: Finished, served: Serving, one: OneSplit) -> Scored:
    """Run the model over the rows, batched as in training's evaluation, and generate answers where the task asks.

    Raises:
        OutOfMemoryError: A batch does not fit.
    """
    encoded: Any = one.encoding.rows()
    vocabulary = len(run.tokenizer) if run.recipe.task.peft_type == "CAUSAL_LM" else 0
    most = hardware.eval_batch(run.recipe, run.machine, vocabulary)
    with memory(most, run.recipe.data.max_length, all_logits=served.paths.makes_all_logits):
        rows = _rows(run, served, encoded, most)
        answered, answers = _answers(run, served, one)
    numbers = np.asarray(encoded.select_columns("row")["row"][:], dtype=np.int64)
    return Scored(run.recipe.task, run.targets, rows, numbers, answered, answers)


def _rows(run: Finished, served: Serving, encoded: Any, most: EvalBatch) -> Array:
    task, tokens = run.recipe.task, most.budget(all_logits=served.paths.makes_all_logits)
    division = batching.Division(most.rows, most.rows)
    rows, collator = batching.Rows(encoded, task), task.collator(run.tokenizer)
    loader = batching.eval_loader(rows, batching.lengths_of(encoded), division, collator, tokens)
    found: list[Array] = []
    order: list[Array] = []
    with phase("evaluating", len(encoded), "rows") as shown:
        for batch in loader:
            order.append(batch["row_ids"].numpy())
            found.append(served.rows(batch).cpu().numpy())
            shown.done += len(order[-1])
    made: Array = np.concatenate(found)[np.argsort(np.concatenate(order))]
    return made


def _answers(run: Finished, served: Serving, one: OneSplit) -> tuple[Array, dict[str, Array]]:
    """Numbers of the raw rows whose answers were generated, and the values of each metric."""
    from hf_finetune.tasks._generation import BATCH, generate

    questions = run.recipe.task.questions(one.split.raw(), run.tokenizer)
    if questions is None:
        return np.empty(0, dtype=np.int64), {}
    with served.running():
        generations = generate(
            served.network,
            run.tokenizer,
            questions.prompts,
            max_new_tokens=questions.max_new_tokens,
            batch_size=BATCH,
        )
    values = questions.each(generations)
    return np.arange(len(generations)), {name: np.array(found) for name, found in values.items()}


@contextmanager
def memory(most: EvalBatch, longest: int, *, all_logits: bool) -> Iterator[None]:
    """Say what would help where the device runs out of memory.

    Raises:
        OutOfMemoryError: Instead of torch's own.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        rows = most.rows_of(longest, all_logits=all_logits)
        message = f"out of memory with {rows} rows of {longest} tokens; give training.eval_batch={max(1, rows // 2)}"
        raise OutOfMemoryError(Problem(message)) from error
