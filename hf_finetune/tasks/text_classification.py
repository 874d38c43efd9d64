"""Text classification: one label a row, several labels a row, or a number (regression); one text or a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from hf_finetune.config.blocks import Name
from hf_finetune.config.section import TEXT, refuse_repeated
from hf_finetune.errors import BadRows
from hf_finetune.tasks import _proposals, _texts
from hf_finetune.tasks._classifier import Classifier
from hf_finetune.tasks._proposals import Cells, Proposal
from hf_finetune.tasks.base import Batch, Column, Features, Rows, State

# Names that two columns of a pair mostly have.
PAIRS = (("premise", "hypothesis"), ("sentence1", "sentence2"), ("question1", "question2"), ("text1", "text2"))


class TextClassification(Classifier):
    """Assigns labels, or a number, to a text or a pair of texts."""

    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task: ClassVar[str | None] = "SEQ_CLS"
    pipeline: ClassVar[str] = "text-classification"

    text: Annotated[Name | Annotated[list[Name], Field(min_length=1, max_length=2)], TEXT]
    """Column of the text, or two columns that are read as a pair, e.g. `[premise, hypothesis]`."""

    @classmethod
    def propose(cls, columns: Mapping[str, Cells]) -> Proposal | None:
        """Take a text, or a pair of known names, and classes, lists of labels, or decimals."""
        named = {column.name.lower(): column for column in columns.values() if column.texts}
        pair = next((pair for pair in PAIRS if set(pair) <= set(named)), None)
        text = _proposals.main_text(columns)
        if text is None:
            return None
        read = [named[name] for name in pair] if pair else [text]
        names = [column.name for column in read]
        if (found := _proposals.target(columns, read)) is None:
            return _proposals.one_class({name: cells for name, cells in columns.items() if cells not in read}, names)
        block, says, best = found
        texts = _proposals.joined(columns, names)
        return Proposal(
            {"text": names[0] if len(names) == 1 else names, **block},
            says,
            confidence=0.5,
            used=[*names, block["label"]],
            model=_proposals.encoder(texts),
            texts=texts,
            best_metric=best,
        )

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        refuse_repeated(text=self._texts(), label=self.label_columns())
        return self

    def columns(self) -> dict[str, Column]:
        """Return one or two columns of text, and those of the labels."""
        return {name: Column("text") for name in self._texts()} | self.label_columns()

    def features(self, rows: Rows, processor: Any, state: State, limit: int) -> list[Features]:
        """Tokenise a batch of raw rows; without any label column (prediction), they have no `labels`.

        Raises:
            RowsError: A text or a label is missing or unfit; every row of the batch of which that is so.
            RecipeError: `limit` leaves no room for text.
        """
        columns: list[list[str]] = []
        labels: Any = ()
        labelled = any(column in rows for column in self.label_columns())
        bad = BadRows()
        for column in self._texts():
            with bad.collect():
                columns.append(_texts.checked(rows[column], column))
        if labelled:
            with bad.collect():
                labels = self.labels_of(rows, state)
        bad.raise_any()
        encoded = _texts.tokenize(columns, processor, limit)
        if labelled:
            special = processor.num_special_tokens_to_add(pair=len(columns) == 2)
            for row, label in zip(encoded, labels, strict=True):
                # A text of which the tokenizer leaves nothing, such as a zero-width space, teaches nothing.
                row["labels"], row["weight"] = label, int(row["whole"] > special)
        return encoded

    def collate(self, features: list[Any], processor: Any, state: State) -> Batch:
        """Pad to the longest row of the batch, on the right."""
        return _texts.padded(features, processor) | self.label_batch(features)

    def example(self, state: State, size: int) -> dict[str, Any]:
        """Return words, as many as the tokens that are wanted."""
        return dict.fromkeys(self._texts(), " ".join(["the"] * size)) | self.example_labels(state)

    def usage(self, state: State, processor: Any) -> str:
        """Tokenise a text or a pair, and print the label."""
        texts = '"A text."' if len(self._texts()) == 1 else '"The first text.", "The second."'
        return f'logits = model(**tokenizer({texts}, return_tensors="pt")).logits\n{self.answer_code()}\n'

    def _texts(self) -> list[str]:
        return [self.text] if isinstance(self.text, str) else self.text
