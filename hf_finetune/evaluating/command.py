"""`hf-finetune evaluate`, step by step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_finetune import terminal
from hf_finetune.data import onesplit
from hf_finetune.data.onesplit import OneSplit, Wish
from hf_finetune.errors import RecipeError
from hf_finetune.evaluating import rendering, scoring, versus
from hf_finetune.evaluating.document import Evaluation, Slice
from hf_finetune.finished import Finished, open_run
from hf_finetune.schema.roots import refuse_outside

if TYPE_CHECKING:
    from torch import nn

    from hf_finetune.evaluating.scoring import Scored
    from hf_finetune.evaluating.versus import Versus
    from hf_finetune.recipe import Recipe

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
        terminal.show(rendering.render(document, options.form, headline + EXTRA, everything=options.everything))

    terminal.say(f"kept in {evaluate(options, show)[1]}")


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
    with onesplit.opened(opened.recipe, opened.tokenizer, opened.targets, wish, terminal.phase) as one:
        for problem in one.warnings:
            terminal.warn(str(problem))
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
    return scoring.score(run, run.serve(network), one)


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
        found = versus.compare(scored, _scored(run, run.base(), one), "the base model")
        if "id2label" in run.recipe.task.model_options(run.targets):
            found.notes.append("what the base lacks of a classifier, it is lent: the trained head")
        return found
    with _same_rows(run, other, wish) as theirs:
        return versus.compare(scored, _scored(other, other.model(), theirs), name)


@contextmanager
def _same_rows(run: Finished, other: Finished, wish: Wish) -> Iterator[OneSplit]:
    """This run's rows, encoded as the other run reads them."""
    own = {name: getattr(other.recipe.data, name) for name in ("max_length", "overlong")}
    training = other.recipe.training.model_copy(update={"seed": run.recipe.training.seed})
    data = run.recipe.data.model_copy(update=own)
    recipe = other.recipe.model_copy(update={"data": data, "training": training})
    with onesplit.opened(recipe, other.tokenizer, other.targets, replace(wish, columns=()), terminal.phase) as one:
        yield one
