"""`hf-finetune evaluate`: score a finished run on any rows, by slice, against its base or other runs, or by lm-eval."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np

from hf_finetune import log
from hf_finetune.config.paths import refuse_outside
from hf_finetune.data import prepare
from hf_finetune.data.batches import rows_of
from hf_finetune.data.job import eval_batch
from hf_finetune.data.prepare import OneSplit
from hf_finetune.device import is_out_of_memory
from hf_finetune.errors import DataError, DivergedError, OutOfMemoryError, RecipeError
from hf_finetune.inference import document as inference_document
from hf_finetune.inference.load import Finished, Serving, open_run
from hf_finetune.log import phase, text
from hf_finetune.log.lines import jsonable
from hf_finetune.reports import intervals as reports_intervals
from hf_finetune.reports.intervals import Intervals
from hf_finetune.tasks._catalogue import METRICS
from hf_finetune.tasks._sums import Sums
from hf_finetune.tasks.base import Predictions, State, Task

# `--against` calls the model by this name before it was trained.
BASE = "base"
# The largest slices of a column are scored.
MOST_SLICES = 50

Array = np.ndarray[Any, Any]


def evaluate(
    place: str,
    overrides: Sequence[str] = (),
    *,
    files: Sequence[str] = (),
    split: str | None = None,
    by: Sequence[str] = (),
    against: Sequence[str] = (),
    form: str | None = None,
    everything: bool = False,
) -> dict[str, Any]:
    """Evaluate, and keep the document in the run folder.

    Args:
        place: The run folder.
        overrides: Each `key.path=value`.
        files: Labelled rows in place of a split.
        split: Of the recipe; by default the test split, else the validation split.
        by: Columns by whose values the rows are sliced.
        against: Run folders, `base`, or yardsticks of the task, e.g. `bm25`.
        form: `text`, `json` or `markdown` prints the document; None does not.
        everything: Print the metrics of each class too.

    Raises:
        RecipeError: There is no such run, split or slice, or an override is wrong.
        FinetuneError: Data or model are unfit, or the document can't be written.
    """
    refuse_outside(("--data", file) for file in files)
    opened = open_run(place, overrides)
    # Another run gets the overrides, too, but for those about this one's base model.
    shared = [word for word in overrides if not word.startswith("model.")]
    own = (BASE, *opened.recipe.task.yardsticks)
    others = [(name, opened if name in own else open_run(name, shared)) for name in against]
    recipe = opened.recipe
    if files and split is not None:
        raise RecipeError("--data and --split exclude each other; give one")
    if not files and split is None:
        split = "test" if recipe.data.test is not None else "validation" if recipe.data.has_validation else None
        if split is None:
            raise RecipeError("the run has no held-out split; give --data FILE, or --split train")
    chosen: dict[str, Any] = {"split": split, "files": files}
    title = split or ", ".join(files)
    with prepare.opened(recipe, opened.tokenizer, opened.targets, columns=by, **chosen) as one:
        for problem in one.warnings:
            log.warn(str(problem))
        scored = score(opened, opened.serve(opened.model()), one)
        slices, left_out = _slices(by, scored, one)
        compared = [_against(opened, name, other, chosen, (scored, one)) for name, other in others]
        fates, whole, machine = asdict(one.encoding.report), scored.intervals(), opened.machine
        document: dict[str, Any] = jsonable(
            {
                "version": inference_document.VERSION,
                "run": str(opened.place),
                "time": datetime.now(UTC).isoformat(timespec="seconds"),
                "task": recipe.task.kind,
                "data": {"name": title, "split": split, "sources": one.sources}
                | {name: fates[name] for name in ("rows", "cut", "dropped", "untrained", "empty", "longest")}
                | {"evaluated": fates["kept"]},
                "settings": {"device": machine.device, "precision": machine.precision, "attention": machine.attention}
                | {"overrides": list(overrides)},
                "intervals": whole.method,
                "signatures": dict(recipe.task.signatures()),
                "metrics": _bounded(scored.metrics(), whole.bounds),
                "slices": slices,
                "slices_not_shown": left_out,
                "against": compared,
            }
        )
        # Printed first: writing may fail.
        if form is not None:
            headline = [*recipe.task.headline, *(name for name, metric in METRICS.items() if metric.is_wide)]
            log.show(inference_document.render(document, form, headline, everything=everything))
        key = [*one.key, *overrides, *slices, *(versus["name"] for versus in compared), *_checkpoint(opened)]
        log.say(f"kept in {inference_document.write(opened.folder.path, title, document, key)}")
        return document


def _checkpoint(opened: Finished) -> list[str]:
    """Name the checkpoint, whose evaluations lie beside those of the run."""
    return [] if opened.checkpoint is None else [opened.checkpoint.name]


def _slices(
    columns: Sequence[str], scored: Scored, one: OneSplit
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, dict[str, int]]]:
    """Return the rows by value of each column, the largest slices first, and how many slices and rows are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    left: dict[str, dict[str, int]] = {}
    for column in columns:
        # As text: a column may hold numbers, null, or lists, and JSON has but text for keys.
        values = np.array([str(value) for value in one.split.rows.select_columns(column)[column][:]], dtype=object)
        kept = values[scored.numbers]
        sizes = Counter(kept.tolist()).most_common()
        found[column] = []
        for value, rows in sizes[:MOST_SLICES]:
            part = scored.only(scored.numbers[kept == value])
            metrics = _bounded(part.metrics(), part.intervals().bounds)
            found[column].append({"value": value, "rows": rows, "metrics": metrics})
        if rest := sizes[MOST_SLICES:]:
            left[column] = {"slices": len(rest), "rows": sum(count for _, count in rest)}
    return found, left


def _against(
    run: Finished, name: str, other: Finished, chosen: dict[str, Any], mine: tuple[Scored, OneSplit]
) -> dict[str, Any]:
    """Score the other model on the same rows, and compare."""
    scored, one = mine
    if name in run.recipe.task.yardsticks:
        whole = run.recipe.task.yardstick(name, one.split.raw())
        predictions = {kind: values[scored.numbers] for kind, values in whole.items()}
        return compare(scored, replace(scored, predictions=predictions), name)
    if name == BASE:
        found = compare(scored, score(run, run.serve(run.base()), one), "the base model")
        if "id2label" in run.recipe.task.model_options(run.targets):
            found["notes"].append("the base has no classifier of its own: it is given the trained head")
        return found
    # This run's rows, drawn with its seed, but cut as the other run reads them.
    own = {key: getattr(other.recipe.data, key) for key in ("max_length", "overlong")}
    data = run.recipe.data.model_copy(update=own)
    training = other.recipe.training.model_copy(update={"seed": run.recipe.training.seed})
    recipe = other.recipe.model_copy(update={"data": data, "training": training})
    with prepare.opened(recipe, other.tokenizer, other.targets, **chosen) as theirs:
        return compare(scored, score(other, other.serve(other.model()), theirs), name)


def _bounded(metrics: Mapping[str, float], bounds: Mapping[str, tuple[float, float]]) -> dict[str, Any]:
    """Return each metric with its interval, where it has one."""
    ends = {name: dict(zip(("low", "high"), bounds[name], strict=True)) for name in metrics if name in bounds}
    return {name: {"value": value} | ends.get(name, {}) for name, value in metrics.items()}


def run_lm_eval(
    place: str,
    overrides: Sequence[str],
    tasks: Sequence[str],
    *,
    folder: str | None = None,
    limit: int | None = None,
    form: str = "text",
) -> None:
    """Run lm-eval (EleutherAI's harness) on a finished run, print the results, and keep them in `RUN/evaluations/`.

    Args:
        place: The run folder.
        overrides: Each `key.path=value`.
        tasks: Names of the harness's tasks.
        folder: Holds tasks that the harness does not ship.
        limit: Rows of each task.
        form: `text`, `json` or `markdown`.
    """
    if folder is not None:
        refuse_outside([("--lm-eval-tasks", folder)])
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError("--lm-eval needs lm-eval: pip install 'hf-finetune[harness]'") from error
    opened = open_run(place, overrides)
    if not opened.recipe.task.predicts_next_token:
        raise RecipeError(f"--lm-eval is for language models, and this run does {opened.recipe.task.kind}")
    manager: Any = TaskManager(include_path=folder)
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise RecipeError(f"lm-eval knows no task {unknown[0]!r}; `lm-eval ls tasks` lists them")
    network: Any = opened.model()
    served = opened.serve(network)
    size = opened.recipe.training.eval_batch
    model: Any = HFLM(pretrained=network, tokenizer=opened.tokenizer, batch_size=8 if size == "auto" else size)
    with log.phase("lm-eval"), served.running():
        found: Any = lm_eval.simple_evaluate(
            model=model, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False
        )
    kept: dict[str, Any] = {
        "version": inference_document.VERSION,
        "run": str(opened.place),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "lm_eval": {"version": lm_eval.__version__, "tasks": list(tasks), "limit": limit},
        "results": json.loads(json.dumps(found["results"], default=str)),
    }
    if form == "json":
        log.show(json.dumps(kept, indent=2, ensure_ascii=False))
    else:
        heads, rows = ["task", "metric", "value", "standard error"], list[list[str]]()
        for task, values in kept["results"].items():
            for key, value in values.items():  # e.g. `acc,none` and `acc_stderr,none`: the metric, and a filter
                name, _, how = key.partition(",")
                if isinstance(value, int | float) and not name.endswith("_stderr") and how:
                    off = values.get(f"{name}_stderr,{how}")
                    shown = text.number(off) if isinstance(off, float) else "-"
                    rows.append([task, name, text.number(value), shown])
        log.show(text.markdown(heads, rows) if form == "markdown" else "\n".join(text.text(heads, [rows])))
    key = [*tasks, str(limit), *overrides, *_checkpoint(opened)]
    file = inference_document.write(opened.folder.path, f"lm-eval-{'-'.join(tasks)}", kept, key)
    log.say(f"kept in {file}")


# Run a model over encoded rows, and keep its predictions for each, so that any part of them can be scored.
# Shapes: N rows, M answers.


@dataclass(frozen=True)
class Scored:
    """A model's predictions for rows, beside the truth."""

    task: Task
    targets: State
    predictions: Predictions  # (N, ...) each
    numbers: Array  # (N,) number of each raw row, from 0
    answered: Array = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    """(M,) numbers of the raw rows whose answers were generated."""
    answers: Sequence[Sums] = ()  # of (M,) rows

    def only(self, numbers: Array) -> Scored:
        """Keep the part that is about some raw rows."""
        kept = np.isin(self.numbers, numbers)
        part = {name: values[kept] for name, values in self.predictions.items()}
        return replace(self, predictions=part, numbers=self.numbers[kept]).answering(numbers)

    def answering(self, numbers: Array) -> Scored:
        """Keep all rows, with the generated answers to some of them."""
        kept = np.isin(self.answered, numbers)
        answers = [sums.only(kept) for sums in self.answers] if kept.any() else []
        return replace(self, answered=self.answered[kept], answers=answers)

    def metrics(self) -> dict[str, float]:
        """Compute the task's metrics; those that are undefined on these rows are left out."""
        found = self.task.metrics(self.predictions, self.targets)
        if not np.isfinite(found.get("loss", 0.0)):
            raise DivergedError(f"the loss on these rows is {found['loss']}; the model gives no finite numbers")
        return found | self.of_answers()

    def of_answers(self) -> dict[str, float]:
        """Compute the metrics of generated answers."""
        return {name: value for sums in self.answers for name, value in sums.whole().items()}

    def sums(self) -> list[Sums]:
        """Return sums over rows from which metrics follow, where they do."""
        of_rows = self.task.sums(self.predictions, self.targets)
        return [*([] if of_rows is None else [of_rows]), *self.answers]

    def intervals(self) -> Intervals:
        """Estimate 95 % bootstrap intervals of those metrics."""
        return reports_intervals.estimate(self.sums())

    def right(self) -> tuple[str, Array, Array] | None:
        """A metric that counts right rows, the numbers of the rows, and which are right; None where none does."""
        for sums in self.answers:
            if "exact_match" in (each := sums.each()):
                return "exact_match", self.answered, each["exact_match"] > 0
        judged = self.task.judge(self.predictions, self.targets)
        if judged is None or not judged.metric:
            return None
        return judged.metric, self.numbers[judged.places], ~judged.wrong


def score(run: Finished, served: Serving, one: OneSplit) -> Scored:
    """Run the model over the rows as training's evaluation does, and generate answers where the task asks."""
    from hf_finetune.tasks._generation import BATCH, generate

    task, all_logits = run.recipe.task, served.paths.makes_all_logits
    encoded: Any = one.encoding.rows()
    scored = Scored(task, run.targets, {}, np.asarray(encoded.select_columns("row")["row"][:], dtype=np.int64))
    try:
        with phase("evaluating", len(encoded), "rows") as shown:
            predictions = run.predictions(encoded, served.predict, shown, all_logits=all_logits)
        scored = replace(scored, predictions=predictions)
        questions = task.questions(one.split.raw(), run.tokenizer, run.recipe.data.max_length)
        if questions is None:
            return scored
        with served.running():
            options: dict[str, Any] = {"max_new_tokens": questions.max_new_tokens, "batch_size": BATCH}
            options["task"] = task
            answers = generate(served.network, run.tokenizer, questions.prompts, **options)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        most = eval_batch(run.recipe, run.machine, task.vocabulary(run.tokenizer), all_logits=all_logits)
        longest = run.recipe.data.max_length
        rows = rows_of(longest, *most)
        message = f"out of memory with {rows} rows of {longest} tokens; give training.eval_batch={max(1, rows // 2)}"
        raise OutOfMemoryError(message) from error
    return replace(scored, answered=np.arange(len(answers)), answers=questions.score(answers))


# Two models on the same rows: differences with paired intervals, and McNemar's test of which is right more often.


def compare(this: Scored, other: Scored, name: str) -> dict[str, Any]:
    """Compare a model with the other one, called `name`, on the rows that both evaluated.

    Returns:
        As the document holds it: how many `rows`, the other's `metrics`, `differences` (this model's less the other's,
        with 95 % intervals where they follow from sums over rows), `mcnemar`, and `notes` about what was left out.
    """
    mine, theirs = (scored.task.title for scored in (this, other))
    if mine != theirs:
        raise RecipeError(f"{name} does {theirs}, this run {mine}; only runs of one task can be compared")
    # Ids of labels may be in another order; metrics go by names.
    names = [set(scored.targets.names) for scored in (this, other)]
    if names[0] != names[1] and max(map(len, names)) > 1:  # a single name is only a column's
        strange = ", ".join(sorted(names[0] ^ names[1])[:5])
        raise RecipeError(f"{name} knows other labels than this run ({strange}); they can't be compared")
    common = np.intersect1d(this.numbers, other.numbers)
    if not len(common):
        raise DataError(f"{name} evaluated none of the rows that this run did; look at what was dropped")
    left_out = len(this.numbers) - len(common)
    notes = [f"{left_out:,} rows are left out: {name} drops them"] if left_out else []
    this, other, unlike = _same_answers(this.only(common), other.only(common), name)
    notes += unlike
    ours, others = this.metrics(), other.metrics()
    tokens = [scored.predictions.get("tokens") for scored in (this, other)]
    if all(count is not None for count in tokens) and not np.array_equal(*tokens):  # type: ignore[arg-type]
        notes.append("loss, perplexity and token_accuracy are not compared: the tokenizers cut texts into other tokens")
        ours = this.of_answers()
    differences = {metric: ours[metric] - others[metric] for metric in ours if metric in others}
    # Both are in the order of the split; masked rows may have been left out of one.
    pairs = zip(this.sums(), other.sums(), strict=True)
    paired = [(one, two) for one, two in pairs if one.of_rows.shape[1] == two.of_rows.shape[1]]
    bounds = reports_intervals.differences(paired).bounds
    found = {"name": name, "rows": len(common), "metrics": others, "mcnemar": mcnemar(this, other), "notes": notes}
    return found | {"differences": _bounded(differences, bounds)}


def _same_answers(this: Scored, other: Scored, name: str) -> tuple[Scored, Scored, list[str]]:
    """Return both with the generated answers that can be compared, and a note about the others."""
    if not this.answers and not other.answers:
        return this, other, []
    common = np.intersect1d(this.answered, other.answered)
    notes = []
    if this.task.answer_rule != other.task.answer_rule:
        common = common[:0]
        notes = [f"generated answers are not compared: {name} has another task.answer_pattern; give one to both"]
    elif not len(common):
        reason = f"{name} and this run answer no row in common"
        notes = [f"generated answers are not compared: {reason}; give task.generate_rows"]
    elif max(len(this.answered), len(other.answered)) > len(common):
        notes = [f"generated answers are compared on the {len(common):,} rows that both answer"]
    return this.answering(common), other.answering(common), notes


def mcnemar(this: Scored, other: Scored) -> dict[str, Any] | None:
    """Return McNemar's exact test (McNemar 1947; two-sided, binomial): do both models err equally often?

    Returns:
        The metric (accuracy or exact_match), rows that `only_this` or `only_other` has right, and the `p_value`; None
        where no row is right or wrong as a whole.
    """
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
    return {"metric": metric, "only_this": only_this, "only_other": only_other, "p_value": p_value}
