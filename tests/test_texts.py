"""Texts and pairs to tokens, and tokens to padded batches."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_finetune.errors import DataError, RecipeError
from hf_finetune.tasks import _texts as texts
from hf_finetune.tasks.base import State
from hf_finetune.tasks.text_classification import TextClassification

TEXTS = ["the film is good .", "bad plot", "a very very good story , great cast and lovely music !", "dull"]
PAIRS = [["good " * 50, "bad"], ["bad", "plot"]]


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_bert)


def padded(tokenizer: PreTrainedTokenizerBase, rows: list[Any]) -> dict[str, torch.Tensor]:
    return texts.padded([dict(row) for row in rows], tokenizer)


def test_rows_are_tokenised_like_the_tokenizer_does(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = texts.tokenize([TEXTS], tokenizer, 64)
    assert [row["input_ids"] for row in rows] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert [row["whole"] for row in rows] == [7, 4, 14, 3]


def test_overlong_rows_are_cut_and_tell_their_length(tokenizer: PreTrainedTokenizerBase) -> None:
    column = ["good " * 100, "bad plot", "very good " * 4]
    rows = texts.tokenize([column], tokenizer, 6)
    assert [row["whole"] for row in rows] == [102, 4, 10]
    assert [row["input_ids"] for row in rows] == tokenizer(column, truncation=True, max_length=6)["input_ids"]
    assert all(row["input_ids"][-1] == tokenizer.sep_token_id for row in rows)


def test_pairs_are_cut_on_their_longer_side(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = texts.tokenize(PAIRS, tokenizer, 8)
    words = tokenizer.convert_ids_to_tokens(rows[0]["input_ids"])
    assert words == ["[CLS]", "good", "good", "good", "good", "[SEP]", "bad", "[SEP]"]
    assert [row["whole"] for row in rows] == [54, 5]


def test_token_types_follow_the_tokenizer(tiny_bert: str) -> None:
    typed = AutoTokenizer.from_pretrained(
        tiny_bert, model_input_names=["input_ids", "token_type_ids", "attention_mask"]
    )
    rows = texts.tokenize(PAIRS, typed, 8)
    assert [row["token_type_ids"] for row in rows] == [[0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    assert padded(typed, rows)["token_type_ids"].tolist()[1] == [0, 0, 0, 1, 1, 0, 0, 0]
    untyped = AutoTokenizer.from_pretrained(tiny_bert, model_input_names=["input_ids", "attention_mask"])
    rows = texts.tokenize(PAIRS, untyped, 8)
    assert not any("token_type_ids" in row for row in rows)
    assert set(padded(untyped, rows)) == {"input_ids", "attention_mask"}


def test_a_row_without_text_is_named() -> None:
    for bad, message in [(None, "is null"), ("", "is empty"), (" \n", "is empty"), (3, "holds a number, not text")]:
        with pytest.raises(DataError, match=f"^row 2: column 'body' {message}"):
            texts.checked(["a", "b", bad], "body")


def test_a_length_without_room_for_text_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(RecipeError, match=r"data\.max_length: 2 tokens leave no room for text beside 2 special tokens"):
        texts.tokenize([["good"]], tokenizer, 2)
    assert len(texts.tokenize([["good story"]], tokenizer, 3)[0]["input_ids"]) == 3
    with pytest.raises(RecipeError, match="beside 3 special tokens"):
        texts.tokenize(PAIRS, tokenizer, 4)


def test_settings_left_in_the_tokenizer_change_nothing(tiny_bert: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer(TEXTS, padding="max_length", truncation=True, max_length=3)
    tokenizer.padding_side = "left"
    rows = texts.tokenize([TEXTS], tokenizer, 64)
    assert [row["whole"] for row in rows] == [7, 4, 14, 3]
    assert padded(tokenizer, rows)["attention_mask"].tolist() == [[1] * n + [0] * (14 - n) for n in (7, 4, 14, 3)]


def test_tensor_cores_get_a_multiple_of_eight(tokenizer: PreTrainedTokenizerBase, monkeypatch: Any) -> None:
    rows = texts.tokenize([TEXTS], tokenizer, 64)
    assert padded(tokenizer, rows)["input_ids"].shape == (4, 14)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert padded(tokenizer, rows)["input_ids"].shape == (4, 16)


def test_nothing_warns_and_the_collator_survives_pickling(tiny_bert: str, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    logging.enable_propagation()
    rows = texts.tokenize([["good " * 200]], tokenizer, 8)
    task = TextClassification(kind="text_classification", text="text", label="label")
    collate = pickle.loads(pickle.dumps(partial(task.collate, processor=tokenizer, state=State())))
    assert collate([dict(row) for row in rows])["input_ids"].shape == (1, 8)
    logging.disable_propagation()
    assert not caplog.records
