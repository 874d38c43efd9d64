"""Text classification: one label a row, several labels a row, or a number (regression); one text or a pair of texts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, assert_never

from pydantic import Field, model_validator

from hf_finetune.badrows import BadRows
from hf_finetune.plugins import Key
from hf_finetune.schema.blocks import Name, Share
from hf_finetune.tasks import _labels as label_values
from hf_finetune.tasks import _labels as reading
from hf_finetune.tasks.base import IGNORE, Collator, Encoded, Rows, Targets, Task, is_blank

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

Weight = Annotated[float, Field(gt=0.0, le=1e6)]


class TextClassification(Task):
    """Assigns labels, or a number, to a text or a pair of texts."""

    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_type: ClassVar[str] = "SEQ_CLS"
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

    text: Name | Annotated[list[Name], Field(min_length=1, max_length=2)]
    """Column of the text, or two columns that are read as a pair, e.g. `[premise, hypothesis]`."""
    label: Annotated[Name | Annotated[list[Name], Field(min_length=2)], Key(finished="name")]
    """Column of the label. For `multi_label`: a column of lists of labels, or a list of columns of 0 and 1."""
    problem: Annotated[Literal["single_label", "multi_label", "regression"], Key(finished="never")] = "single_label"
    """One label a row, any number of labels a row, or a number."""
    labels: Annotated[Annotated[list[Name], Field(min_length=2)] | None, Key(finished="never")] = None
    """Label names in the order of their ids; null reads them off the training data, in sorted order.

    For a column of integers the names are given to 0, 1, 2, ... unless they are integers themselves.
    """
    class_weights: Literal["balanced"] | Annotated[dict[Name, Weight], Field(min_length=1)] | None = None
    """Factor of each label in the training loss, by name, for every label; for `multi_label` of its positive cells.

    `balanced` is rows / (labels * rows of the label) as in scikit-learn, and negatives / positives for `multi_label`.
    """
    label_smoothing: Share = 0.0
    """Share of each target that is spread over all labels (single_label)."""
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Least probability at which a label counts as predicted (multi_label)."""

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        columns = self.columns()
        repeated = next((column for column in columns if columns.count(column) > 1), None)
        if repeated is not None:
            raise ValueError(f"text and label name column {repeated!r} twice; name each column once")
        return self

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
    def best_metrics(self) -> Mapping[str, bool]:  # type: ignore[override]
        """Metrics that may select the best model of this problem -> whether greater is better."""
        lower = {"regression": ["loss", "mse", "rmse", "mae"], "multi_label": ["loss", "hamming_loss"]}
        scores = ["accuracy", "f1_macro", "f1_micro", "f1_weighted", "roc_auc", "pr_auc"]
        greater = {
            "regression": ["pearson", "spearman", "r2"],
            "multi_label": scores,
            "single_label": [*scores, "matthews"],
        }
        return dict.fromkeys(lower.get(self.problem, ["loss"]), False) | dict.fromkeys(greater[self.problem], True)

    def text_columns(self) -> list[str]:
        """The one or two columns of text."""
        return [self.text] if isinstance(self.text, str) else self.text

    def label_columns(self) -> list[str]:
        """The column or columns of labels."""
        return [self.label] if isinstance(self.label, str) else self.label

    def columns(self) -> list[str]:
        """Columns that the data must have; for prediction, those of `text_columns` are enough."""
        return [*self.text_columns(), *self.label_columns()]

    def declares_labels(self) -> bool:
        """With `labels`, columns of 0 and 1, or numbers."""
        return self.labels is not None or isinstance(self.label, list) or self.problem == "regression"

    def targets(self, train: Dataset | IterableDataset) -> Targets:
        """Read the labels off the raw training rows; streamed rows are not read, only their features.

        Raises:
            DataError: A label is missing or unfit, there is only one, or streaming leaves the names unknown.
        """
        if self.problem == "regression":
            return reading.read_numbers(train, str(self.label))
        if isinstance(self.label, list):
            targets = reading.read_cells(train, self.label)
        elif self.problem == "multi_label":
            targets = reading.read_lists(train, self.label, self.labels)
        else:
            targets = reading.read_labels(train, self.label, self.labels)
        if self.class_weights is None:
            return targets
        rows = None if not targets.counts else len(train)
        return reading.weighted(targets, self.class_weights, rows, per_label=self.problem == "multi_label")

    def counted(self, targets: Targets, counts: tuple[int, ...], rows: int) -> Targets:
        """The targets with these counts, and class weights that are balanced by them; see `Task.counted`."""
        targets = super().counted(targets, counts, rows)
        if self.class_weights != "balanced":
            return targets
        return reading.weighted(targets, self.class_weights, rows, per_label=self.problem == "multi_label")

    def model_options(self, targets: Targets) -> dict[str, Any]:
        """`num_labels`, `id2label`, `label2id` and `problem_type` for `from_pretrained`."""
        suffix = "" if self.problem == "regression" else "_classification"
        return {
            "num_labels": len(targets.names),
            "id2label": dict(enumerate(targets.names)),
            "label2id": {name: index for index, name in enumerate(targets.names)},
            "problem_type": self.problem + suffix,
        }

    def encode(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, targets: Targets, max_length: int
    ) -> list[Encoded]:
        """Tokenise a batch of raw rows; without any label column (prediction), the encoded rows have no `labels`.

        Raises:
            RowsError: A text or a label is missing or unfit; every row of the batch of which that is so.
            RecipeError: `max_length` leaves no room for text.
        """
        from hf_finetune.tasks import _texts as texts

        columns: list[list[str]] = []
        labels: Iterable[int | float | list[float]] = ()
        labelled = any(column in rows for column in self.label_columns())
        bad = BadRows()
        for column in self.text_columns():
            with bad.collect():
                columns.append(texts.checked(rows[column], column))
        if labelled:
            with bad.collect():
                labels = self._labels(rows, targets)
        bad.raise_any()
        encoded = texts.tokenize(columns, tokenizer, max_length)
        if labelled:
            special = tokenizer.num_special_tokens_to_add(pair=len(columns) == 2)
            for row, label in zip(encoded, labels, strict=True):
                # A text of which the tokenizer leaves nothing, such as a zero-width space, teaches nothing.
                row["labels"], row["trained"] = label, int(row["length"] > special)
        return encoded

    def blank(self, rows: Rows) -> list[bool]:
        """Which rows lack a text, or one of the pair."""
        columns = [rows[column] for column in self.text_columns()]
        return [any(is_blank(value) for value in values) for values in zip(*columns, strict=True)]

    def _labels(self, rows: Rows, targets: Targets) -> Iterable[int | float | list[float]]:
        """Labels of a batch; where no name is known, as training rows could not be read, ids and cells say nothing."""
        if self.problem == "regression":
            return label_values.numbers(rows[str(self.label)], str(self.label))
        if isinstance(self.label, list):
            return label_values.cells({column: rows[column] for column in self.label})
        if self.problem == "multi_label":
            return label_values.multi_hot(rows[self.label], self.label, targets)
        return label_values.ids(rows[self.label], self.label, targets)

    def collator(self, tokenizer: PreTrainedTokenizerBase, *, packed: bool = False) -> Collator:
        """Pads to the longest row of the batch, on the right."""
        import torch

        from hf_finetune.tasks._texts import PadRows

        if packed:
            raise ValueError("rows of a classifier can't share a sequence")
        label_type = torch.long if self.problem == "single_label" else torch.float32
        # Tensor cores want multiples of 8; elsewhere it is only more padding.
        return PadRows(tokenizer, label_type, 8 if torch.cuda.is_available() else None)

    def masked(self, row: dict[str, Any]) -> dict[str, Any]:
        """A copy of an encoded row whose label counts as nothing."""
        match self.problem:
            case "single_label":
                label: Any = IGNORE
            case "multi_label":
                label = [float(IGNORE)] * len(row["labels"])
            case "regression":
                label = math.nan
            case _:
                assert_never(self.problem)
        return {**row, "labels": label, "trained": 0}

    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Cross-entropy, binary cross-entropy or squared error, summed; see `Task.loss_sum`."""
        from hf_finetune.tasks import _losses as losses

        match self.problem:
            case "single_label":
                return losses.cross_entropy_sum(logits, labels, targets.weights, self.label_smoothing)
            case "multi_label":
                return losses.binary_cross_entropy_sum(logits, labels, targets.weights)
            case "regression":
                return losses.squared_error_sum(logits, labels)
            case _:
                assert_never(self.problem)

    def items(self, labels: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Sum of the rows' class weights, or number of cells, or of rows: the divisor of torch's mean losses."""
        from hf_finetune.tasks import _losses as losses

        match self.problem:
            case "single_label":
                return losses.cross_entropy_items(labels, targets.weights)
            case "multi_label":
                return losses.binary_cross_entropy_items(labels)
            case "regression":
                return losses.squared_error_items(labels)
            case _:
                assert_never(self.problem)

    def eval_rows(
        self, logits: torch.Tensor, labels: torch.Tensor, by_position: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Logits and labels side by side: (B, C + 1), or (B, 2C) for multi_label; float32."""
        import torch

        return torch.cat([logits.float(), labels.reshape(len(logits), -1).float()], dim=1)

    def metrics(self, rows: np.ndarray[Any, Any], targets: Targets) -> dict[str, float]:
        """Metrics of a split; `loss` has neither class weights nor smoothing, so that recipes can be compared."""
        from hf_finetune.tasks import _metrics as metrics

        logits, labels = rows[:, : len(targets.names)], rows[:, len(targets.names) :]
        match self.problem:
            case "single_label":
                return metrics.single_label(logits, labels[:, 0], targets.names)
            case "multi_label":
                return metrics.multi_label(logits, labels, targets.names, self.threshold)
            case "regression":
                return metrics.regression(logits[:, 0], labels[:, 0])
            case _:
                assert_never(self.problem)
