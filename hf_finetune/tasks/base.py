"""What a model is trained to do: one file a task, and the contract that every task keeps.

A task block *is* the task: its fields are the YAML keys, its methods turn rows into tokens, logits into a loss and
predictions into metrics. Heavy libraries are imported inside the methods, so that reading a recipe stays instant.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypedDict

from hf_finetune.plugins import Plugin

if TYPE_CHECKING:
    import numpy as np
    import torch
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

Rows = Mapping[str, list[Any]]
"""A batch of raw rows: column name -> values, as `datasets.map(batched=True)` hands them over."""

Batch = dict[str, "torch.Tensor"]
"""What a collator makes: `input_ids` (rows, tokens), `labels`, and what else the model's forward takes."""

Collator = Callable[[list[dict[str, Any]]], Batch]
"""Turns encoded rows into one padded batch."""

IGNORE = -100
"""Label of a position, or of a whole row, that is not trained on."""


REMARKS = {"dropped_reasoning": 1 << 8, "dropped_keys": 1 << 9, "split_token": 1 << 10}
"""Check of `data.checks` that counts what was noticed while a row was encoded -> its bit."""


def is_blank(value: Any) -> bool:
    """Whether a cell is null, NaN, blank text or an empty list."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or (isinstance(value, float) and math.isnan(value))


class Encoded(TypedDict, total=False):
    """One encoded row. `token_type_ids` only where the model takes them."""

    input_ids: list[int]
    token_type_ids: list[int]
    labels: int | float | list[int] | list[float]
    length: int
    """Tokens of the whole row, before anything was cut."""
    trained: int
    """Items of this row that the loss counts: 1 for a classifier's row, the trained tokens for a language model."""
    remarks: int
    """Bits of `REMARKS`: what was noticed while the row was encoded; absent where nothing can be."""


@dataclass(frozen=True)
class Targets:
    """What the training data say about the labels; saved with the model and shown in every report."""

    names: tuple[str, ...] = ()
    """Label names in the order of their ids; empty for tasks without labels."""
    counts: tuple[int, ...] = ()
    """Rows per label that are trained on, in the same order."""
    weights: tuple[float, ...] = ()
    """Class weights, in the same order; empty for equal weights."""
    id_of: Mapping[Any, int] = field(default_factory=dict)
    """Id of each raw label value, as it stands in the data."""


class Task(Plugin):
    """The contract. Shapes: B rows, T tokens, C labels, V vocabulary."""

    auto_model: ClassVar[str]
    """The transformers Auto class, e.g. `AutoModelForCausalLM`."""
    peft_type: ClassVar[str]
    """PEFT's name of the task, e.g. `SEQ_CLS`."""
    packable: ClassVar[bool] = False
    """Whether several rows may share one sequence."""
    best_metrics: ClassVar[Mapping[str, bool]] = {"loss": False}
    """Metrics that may select the best model -> whether greater is better."""
    headline: ClassVar[tuple[str, ...]] = ("loss",)
    """Metrics that are printed, in this order, where they exist."""

    def ignored(self, *, validation: bool, test: bool) -> str | None:
        """A setting that a run with these held-out splits would not use, as `key: why; what to do`, or None."""
        return None

    @abstractmethod
    def columns(self) -> list[str]:
        """Columns that the data must have."""

    def text_columns(self) -> list[str]:
        """The columns that hold text, whatever it looks like: digits of a csv file stay as they are written."""
        return self.columns()

    def optional_columns(self) -> list[str]:
        """The columns that a row may lack."""
        return []

    def declares_labels(self) -> bool:
        """Whether the recipe says what may stand in the label columns; else the training rows show it."""
        return True

    def on(self, day: str, tokenizer: PreTrainedTokenizerBase) -> Self:
        """The task with all that depends on the day on which its run begins, as YYYY-MM-DD; most depend on none."""
        return self

    def blank(self, rows: Rows) -> list[bool]:
        """Which rows of a batch hold nothing to read: a null or blank text, completion or chat."""
        return [False] * len(next(iter(rows.values()), []))

    def endings(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """Tokens one of which every row that is not cut should train near its end; empty where there is no such."""
        return frozenset()

    @abstractmethod
    def targets(self, train: Dataset | IterableDataset) -> Targets:
        """Read the labels off the raw training rows.

        Raises:
            DataError: The label column does not hold what the recipe says.
        """

    def counted(self, targets: Targets, counts: tuple[int, ...], rows: int) -> Targets:
        """The targets once rows that can't be used are dropped: their counts, and what follows from them.

        Args:
            targets: What `targets` read off all training rows.
            counts: Rows per label that are trained on, in the order of `targets.names`.
            rows: Rows that are trained on.

        Raises:
            DataError: The counts leave something undefined.
        """
        return replace(targets, counts=counts)

    @abstractmethod
    def model_options(self, targets: Targets) -> dict[str, Any]:
        """Keyword arguments for `from_pretrained`, e.g. `num_labels`, `id2label`, `problem_type`."""

    @abstractmethod
    def encode(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, targets: Targets, max_length: int
    ) -> list[Encoded]:
        """Tokenise a batch of raw rows, in order, one `Encoded` each, cut to `max_length` tokens.

        Raises:
            RowsError: Rows can't be encoded; all of them, by their number within the batch.
        """

    def remark(self, row: Rows, tokenizer: PreTrainedTokenizerBase, check: str) -> str:
        """What exactly was noticed in a row that `check`, a key of `REMARKS`, counts; empty if there is no more to say.

        Args:
            row: A batch of one raw row.
            tokenizer: The model's.
            check: The check.
        """
        return ""

    @abstractmethod
    def collator(self, tokenizer: PreTrainedTokenizerBase, *, packed: bool = False) -> Collator:
        """The function that pads rows to one batch; with `packed`, each row is a list of encoded documents."""

    @abstractmethod
    def masked(self, row: dict[str, Any]) -> dict[str, Any]:
        """A copy of an encoded row whose labels all count as nothing: it fills a rank that ran out of rows."""

    @abstractmethod
    def loss_sum(self, logits: torch.Tensor, labels: torch.Tensor, targets: Targets) -> torch.Tensor:
        """Loss summed over the items of a micro-batch, a float32 scalar.

        The trainer divides by `items` of the *global* batch, so the optimisation does not depend on how that batch
        is cut into ranks and micro-batches.

        Args:
            logits: (B, C) or (B, T, V).
            labels: (B,), (B, C) or (B, T), as collated.
            targets: Label names and class weights.
        """

    @abstractmethod
    def items(self, labels: torch.Tensor, targets: Targets) -> torch.Tensor:
        """The divisor that belongs to `loss_sum`: counted rows, cells or tokens, weighted like the loss; a scalar."""

    @abstractmethod
    def eval_rows(
        self, logits: torch.Tensor, labels: torch.Tensor, by_position: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What `metrics` needs of each evaluated row, (B, K) float32; never whole logits of (B, T, V).

        Args:
            logits: (B, C) or (B, T, V).
            labels: As collated.
            by_position: Sums (2, T) that each counted token adds to: its nats, and 1. Tasks without a loss of tokens
                leave them as they are.
        """

    @abstractmethod
    def metrics(self, rows: np.ndarray[Any, Any], targets: Targets) -> dict[str, float]:
        """Metrics of a whole split.

        Args:
            rows: (N, K), every row of `eval_rows`, in the order of the split.
            targets: Label names and class weights.

        Returns:
            `loss` and the task's own metrics; a metric that is undefined on this split is left out.
        """

    def questions(self, rows: Dataset | None, tokenizer: PreTrainedTokenizerBase) -> Questions | None:
        """What the model is asked at each evaluation of a split, from its raw rows; None where nothing is."""
        return None


@dataclass(frozen=True)
class Questions:
    """Prompts whose answers are generated and compared."""

    prompts: list[list[int]]
    """Token ids, one list a prompt."""
    max_new_tokens: int
    score: Callable[[list[Any]], dict[str, float]]
    """Metrics of the `Generation`s, in the order of `prompts`."""
    each: Callable[[list[Any]], dict[str, list[float]]]
    """The values of which these are the means, one a `Generation`."""
