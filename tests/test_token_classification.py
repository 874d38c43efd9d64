"""Tags of words: which tokens are trained, what an entity is, and what becomes of words that are cut off."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from hf_finetune.errors import RowsError
from hf_finetune.tasks._proposals import as_list
from hf_finetune.tasks.base import IGNORE, State
from hf_finetune.tasks.token_classification import TokenClassification, spans

NAMES = ("B-x", "I-x", "O")
STATE = State(NAMES)


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: str) -> Any:
    return AutoTokenizer.from_pretrained(tiny_bert)


def make(**fields: Any) -> TokenClassification:
    return TokenClassification.model_validate({"kind": "token_classification", "words": "w", "tags": "t", **fields})


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-a I-a O", {(0, 1, "a")}),
        ("B-a B-a", {(0, 0, "a"), (1, 1, "a")}),
        ("O I-a I-a", {(1, 2, "a")}),
        ("B-a I-b", {(0, 0, "a"), (1, 1, "b")}),
        ("B-a O I-a", {(0, 0, "a"), (2, 2, "a")}),
        ("noun noun verb O noun", {(0, 1, "noun"), (2, 2, "verb"), (4, 4, "noun")}),
        ("O O", set()),
        ("B-a-b", {(0, 0, "a-b")}),
    ],
)
def test_entities_are_those_of_conlleval(tags: str, found: set[Any]) -> None:
    assert set(spans(tags.split())) == found


def test_the_first_token_of_a_word_is_trained_or_all_of_them(tokenizer: Any) -> None:
    rows = {"w": [["film", "good.bad", "plot"]], "t": [["O", "B-x", "I-x"]]}
    (first,) = make().features(rows, tokenizer, STATE, 32)
    (all_,) = make(train_on="all").features(rows, tokenizer, STATE, 32)
    assert len(first["input_ids"]) > 5, "a word of several tokens"
    assert [label for label in first["labels"] if label != IGNORE] == [2, 0, 1]
    assert first["starts"] == all_["starts"]
    assert set(all_["labels"][3:-2]) == {1}, "I-x follows B-x"
    assert (first["weight"], all_["weight"]) == (3, len(first["input_ids"]) - 2)


def test_words_that_are_cut_off_are_outside(tokenizer: Any) -> None:
    task = make()
    (row,) = task.features({"w": [["film"] * 9]}, tokenizer, STATE, 6)
    assert (row["size"], row["whole"], row["words"]) == (6, 11, 9)
    batch = task.collate([row], tokenizer, STATE)
    assert set(task.inputs(batch)) <= {"input_ids", "attention_mask", "token_type_ids"}
    logits = torch.zeros(1, 6, 3)
    logits[..., 0] = 5

    class Output:
        def __init__(self, **inputs: torch.Tensor) -> None:
            self.logits = logits

    found = {name: values.numpy() for name, values in task.predict(Output, batch, STATE).items()}
    (answer,) = task.decode(found, STATE)
    assert answer["tags"] == ["B-x"] * 4 + ["O"] * 5
    assert answer["score"] == pytest.approx(1 / (1 + 2 * math.exp(-5)))


def test_scores_are_of_whole_entities_and_sums_give_the_same() -> None:
    truth = np.array([[0, 1, 2, 0], [2, 2, IGNORE, IGNORE]])
    given = np.array([[0, 1, 2, 2], [2, 0, IGNORE, IGNORE]])
    found = {"truth": truth, "tag": given, "nats": np.where(truth == IGNORE, IGNORE, 0.5), "word": truth}
    metrics = make().metrics(found, STATE)
    expected = {"loss": 0.5, "accuracy": 4 / 6, "precision": 0.5, "recall": 0.5, "f1": 0.5}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert (metrics["f1.x"], metrics["support.x"]) == (0.5, 2.0)
    sums = make().sums(found, STATE)
    of_sums = sums.metrics(np.asarray(sums.of_rows).sum(axis=1, keepdims=True))
    assert {name: float(values[0]) for name, values in of_sums.items()} == pytest.approx(expected)


def test_scores_are_those_of_seqeval() -> None:
    # Values of seqeval 1.2.2: adjoining entities, `I-` tags without their `B-`, and an entity that is a word too long.
    names = ("B-a", "B-b", "I-a", "I-b", "O")
    truth = ["B-a I-a O B-b B-b I-b", "O B-a B-a I-a O O", "B-b I-b I-b O B-a"]
    given = ["B-a I-a O B-b I-b I-b", "O B-a B-a I-a I-a O", "I-b I-b I-b O I-b"]
    ids = [
        np.array([[names.index(tag) for tag in row.split()] + [IGNORE] * (6 - len(row.split())) for row in rows])
        for rows in (truth, given)
    ]
    found = {"truth": ids[0], "tag": ids[1], "nats": np.zeros((3, 6)), "word": ids[0]}
    metrics = make().metrics(found, State(names))
    expected = {"accuracy": 13 / 17, "precision": 3 / 6, "recall": 3 / 7, "f1": 6 / 13, "f1.a": 4 / 7, "f1.b": 1 / 3}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)
    assert (metrics["support.a"], metrics["support.b"]) == (4, 3)


def test_labels_are_those_of_words_tokenised_one_by_one(tokenizer: Any) -> None:
    words, tags = ["film", "good.bad", "plot", "film"], ["B-x", "I-x", "O", "B-x"]
    (row,) = make().features({"w": [words], "t": [tags]}, tokenizer, STATE, 64)
    pieces = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    labels = [[NAMES.index(tag)] + [IGNORE] * (len(piece) - 1) for tag, piece in zip(tags, pieces, strict=True)]
    assert row["input_ids"] == [tokenizer.cls_token_id, *itertools.chain(*pieces), tokenizer.sep_token_id]
    assert row["labels"] == [IGNORE, *itertools.chain(*labels), IGNORE]


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ({"w": [["a", "b"]], "t": [["O"]]}, "not as long as column 'w'"),
        ({"w": ["a b"], "t": [["O", "O"]]}, "holds no list of words"),
        ({"w": [["a", " "]], "t": [["O", "O"]]}, "an empty word"),
        ({"w": [["a"]], "t": [["B-y"]]}, "'B-y', which is none of the known labels"),
        ({"w": [["a"]], "t": ["O"]}, "write one label for each word"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: Any, complaint: str, tokenizer: Any) -> None:
    with pytest.raises(RowsError, match=complaint):
        make().features(rows, tokenizer, STATE, 32)


def test_lists_in_csv_are_json(tokenizer: Any) -> None:
    (row,) = make().features({"w": ['["film", "plot"]'], "t": ['["O", "B-x"]']}, tokenizer, STATE, 32)
    assert [label for label in row["labels"] if label != IGNORE] == [2, 0]


@pytest.mark.parametrize("cell", ["[" * 100_000, f"[{'1' * 5_000}]", "[1", '"a"', None, 1])
def test_a_cell_that_is_no_list_is_none_and_no_traceback(cell: Any) -> None:
    assert as_list(cell) is None


def test_a_cell_is_a_list_or_the_json_text_of_one() -> None:
    assert as_list(["a", "b"]) == as_list('["a", "b"]') == ["a", "b"]
