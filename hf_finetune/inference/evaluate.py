"""`hf-finetune evaluate`, step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from hf_finetune import log
from hf_finetune.config.paths import refuse_outside
from hf_finetune.data import batches, prepare
from hf_finetune.data.job import EvalBatch, eval_batch
from hf_finetune.data.prepare import OneSplit, Wish
from hf_finetune.device import is_out_of_memory
from hf_finetune.errors import DataError, DivergedError, OutOfMemoryError, Problem, RecipeError
from hf_finetune.inference import document as inference_document
from hf_finetune.inference.document import Evaluation, Slice
from hf_finetune.inference.load import Finished, Serving, open_run
from hf_finetune.log import phase
from hf_finetune.recipe import Recipe
from hf_finetune.reports import intervals as reports_intervals
from hf_finetune.reports.intervals import Intervals
from hf_finetune.tasks._sums import Sums, of_means
from hf_finetune.tasks.base import Predictions, State, Task

# Runs a model over encoded rows, and keeps what it said of each, so that any part of them can be scored.
#
# Shapes: N rows, M answers.

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
        """Estimate 95 % bootstrap intervals of those metrics."""
        return reports_intervals.estimate(self.sums())

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
    most = eval_batch(run.recipe, run.machine, run.recipe.task.vocabulary(run.tokenizer))
    with memory(most, run.recipe.data.max_length, all_logits=served.paths.makes_all_logits):
        predictions = _predictions(run, served, encoded, most)
        answered, answers = _answers(run, served, one)
    numbers = np.asarray(encoded.select_columns("row")["row"][:], dtype=np.int64)
    return Scored(run.recipe.task, run.targets, predictions, numbers, answered, answers)


def _predictions(run: Finished, served: Serving, encoded: Any, most: EvalBatch) -> Predictions:
    task, tokens = run.recipe.task, most.budget(all_logits=served.paths.makes_all_logits)
    division = batches.Division(most.rows, most.rows)
    rows, collate = batches.Rows(encoded, task), partial(task.collate, processor=run.tokenizer, state=run.targets)
    with phase("evaluating", len(encoded), "rows") as shown:
        loader = batches.eval_loader(rows, batches.lengths_of(encoded), division, collate, tokens)
        return batches.predicted(loader, served.predict, shown)


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


# Two models on the same rows: differences with paired intervals, and McNemar's test of which is right more often.


@dataclass(frozen=True)
class McNemar:
    """McNemar's exact test (McNemar 1947; two-sided, binomial): do both models err equally often?"""

    metric: str
    """The share that is compared: accuracy or exact_match."""
    only_this: int
    """Rows that only this model has right."""
    only_other: int
    """Rows that only the other has right."""
    p_value: float


@dataclass(frozen=True)
class Versus:
    """How this model compares with another."""

    name: str
    """The other's."""
    rows: int
    """Rows that both evaluated."""
    metrics: Mapping[str, float]
    """The other's, on these rows."""
    differences: Mapping[str, float]
    """This model's metrics minus the other's, on these rows."""
    bounds: Mapping[str, tuple[float, float]]
    """95 % intervals of the differences, where they follow from sums over rows."""
    mcnemar: McNemar | None
    notes: list[str] = field(default_factory=list)
    """What was left out."""


def compare(this: Scored, other: Scored, name: str) -> Versus:
    """Compare two models on the rows that both evaluated.

    Raises:
        RecipeError: They do different tasks, or know different labels.
        DataError: They have no row in common.
    """
    _refuse_strangers(this, other, name)
    common = np.intersect1d(this.numbers, other.numbers)
    if not len(common):
        raise DataError(f"{name} evaluated none of the rows that this run did; look at what was dropped")
    left_out = len(this.numbers) - len(common)
    notes = [f"{left_out:,} rows are left out: {name} drops them"] if left_out else []
    this, other, unlike = _same_answers(this.only(common), other.only(common), name)
    notes += unlike
    mine, theirs = this.metrics(), other.metrics()
    if not _same_tokens(this, other):
        notes.append("loss, perplexity and token_accuracy are not compared: the tokenizers cut texts into other tokens")
        mine = {metric: value for metric, value in mine.items() if metric in this.answers}
    differences = {metric: mine[metric] - theirs[metric] for metric in mine if metric in theirs}
    # Both are in the order of the split; masked rows may have been left out of one.
    pairs = [
        pair
        for pair in zip(this.sums(), other.sums(), strict=True)
        if pair[0].of_rows.shape[1] == pair[1].of_rows.shape[1]
    ]
    found = reports_intervals.differences(pairs).bounds
    bounds = {metric: pair for metric, pair in found.items() if metric in differences}
    return Versus(name, len(common), theirs, differences, bounds, _mcnemar(this, other), notes)


def _refuse_strangers(this: Scored, other: Scored, name: str) -> None:
    mine, theirs = (scored.task.title for scored in (this, other))
    if mine != theirs:
        raise RecipeError(f"{name} does {theirs}, this run {mine}; only runs of one task can be compared")
    names = [set(scored.targets.names) for scored in (this, other)]
    if names[0] != names[1] and max(map(len, names)) > 1:  # a single name is only a column's
        strange = ", ".join(sorted(names[0] ^ names[1])[:5])
        raise RecipeError(f"{name} knows other labels than this run ({strange}); they can't be compared")


def _same_answers(this: Scored, other: Scored, name: str) -> tuple[Scored, Scored, list[str]]:
    """Both with the generated answers that can be compared, and what is said of the others."""
    if not this.answers and not other.answers:
        return this, other, []
    common = np.intersect1d(this.answered, other.answered)
    patterns = [getattr(scored.task, "answer_pattern", None) for scored in (this, other)]
    told = []
    if patterns[0] != patterns[1]:
        common = common[:0]
        told = [f"generated answers are not compared: {name} has another task.answer_pattern; give one to both"]
    elif not len(common):
        told = [f"generated answers are not compared: {name} and this run answer no row in common; "
                "give task.generate_rows"]  # fmt: skip
    elif max(len(this.answered), len(other.answered)) > len(common):
        told = [f"generated answers are compared on the {len(common):,} rows that both answer"]
    return this.answering(common), other.answering(common), told


def _same_tokens(this: Scored, other: Scored) -> bool:
    """Tell whether losses of tokens are of the same tokens."""
    mine, theirs = this.predictions.get("tokens"), other.predictions.get("tokens")
    return mine is None or theirs is None or np.array_equal(mine, theirs)


def _mcnemar(this: Scored, other: Scored) -> McNemar | None:
    from scipy import stats

    mine, theirs = this.right(), other.right()
    if mine is None or theirs is None:
        return None
    metric, numbers, right = mine
    _, other_numbers, other_right = theirs
    _, at, other_at = np.intersect1d(numbers, other_numbers, return_indices=True)
    only_this = int((right[at] & ~other_right[other_at]).sum())
    only_other = int((~right[at] & other_right[other_at]).sum())
    both = only_this + only_other
    p_value = float(stats.binomtest(only_this, both).pvalue) if both else 1.0
    return McNemar(metric, only_this, only_other, p_value)


BASE = "base"
"""What `--against` calls the model before it was trained."""
MOST_SLICES = 50
"""Slices of a column that are scored: the largest."""


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    run: str
    overrides: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    split: str | None = None
    by: tuple[str, ...] = ()
    against: tuple[str, ...] = ()
    form: str = "text"
    everything: bool = False


def run(options: Options) -> None:
    """Evaluate, print, and keep the document in the run folder; see `evaluate`."""

    def show(document: dict[str, Any], headline: tuple[str, ...]) -> None:
        log.show(inference_document.render(document, options.form, headline + EXTRA, everything=options.everything))

    log.say(f"kept in {evaluate(options, show)[1]}")


def evaluate(
    options: Options, show: Callable[[dict[str, Any], tuple[str, ...]], None] | None = None
) -> tuple[dict[str, Any], Path]:
    """Evaluate, and keep the document in the run folder.

    Args:
        options: What is asked for.
        show: Gets the document and the task's main metrics before the file is written, which may fail.

    Raises:
        RecipeError: There is no such run, split or slice, or an override is wrong.
        FinetuneError: Data or model are unfit, or the document can't be written.
    """
    refuse_outside(("--data", file) for file in options.files)
    opened = open_run(options.run, options.overrides)
    others = [
        (name, opened if name == BASE else open_run(name, _shared(options.overrides))) for name in options.against
    ]
    wish = _wish(options, opened.recipe)
    with prepare.opened(opened.recipe, opened.tokenizer, opened.targets, wish, log.phase) as one:
        for problem in one.warnings:
            log.warn(str(problem))
        scored = _scored(opened, opened.model(), one)
        slices, unsliced = _slices(options.by, scored, one)
        against = [_against(opened, name, other, wish, (scored, one)) for name, other in others]
        made = Evaluation(opened, _title(wish), _data(wish, one), options.overrides, scored, slices, unsliced, against)
        document = made.as_json()
        if show is not None:
            show(document, opened.recipe.task.headline)
        return document, made.write(document, one.key)


EXTRA = ("roc_auc", "r2")
"""Metrics that are shown early beside a task's headline."""


def _shared(overrides: Sequence[str]) -> list[str]:
    """Overrides that another run gets too: not those about this one's base model."""
    return [word for word in overrides if not word.startswith("model.")]


def _wish(options: Options, recipe: Recipe) -> Wish:
    if options.files and options.split is not None:
        raise RecipeError("--data and --split exclude each other; give one")
    split = options.split
    if not options.files and split is None:
        split = "test" if recipe.data.test is not None else "validation" if recipe.data.has_validation else None
        if split is None:
            raise RecipeError("the run has no held-out split; give --data FILE, or --split train")
    return Wish(split, options.files, options.by)


def _title(wish: Wish) -> str:
    return wish.split or ", ".join(wish.files)


def _data(wish: Wish, one: OneSplit) -> Mapping[str, Any]:
    report = asdict(one.encoding.report)
    fates = {name: report[name] for name in ("rows", "cut", "dropped", "untrained", "empty", "longest")}
    told = {"name": _title(wish), "split": wish.split, "sources": one.sources}
    return told | fates | {"evaluated": report["kept"]}


def _scored(run: Finished, network: nn.Module, one: OneSplit) -> Scored:
    return score(run, run.serve(network), one)


def _slices(
    columns: Sequence[str], scored: Scored, one: OneSplit
) -> tuple[dict[str, list[Slice]], dict[str, tuple[int, int]]]:
    """The rows by value of each column, the largest slices first, and what is left out."""
    found: dict[str, list[Slice]] = {}
    left: dict[str, tuple[int, int]] = {}
    for column in columns:
        values = np.array([str(value) for value in one.split.rows.select_columns(column)[column][:]], dtype=object)
        kept = values[scored.numbers]
        sizes = Counter(kept.tolist()).most_common()
        found[column] = [Slice(value, scored.only(scored.numbers[kept == value])) for value, _ in sizes[:MOST_SLICES]]
        if len(sizes) > MOST_SLICES:
            left[column] = (len(sizes) - MOST_SLICES, sum(count for _, count in sizes[MOST_SLICES:]))
    return found, left


def _against(run: Finished, name: str, other: Finished, wish: Wish, mine: tuple[Scored, OneSplit]) -> Versus:
    """Score the other model on the same rows, and compare."""
    scored, one = mine
    if name == BASE:
        found = compare(scored, _scored(run, run.base(), one), "the base model")
        if "id2label" in run.recipe.task.model_options(run.targets):
            found.notes.append("what the base lacks of a classifier, it is lent: the trained head")
        return found
    with _same_rows(run, other, wish) as theirs:
        return compare(scored, _scored(other, other.model(), theirs), name)


@contextmanager
def _same_rows(run: Finished, other: Finished, wish: Wish) -> Iterator[OneSplit]:
    """This run's rows, encoded as the other run reads them."""
    own = {name: getattr(other.recipe.data, name) for name in ("max_length", "overlong")}
    training = other.recipe.training.model_copy(update={"seed": run.recipe.training.seed})
    data = run.recipe.data.model_copy(update=own)
    recipe = other.recipe.model_copy(update={"data": data, "training": training})
    with prepare.opened(recipe, other.tokenizer, other.targets, replace(wish, columns=()), log.phase) as one:
        yield one
