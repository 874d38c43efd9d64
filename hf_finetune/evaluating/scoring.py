"""Runs a model over encoded rows, and keeps what it said of each, so that any part of them can be scored.

Shapes: N rows, M answers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_finetune import batching, hardware
from hf_finetune.errors import DivergedError, OutOfMemoryError, Problem
from hf_finetune.resources import is_out_of_memory
from hf_finetune.runreport import intervals
from hf_finetune.runreport.intervals import Intervals
from hf_finetune.tasks._sums import Sums, of_means
from hf_finetune.terminal import phase

if TYPE_CHECKING:
    from hf_finetune.data.onesplit import OneSplit
    from hf_finetune.finished import Finished, Serving
    from hf_finetune.hardware import EvalBatch
    from hf_finetune.tasks.base import Predictions, State, Task

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Scored:
    """What a model said of rows, and what they should be."""

    task: Task
    targets: State
    predictions: Predictions
    """(N, ...) each."""
    numbers: Array
    """(N,) number of each raw row, from 0."""
    answered: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """(M,) numbers of the raw rows whose answers were generated."""
    answers: Mapping[str, Array] = field(default_factory=dict)
    """Values (M,) by metric."""

    def only(self, numbers: Array) -> Scored:
        """The part that is about some raw rows."""
        kept = np.isin(self.numbers, numbers)
        part = {name: values[kept] for name, values in self.predictions.items()}
        return replace(self, predictions=part, numbers=self.numbers[kept]).answering(numbers)

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
        found = self.task.metrics(self.predictions, self.targets)
        if not np.isfinite(found.get("loss", 0.0)):
            raise DivergedError(f"the loss on these rows is {found['loss']}; the model gives no finite numbers")
        return found | {name: float(values.mean()) for name, values in self.answers.items()}

    def sums(self) -> list[Sums]:
        """What those metrics are made of that follow from sums over rows."""
        of_rows = self.task.sums(self.predictions, self.targets)
        found = [] if of_rows is None else [of_rows]
        return [*found, of_means(self.answers)] if self.answers else found

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
        judged = self.task.judge(self.predictions, self.targets)
        if judged is None or not judged.metric:
            return None
        return judged.metric, self.numbers[judged.places], ~judged.wrong


def score(run: Finished, served: Serving, one: OneSplit) -> Scored:
    """Run the model over the rows, batched as in training's evaluation, and generate answers where the task asks.

    Raises:
        OutOfMemoryError: A batch does not fit.
    """
    encoded: Any = one.encoding.rows()
    most = hardware.eval_batch(run.recipe, run.machine, run.recipe.task.vocabulary(run.tokenizer))
    with memory(most, run.recipe.data.max_length, all_logits=served.paths.makes_all_logits):
        predictions = _predictions(run, served, encoded, most)
        answered, answers = _answers(run, served, one)
    numbers = np.asarray(encoded.select_columns("row")["row"][:], dtype=np.int64)
    return Scored(run.recipe.task, run.targets, predictions, numbers, answered, answers)


def _predictions(run: Finished, served: Serving, encoded: Any, most: EvalBatch) -> Predictions:
    task, tokens = run.recipe.task, most.budget(all_logits=served.paths.makes_all_logits)
    division = batching.Division(most.rows, most.rows)
    rows, collate = batching.Rows(encoded, task), partial(task.collate, processor=run.tokenizer, state=run.targets)
    with phase("evaluating", len(encoded), "rows") as shown:
        loader = batching.eval_loader(rows, batching.lengths_of(encoded), division, collate, tokens)
        return batching.predicted(loader, served.predict, shown)


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
