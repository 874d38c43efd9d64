"""Classifiers and regressions over rows of any kind: labels, losses, metrics and answers. Each kind is a subclass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from hf_finetune.config.blocks import Name, Share
from hf_finetune.config.section import TEXT, Key
from hf_finetune.errors import BadRows
from hf_finetune.tasks import _labels, _losses, _shown
from hf_finetune.tasks.base import (
    IGNORE,
    Batch,
    Column,
    Features,
    Judged,
    Loss,
    OutputKind,
    Plot,
    Predictions,
    Rows,
    State,
    Task,
)

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, IterableDataset

    from hf_finetune.tasks._sums import Sums

Weight = Annotated[float, Field(gt=0.0, le=1e6)]


class Classifier(Task):
    """Assigns labels, or a number, to what a row holds. A subclass adds the columns of that, and how they are read."""

    headline: ClassVar[tuple[str, ...]] = (
        "loss",
        "accuracy",
        "f1_macro",
        "matthews",
        "mse",
        "mae",
        "pearson",
        "spearman",
    )

    label: Annotated[Name | Annotated[list[Name], Field(min_length=2)], TEXT, Key(finished="name")]
    """Column of the label. For `multi_label`: a column of lists of labels, or a list of columns of 0 and 1."""
    problem: Annotated[Literal["single_label", "multi_label", "regression"], Key(finished="never")] = "single_label"
    """One label a row, any number of labels a row, or a number."""
    labels: Annotated[Annotated[list[Name], Field(min_length=2)] | None, TEXT, Key(finished="never")] = None
    """Label names in the order of their ids; null reads them off the training data, in sorted order.

    For a column of integers the names are given to 0, 1, 2, ... unless they are integers themselves.
    """
    class_weights: Annotated[Literal["balanced"] | Annotated[dict[Name, Weight], Field(min_length=1)] | None, TEXT] = (
        None
    )
    """Factor of each label in the training loss, by name, for every label; for `multi_label` of its positive cells.

    `balanced` is rows / (labels * rows of the label) as in scikit-learn, and negatives / positives for `multi_label`.
    """
    label_smoothing: Share = 0.0
    """Share of each target that is spread over all labels (single_label)."""
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Least probability at which a label counts as predicted (multi_label)."""

    @model_validator(mode="after")
    def _label_fits_problem(self) -> Self:
        if self.problem == "regression" and isinstance(self.label, list):
            raise ValueError("label is a list of columns; regression learns one number, so name one column")
        if self.problem == "single_label" and isinstance(self.label, list):
            raise ValueError("label is a list of columns; set problem: multi_label, or name one column")
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError("labels holds a name twice; name each label once")
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> Self:
        if self.labels is not None and self.problem == "regression":
            raise ValueError("labels has no meaning for regression; remove it")
        if self.labels is not None and isinstance(self.label, list):
            raise ValueError("labels would be ignored: the label columns are the names; remove it")
        if self.class_weights is not None and self.problem == "regression":
            raise ValueError("class_weights has no meaning for regression; remove it")
        if self.label_smoothing and self.problem != "single_label":
            raise ValueError(f"label_smoothing has no meaning for {self.problem}; remove it")
        if self.threshold != 0.5 and self.problem != "multi_label":
            raise ValueError(f"threshold has no meaning for {self.problem}; remove it")
        return self

    @property
    def best_metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        """Metrics that may select the best model of this problem."""
        if self.problem == "regression":
            return ("loss", "mse", "rmse", "mae", "pearson", "spearman", "r2")
        only = "matthews" if self.problem == "single_label" else "hamming_loss"
        return ("loss", "accuracy", "f1_macro", "f1_micro", "f1_weighted", "roc_auc", "pr_auc", only)

    @property
    def title(self) -> str:
        """Kind and problem."""
        return f"{self.kind}, {self.problem}"

    def label_columns(self) -> dict[str, Column]:
        """Return the column or columns of labels, or that of the number."""
        names = [self.label] if isinstance(self.label, str) else self.label
        return dict.fromkeys(names, Column("number" if self.problem == "regression" else "label", is_target=True))

    def remedy(self, check: str) -> str | None:
        """Class weights are there for labels of unlike numbers of rows."""
        if check != "imbalance":
            return ""
        return "set task.class_weights: balanced" if self.class_weights is None else None

    def declares_labels(self) -> bool:
        """With `labels`, columns of 0 and 1, or numbers."""
        return self.labels is not None or isinstance(self.label, list) or self.problem == "regression"

    def fit(self, rows: Dataset | IterableDataset, processor: Any) -> State:
        """Read the labels off the raw training rows; streamed rows are not read, only their features.

        Raises:
            DataError: A label is missing or unfit, there is only one, or streaming leaves the names unknown.
        """
        if self.problem == "regression":
            return _labels.read_numbers(rows, str(self.label))
        if isinstance(self.label, list):
            state = _labels.read_cells(rows, self.label)
        elif self.problem == "multi_label":
            state = _labels.read_lists(rows, self.label, self.labels)
        else:
            state = _labels.read_labels(rows, self.label, self.labels)
        if self.class_weights is None:
            return state
        # Streamed rows can be read once, so nobody has counted them.
        count = None if not state.counts else len(rows)
        return _labels.weighted(state, self.class_weights, count, per_label=self.problem == "multi_label")

    def refit(self, state: State, counts: tuple[int, ...], rows: int) -> State:
        """Return the state with these counts, and class weights that are balanced by them; see `Task.refit`."""
        # Rows that were dropped must not weigh: the weights balance what is trained on.
        state = super().refit(state, counts, rows)
        if self.class_weights != "balanced":
            return state
        return _labels.weighted(state, self.class_weights, rows, per_label=self.problem == "multi_label")

    def model_options(self, state: State) -> dict[str, Any]:
        """Return `num_labels`, `id2label`, `label2id` and `problem_type` for `from_pretrained`."""
        suffix = "" if self.problem == "regression" else "_classification"
        return {**_labels.model_options(state), "problem_type": self.problem + suffix}

    def labels_of(self, rows: Rows, state: State) -> Iterable[int | float | list[float]]:
        """Labels of a batch; where no name is known, as training rows could not be read, ids and cells say nothing."""
        if self.problem == "regression":
            return _labels.numbers(rows[str(self.label)], str(self.label))
        if isinstance(self.label, list):
            return _labels.cells({column: rows[column] for column in self.label})
        if self.problem == "multi_label":
            return _labels.multi_hot(rows[self.label], self.label, state)
        return _labels.ids(rows[self.label], self.label, state)

    def labelled(self, rows: Rows, state: State, read: Callable[[BadRows], list[Features]]) -> list[Features]:
        """Return what `read` makes of rows of files, which are never cut, with their labels where they have any.

        Raises:
            RowsError: A file or a label is missing or unfit; every row of which that is so.
        """
        bad, labels, is_labelled = BadRows(), list[Any](), any(column in rows for column in self.label_columns())
        found = read(bad)
        if is_labelled:
            with bad.collect():
                labels = list(self.labels_of(rows, state))
        bad.raise_any()
        for row in found:
            row |= {"whole": row["size"], "weight": int(is_labelled)}
        for row, label in zip(found, labels, strict=False):
            row["labels"] = label
        return found

    def label_batch(self, features: list[Any]) -> Batch:
        """Return the `labels` of a batch, (B,) or (B, C), where its rows have them."""
        import torch

        if "labels" not in features[0]:
            return {}
        dtype = torch.long if self.problem == "single_label" else torch.float32
        return {"labels": torch.tensor([row["labels"] for row in features], dtype=dtype)}

    def example_labels(self, state: State) -> dict[str, Any]:
        """Return the cells of the label columns of an example."""
        if self.problem == "regression":
            return {str(self.label): 0.5}
        if isinstance(self.label, list):
            return dict.fromkeys(self.label, 0)
        first = next(iter(state.id_of), "")
        return {self.label: [first] if self.problem == "multi_label" else first}

    def count(self, batch: Batch, state: State) -> torch.Tensor:
        """Sum of the rows' class weights, or number of cells, or of rows: the divisor of torch's mean losses."""
        labels = batch["labels"]
        if self.problem == "single_label":
            return _losses.cross_entropy_items(labels, state.weights)
        if self.problem == "multi_label":
            return _losses.binary_cross_entropy_items(labels)
        return _losses.squared_error_items(labels)

    def loss(self, model: Callable[..., Any], batch: Batch, state: State) -> Loss:
        """Return cross-entropy, binary cross-entropy or squared error, summed."""
        logits, labels = model(**self.inputs(batch)).logits, batch["labels"]
        if self.problem == "single_label":
            return Loss(_losses.cross_entropy_sum(logits, labels, state.weights, self.label_smoothing))
        if self.problem == "multi_label":
            return Loss(_losses.binary_cross_entropy_sum(logits, labels, state.weights))
        return Loss(_losses.squared_error_sum(logits, labels))

    def predict(
        self, model: Callable[..., Any], batch: Batch, state: State, totals: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return `logits` (B, C) float32, and the `labels`, if known, as they were collated."""
        # NumPy, which metrics are computed with, has no bfloat16.
        found = {"logits": model(**self.inputs(batch)).logits.float()}
        return {**found, "labels": batch["labels"]} if "labels" in batch else found

    def metrics(self, predictions: Predictions, state: State) -> dict[str, float]:
        """Metrics of a split; `loss` has neither class weights nor smoothing, so that recipes can be compared."""
        from hf_finetune.tasks import _metrics

        logits, labels = predictions["logits"], predictions["labels"]
        if self.problem == "single_label":
            return _metrics.single_label(logits, labels, state.names)
        if self.problem == "multi_label":
            return _metrics.multi_label(logits, labels, state.names, self.threshold)
        return _metrics.regression(logits[:, 0], labels)

    def sums(self, predictions: Predictions, state: State) -> Sums:
        """Return the sums of which loss, accuracy, F1 and the errors of a regression are made."""
        from hf_finetune.tasks import _sums

        logits, labels = predictions["logits"], predictions["labels"]
        if self.problem == "single_label":
            return _sums.of_labels(logits, labels, state.names)
        if self.problem == "multi_label":
            return _sums.of_cells(logits, labels, state.names, self.threshold)
        return _sums.of_numbers(logits[:, 0], labels)

    def judge(self, predictions: Predictions, state: State) -> Judged:
        """Predicted beside true labels; of several labels, how sure the model was of the one most surely wrong."""
        import numpy as np

        from hf_finetune.tasks import _metrics, _sums

        logits, labels = predictions["logits"].astype(np.float64), predictions["labels"]
        # A regression without a truth has NaN, the others `IGNORE`.
        known = ~np.isnan(labels) & (labels != IGNORE)
        places = np.flatnonzero(known if labels.ndim == 1 else known.all(axis=1))
        logits, labels = logits[places], labels[places]
        if self.problem == "regression":
            error = np.abs(logits[:, 0] - labels)
            return Judged(places, _numbers(labels), _numbers(logits[:, 0]), error, error > 0)
        names = state.names
        probabilities, chosen = _sums.decide(self.problem, logits, self.threshold)
        if self.problem == "multi_label":
            truth = labels > 0.5
            # A label that was left out was left out with 1 - p.
            sure = np.where(chosen, probabilities, 1 - probabilities)
            wrong = chosen != truth
            confidence = np.where(wrong, sure, 0.0).max(axis=1, initial=0.0)
            right, found = ([", ".join(_metrics.named(row, names)) for row in cells] for cells in (truth, chosen))
            return Judged(places, right, found, confidence, wrong.any(axis=1), "accuracy")
        ids = labels.astype(int)
        right, found = ([names[index] for index in column] for column in (ids, chosen))
        return Judged(places, right, found, probabilities.max(axis=1, initial=0.0), chosen != ids, "accuracy")

    def plots(self, predictions: Predictions, state: State) -> Plot:
        """Return logits and labels side by side."""
        import numpy as np

        logits, labels = predictions["logits"], predictions["labels"]
        # Records of all evaluations are kept: float32 halves them, and draws the same.
        rows = np.concatenate([logits, labels.reshape(len(logits), -1)], axis=1).astype(np.float32)
        return Plot(self.problem, rows, self.threshold if self.problem == "multi_label" else None)

    def outputs(self, state: State) -> dict[str, OutputKind]:
        """Return `label`, `score` and `probability.NAME` of each label; `value` for a regression."""
        if self.problem == "regression":
            return {"value": "number"}
        label: OutputKind = "texts" if self.problem == "multi_label" else "text"
        probabilities: dict[str, OutputKind] = {f"probability.{name}": "number" for name in state.names}
        return {"label": label, "score": "number", **probabilities}

    def decode(self, predictions: Predictions, state: State) -> list[dict[str, Any]]:
        """Return labels with their probabilities, or numbers."""
        import numpy as np

        from hf_finetune.tasks import _metrics, _sums

        logits = predictions["logits"].astype(np.float64)
        _shown.check_finite(logits)
        if self.problem == "regression":
            return [{"value": _shown.short(value)} for value in logits[:, 0].tolist()]
        outputs, names = [], state.names
        for row, shares, decision in zip(logits, *_sums.decide(self.problem, logits, self.threshold), strict=True):
            best = int(row.argmax())
            label: Any = names[decision] if self.problem == "single_label" else _metrics.named(decision, names)
            each = {f"probability.{name}": _shown.short(p) for name, p in zip(names, shares.tolist(), strict=True)}
            outputs.append({"label": label, "score": _shown.short(float(shares[best])), **each})
        return outputs

    def answer_code(self) -> str:
        """Return Python for the card that prints the answer which `logits` stand for."""
        if self.problem == "single_label":
            return "print(model.config.id2label[int(logits.argmax())])"
        if self.problem == "multi_label":
            return (
                "probabilities = logits.sigmoid()[0].tolist()\n"
                f"print([model.config.id2label[i] for i, p in enumerate(probabilities) if p >= {self.threshold!r}])"
            )
        return "print(float(logits))"


def _numbers(values: Any) -> list[str]:
    return [f"{value:.6g}" for value in values.tolist()]
