"""Predicts windows of rows: labels, numbers or generated text; what is wrong with a row is told, not raised."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from hf_finetune.data import batches as data_batches
from hf_finetune.data.job import EvalBatch, eval_batch
from hf_finetune.data.readers import Row
from hf_finetune.errors import RecipeError, RowsError
from hf_finetune.inference.rows import LINE
from hf_finetune.tasks.base import OutputKind, Task

if TYPE_CHECKING:
    from hf_finetune.inference.load import Finished, Serving

Outputs = dict[str, Any]
"""Output columns of a row, by their plain names."""

LABELLED, GENERATED = 1024, 128
"""Rows of a window."""
CHARACTERS = 1 << 23
"""Of the texts of a window: a longer one ends sooner."""


@dataclass(frozen=True)
class Predicted:
    """What became of a window; lists have one entry a row."""

    outputs: list[Outputs | None]
    """None where a row has a fault."""
    faults: list[str]
    """Empty text where there is none."""
    cut: int = 0
    """Rows that were over-long and cut, or left no room for an answer."""


class Predictor(ABC):
    """Predicts windows of rows.

    Args:
        run: The run.
        served: Its model.
    """

    window: int
    """Rows of a window."""
    cut_means: str
    """What `cut` counts, for people."""

    def __init__(self, run: Finished, served: Serving) -> None:
        self.run, self.served, self.task = run, served, cast("Any", run.recipe.task)

    @property
    def needed(self) -> list[str]:
        """Columns that a row must have."""
        return self.run.recipe.task.asked_columns()

    @property
    @abstractmethod
    def kinds(self) -> Mapping[str, OutputKind]:
        """Output columns by their plain names."""

    @abstractmethod
    def _encoded(self, columns: dict[str, list[Any]]) -> list[Any]:
        """Rows that are all well.

        Raises:
            RowsError: They are not.
        """

    @abstractmethod
    def _predict(self, encoded: list[Any]) -> tuple[list[Outputs], int]:
        """Outputs in order, and how many rows were cut."""

    def column_of_lines(self) -> str:
        """The column that a plain line stands for.

        Raises:
            RecipeError: There are several.
        """
        if len(self.needed) != 1:
            names = ", ".join(self.needed)
            raise RecipeError(f"a plain line is one text, and this model reads {names}; give csv, jsonl or parquet")
        return self.needed[0]

    def predict(self, rows: Sequence[Row], *, lines: bool) -> Predicted:
        """Predict a window.

        Args:
            rows: As they were read.
            lines: Whether they are plain lines.
        """
        faults = [row.fault for row in rows]
        fit = [index for index, fault in enumerate(faults) if not fault]
        columns = self._columns([rows[index] for index in fit], lines=lines)
        encoded: list[Any] = []
        while fit:
            try:
                encoded = self._encoded(columns)
                break
            except RowsError as error:
                for what, struck in error.found.items():
                    for index in struck:
                        faults[fit[index]] = faults[fit[index]] or what
                kept = [index for index, place in enumerate(fit) if not faults[place]]
                fit = [fit[index] for index in kept]
                columns = {name: [values[index] for index in kept] for name, values in columns.items()}
        outputs: list[Outputs | None] = [None] * len(rows)
        found, cut = self._predict(encoded) if fit else ([], 0)
        for index, output in zip(fit, found, strict=True):
            outputs[index] = output
        return Predicted(outputs, faults, cut)

    def _columns(self, rows: Sequence[Row], *, lines: bool) -> dict[str, list[Any]]:
        optional = self.run.recipe.task.optional_columns()
        if lines:
            lacking: dict[str, list[Any]] = {name: [None] * len(rows) for name in optional}
            return {self.column_of_lines(): [row.cells[LINE] for row in rows]} | lacking
        return {name: [row.cells.get(name) for row in rows] for name in (*self.needed, *optional)}


class Labels(Predictor):
    """Answers that follow from one forward pass a row: labels, numbers, tags."""

    window = LABELLED
    cut_means = "cut to data.max_length"

    def __init__(self, run: Finished, served: Serving) -> None:
        super().__init__(run, served)
        self.most: EvalBatch = eval_batch(run.recipe, run.machine, run.recipe.task.vocabulary(run.tokenizer))

    @property
    def kinds(self) -> Mapping[str, OutputKind]:
        """As the task names them."""
        return self.run.recipe.task.outputs(self.run.targets)

    def _encoded(self, columns: dict[str, list[Any]]) -> list[Any]:
        longest = self.run.recipe.data.max_length
        encoded: list[Any] = self.task.features(columns, self.run.tokenizer, self.run.targets, longest)
        if self.run.recipe.data.overlong == "error":
            over = [index for index, row in enumerate(encoded) if row["whole"] > longest]
            if over:
                raise RowsError({f"has more than {longest} tokens; give data.overlong=truncate": over})
        return encoded

    def _predict(self, encoded: list[Any]) -> tuple[list[Outputs], int]:
        run, sizes = self.run, [row["size"] for row in encoded]
        batches = (
            {
                **self.task.collate([encoded[index] for index in batch], run.tokenizer, run.targets),
                "row_ids": torch.tensor(batch),
            }
            for batch in data_batches.by_length(sizes, self.most.rows, self.most.budget(all_logits=False))
        )
        made = data_batches.predicted(batches, self.served.predict)
        over = sum(row["whole"] > run.recipe.data.max_length for row in encoded)
        return self.task.decode(made, run.targets), over


class Answers(Predictor):
    """What a language model writes."""

    window = GENERATED
    cut_means = "whose prompt leaves the model no room for an answer"

    def __init__(self, run: Finished, served: Serving, max_new_tokens: int | None) -> None:
        super().__init__(run, served)
        self.max_new_tokens = max_new_tokens or self.task.max_new_tokens

    def _columns(self, rows: Sequence[Row], *, lines: bool) -> dict[str, list[Any]]:
        """A plain line of a model of chats is what the user says."""
        columns = super()._columns(rows, lines=lines)
        name = self.needed[0]
        if lines and self.task.columns()[name].kind == "chat":
            columns[name] = [[{"role": "user", "content": text}] for text in columns[name]]
        return columns

    @property
    def kinds(self) -> Mapping[str, OutputKind]:
        """`generated`, and whether the model ended it itself."""
        return {"generated": "text", "ended": "truth"}

    def _encoded(self, columns: dict[str, list[Any]]) -> list[Any]:
        return self.run.recipe.task.ask(columns, self.run.tokenizer)

    def _predict(self, encoded: list[Any]) -> tuple[list[Outputs], int]:
        from hf_finetune.tasks._generation import BATCH, generate

        rows = self.run.recipe.training.eval_batch
        with self.served.running():
            found = generate(
                self.served.network,
                self.run.tokenizer,
                encoded,
                max_new_tokens=self.max_new_tokens,
                batch_size=BATCH if rows == "auto" else rows,
            )
        outputs: list[Outputs] = [{"generated": answer.text, "ended": answer.ended} for answer in found]
        return outputs, sum(answer.tokens == 0 for answer in found)


def needed_columns(task: Task) -> list[str]:
    """The columns that a row must have to be predicted."""
    return task.asked_columns()


def make(run: Finished, max_new_tokens: int | None) -> Predictor:
    """The predictor for a run's task; loads its model.

    Raises:
        RecipeError: The run generates nothing, and tokens are asked for.
        ModelError: The model can't be loaded.
    """
    if run.recipe.task.generates:
        return Answers(run, run.serve(run.model()), max_new_tokens)
    if max_new_tokens is not None:
        raise RecipeError("--max-new-tokens is for language models; leave it out")
    return Labels(run, run.serve(run.model()))
