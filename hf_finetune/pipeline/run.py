"""Use a finished run: evaluate, predict, merge, push. Weights load when they are needed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from hf_finetune import log
from hf_finetune.data.readers import Row
from hf_finetune.errors import DataError, Problem
from hf_finetune.log.text import number
from hf_finetune.recipe import Recipe
from hf_finetune.run import journal
from hf_finetune.run.folder import RunFolder

if TYPE_CHECKING:  # `train` makes a `Run`, too, and needs nothing of what opens one
    from hf_finetune.inference.merge import Report
    from hf_finetune.inference.predict import Predictor
    from hf_finetune.reports.outcome import Outcome

Data = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]
Rows = Iterable[Mapping[str, Any] | str]
"""Rows as dicts of columns, or as plain texts where the model reads one column."""


class Run:
    """A finished run: what `train` returns and `load_run` opens.

    >>> run = load_run("runs/quickstart")
    >>> run.metrics["validation"]["accuracy"]
    >>> run.predict(["what a lovely film"])
    [{'label': 'positive', 'score': 0.98, 'probability.negative': 0.02, 'probability.positive': 0.98}]

    Args:
        path: The run folder.
        recipe: As it was resolved for the run.
        outcome: What only the process knows that trained: machine, prepared data, rates.
        overrides: Each `key.path=value`, for evaluation and prediction, e.g. where the base model is now.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        recipe: Recipe,
        outcome: Outcome | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        self.folder = Path(path)
        """The run folder."""
        self.recipe = recipe
        self.outcome = outcome
        self.overrides = tuple(overrides)
        self._predictors: dict[int | None, Predictor] = {}

    def __repr__(self) -> str:
        shown = [name for name in self.recipe.task.headline if name in next(iter(self.metrics.values()), {})]
        scores = [f"{split} {name} {number(found[name])}" for split, found in self.metrics.items() for name in shown]
        return f"<Run {self.folder}: {', '.join(scores) or 'no metrics'}>"

    @property
    def adapter(self) -> Path:
        """The folder with the adapter, its tokenizer and its model card: what `push` uploads."""
        return self.folder / "adapter"

    @cached_property
    def metrics(self) -> dict[str, dict[str, float]]:
        """The final metrics by split: `run.metrics["validation"]["accuracy"]`."""
        # The process that trained has them in memory, and needs no file for them.
        if self.outcome is not None:
            return self.outcome.scores
        from hf_finetune.reports.run import RunData

        return RunData.read(RunFolder(str(self.folder)), self.recipe).scores

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: `step`, `epoch`, `phase` (train, eval, test, summary), and what was logged."""
        return journal.read(RunFolder(str(self.folder)).metrics)

    def evaluate(
        self,
        data: Data | None = None,
        *,
        split: Literal["train", "validation", "test"] | None = None,
        by: Sequence[str] = (),
        against: Sequence[str | os.PathLike[str]] = (),
    ) -> dict[str, Any]:
        """Score the run on labelled rows, with 95 % bootstrap intervals; the document is kept in `evaluations/`, too.

        >>> run.evaluate(split="validation")["metrics"]["accuracy"]
        {'value': 0.91, 'low': 0.86, 'high': 0.95}

        Args:
            data: Files, or a glob; None takes a split of the recipe.
            split: Of the recipe; None takes the test split, else the validation split.
            by: Columns; metrics are given for each value, too.
            against: Run folders, `base`, or `bm25` where documents are ranked, to compare with on the same rows.

        Returns:
            The document that `hf-finetune evaluate --format json` prints.

        Raises:
            FinetuneError: The data, the base model or another run can't be used.
        """
        from hf_finetune.inference import opening

        # Everything that can be wrong is said before torch loads.
        files = _words(data)
        names = [os.fspath(other) for other in against]
        look_at = split or opening.HELD_OUT
        opening.look(str(self.folder), self.overrides, others=names, files=files, split=look_at, columns=by)
        from hf_finetune.inference.evaluate import evaluate

        with log.quietly():
            return evaluate(str(self.folder), self.overrides, files=files, split=split, by=by, against=names)

    def predict(self, rows: Rows, *, max_new_tokens: int | None = None) -> list[dict[str, Any]]:
        """Predict rows: label, score and probabilities, a number, or generated text, in their order.

        Args:
            rows: Dicts with the task's columns, or texts where the model reads one column.
            max_new_tokens: Most tokens of a generated answer.

        Raises:
            DataError: A row lacks a column, or can't be read; `problems` has one for each such row.
            FinetuneError: The base model can't be used.
        """
        given = list(rows)
        lines = bool(given) and all(isinstance(row, str) for row in given)
        from hf_finetune.inference import opening, predict
        from hf_finetune.inference.load import open_run
        from hf_finetune.inference.rows import LINE

        found: list[dict[str, Any]] = []
        with log.quietly():
            # Weights stay loaded for the next call; the length of answers is fixed when a predictor is made.
            if max_new_tokens not in self._predictors:
                opening.look(str(self.folder), self.overrides)
                opened = open_run(str(self.folder), self.overrides)
                self._predictors[max_new_tokens] = predict.make(opened, max_new_tokens)
            made = self._predictors[max_new_tokens]
            for start in range(0, len(given), made.window):
                window = [
                    Row(start + number, {LINE: row} if isinstance(row, str) else row)
                    for number, row in enumerate(given[start : start + made.window], start=1)
                ]
                predicted = made.predict(window, lines=lines)
                faults = [(row.number, fault) for row, fault in zip(window, predicted.faults, strict=True) if fault]
                if faults:
                    raise DataError(Problem(fault, file="rows", line=number) for number, fault in faults)
                found += [output for output in predicted.outputs if output is not None]
        return found

    def merge(self, to: str | os.PathLike[str], *, data: Data | None = None, **options: Any) -> Report:
        """Write a plain Hugging Face model folder, load it back, and compare it with the run on real rows.

        >>> run.merge(to="merged", dtype="bf16").metrics["merged"]["accuracy"]

        Args:
            to: The folder to make.
            data: Files with rows to compare on, in place of the run's own.
            **options: Others of `hf-finetune merge`: `dtype`, `shard_size`, `tolerance`, `overwrite`, `rows`,
                `quantize`, `onnx`.

        Returns:
            What was made, with its metrics.

        Raises:
            FinetuneError: Something does not load, or is not the run's model.
        """
        from hf_finetune.inference import merge as inference_merge
        from hf_finetune.inference import opening

        files = _words(data)
        opening.look(str(self.folder), self.overrides, files=files)
        asked = inference_merge.Options(to=os.fspath(to), data=tuple(files), **options)
        with log.quietly():
            return inference_merge.merge(str(self.folder), asked, self.overrides)

    def push(self, repo: str | None = None, **options: Any) -> None:
        """Upload `adapter/` to the Hub; the same content twice makes no second commit.

        Args:
            repo: `owner/name`; None takes that of the recipe.
            **options: Others of the recipe's `hub` block: `private`, `as_pr`, `tag`, `timeout`.

        Raises:
            PushError: It was not uploaded; the run is as it was.
        """
        from hf_finetune.hub import push as hub_push

        hub_push.run(str(self.folder), {**({} if repo is None else {"repo": repo}), **options})


def load_run(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Run:
    """Open a finished run; takes a moment, as no weights are loaded yet.

    >>> run = load_run("runs/quickstart")

    Args:
        path: The run folder.
        overrides: Each `key.path=value`, e.g. `model.name=where/the/base/is`; a key of which the trained model depends
            is refused.

    Raises:
        RecipeError: There is no run, or an override is wrong.
        CheckpointError: The run is not finished, or its adapter is missing.
    """
    from hf_finetune.inference import opening

    return Run(path, opening.read(os.fspath(path), overrides), overrides=overrides)


def evaluate(run: Run | str | os.PathLike[str], data: Data | None = None, **options: Any) -> dict[str, Any]:
    """Score a finished run; see `Run.evaluate`."""
    return _opened(run).evaluate(data, **options)


def predict(run: Run | str | os.PathLike[str], rows: Rows, **options: Any) -> list[dict[str, Any]]:
    """Predict rows with a finished run; see `Run.predict`. To predict often, keep the run: it loads its model once."""
    return _opened(run).predict(rows, **options)


def merge(run: Run | str | os.PathLike[str], to: str | os.PathLike[str], **options: Any) -> Report:
    """Write a finished run as a plain model folder; see `Run.merge`."""
    return _opened(run).merge(to, **options)


def push(run: Run | str | os.PathLike[str], repo: str | None = None, **options: Any) -> None:
    """Upload the adapter of a finished run; see `Run.push`."""
    _opened(run).push(repo, **options)


def _opened(run: Run | str | os.PathLike[str]) -> Run:
    return run if isinstance(run, Run) else load_run(run)


def _words(data: Data | None) -> list[str]:
    if data is None:
        return []
    return [os.fspath(data)] if isinstance(data, str | os.PathLike) else [os.fspath(file) for file in data]
