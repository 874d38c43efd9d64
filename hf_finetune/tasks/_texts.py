"""Tokenises texts, or pairs of texts, for models that read whole rows, and pads the rows to batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hf_finetune.badrows import BadRows
from hf_finetune.errors import Problem, RecipeError
from hf_finetune.tasks.base import Batch, Features

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def checked(values: Sequence[Any], column: str) -> list[str]:
    """The texts of a column.

    Raises:
        RowsError: Some are null, empty or no text; rows are counted from 0.
    """
    bad = BadRows()
    for row, value in enumerate(values):
        if value is None:
            bad.add(row, f"column {column!r} is null; remove the row or fill it in")
        elif not isinstance(value, str):
            bad.add(row, f"column {column!r} holds {_kind(value)}, not text; write it in quotes or remove it")
        elif not value.strip():
            bad.add(row, f"column {column!r} is empty; remove the row or fill it in")
        elif not _encodes(value):
            bad.add(row, f"column {column!r} holds half a surrogate pair, which is no character; write the text anew")
    bad.raise_any()
    return list(values)


def _encodes(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    """What a cell holds, without the value: the same fault of many rows is told once."""
    kinds = {bool: "true or false", int | float: "a number", list: "a list", dict: "an object"}
    return next((said for kind, said in kinds.items() if isinstance(value, kind)), type(value).__name__)


def tokenize(texts: Sequence[list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Features]:
    """Tokenise rows: whole, to learn their length, and those that are too long again, cut (pairs: longest first).

    Args:
        texts: One column of texts, or two that make pairs.
        tokenizer: The model's.
        max_length: Most tokens of a row, special tokens included.

    Returns:
        One row each, without labels.

    Raises:
        RecipeError: `max_length` leaves no room for text.
    """
    special = tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
    if max_length < special + len(texts):
        message = f"{max_length} tokens leave no room for text beside {special} special tokens"
        raise RecipeError(Problem(message, key="data.max_length"))
    options = {"padding": False, "return_attention_mask": False, "verbose": False}
    whole = tokenizer(*texts, truncation=False, **options)
    lengths = [len(ids) for ids in whole["input_ids"]]
    long = [row for row, length in enumerate(lengths) if length > max_length]
    if long:
        parts = [[column[row] for row in long] for column in texts]
        cut = tokenizer(*parts, truncation="longest_first", max_length=max_length, **options)
        for name, values in cut.items():
            for row, value in zip(long, values, strict=True):
                whole[name][row] = value
    rows: list[Features] = [
        {"input_ids": ids, "size": len(ids), "whole": length, "weight": 0}
        for ids, length in zip(whole["input_ids"], lengths, strict=True)
    ]
    if "token_type_ids" in whole:
        for encoded, kinds in zip(rows, whole["token_type_ids"], strict=True):
            encoded["token_type_ids"] = kinds
    return rows


def padded(rows: list[Features], tokenizer: Any) -> Batch:
    """Pad to the longest row: `input_ids`, `attention_mask`, perhaps `token_type_ids`, each (B, T)."""
    names = [name for name in ("input_ids", "token_type_ids") if name in rows[0]]
    inputs: dict[str, list[list[int]]] = {name: [row[name] for row in rows] for name in names}
    # Tensor cores want multiples of 8; elsewhere it is only more padding. On the right: decoders with absolute
    # positions, such as GPT-2, count from the first column.
    multiple = 8 if torch.cuda.is_available() else None
    return dict(tokenizer.pad(inputs, padding_side="right", pad_to_multiple_of=multiple, return_tensors="pt"))
