"""Data of which rows are unfit: what is known of the others is told with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_data import CLASSES, MACHINE, TEXTS, Found, good, mixed, recipe, write_json
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_finetune.data import checks, prepare
from hf_finetune.data.prepare import UnfitError

NAMED = {**CLASSES, "labels": ["good", "bad", "ugly"]}
BLANK = {"text": " ", "label": "good"}
UNLABELLED = {"text": "one more film", "label": None}
MISSPELT = {"text": "some other film", "label": "godd"}


@pytest.fixture(scope="module")
def bert(tiny_bert: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_bert)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def refused(tokenizer: PreTrainedTokenizerBase, task: dict[str, Any], **block: Any) -> tuple[UnfitError, Found]:
    """What is raised, and what the checks make of what is known all the same."""
    made = recipe(task, **block)
    with pytest.raises(UnfitError) as raised:
        prepare.prepare(made, tokenizer, MACHINE)
    error = raised.value
    return error, Found.of(checks.findings(made, error.facts, error.counted, error.places, error.left_out))


def test_unfit_rows_hide_nothing_of_the_others(bert: PreTrainedTokenizerBase) -> None:
    write_json("train.jsonl", [*mixed(4), UNLABELLED, MISSPELT, BLANK])
    write_json("dev.jsonl", [MISSPELT, *mixed(2), {"text": "a film", "label": "ugly"}])
    error, verdict = refused(bert, NAMED, train="train.jsonl", validation="dev.jsonl")
    assert [str(problem).split(": column")[0] for problem in error.problems] == [
        "train.jsonl: data.train: row 5",
        "train.jsonl: data.train: row 6",
        "dev.jsonl: data.validation: row 1",
    ]
    told = "\n".join(map(str, verdict.errors))
    assert "1 of 7 train rows has no text, or a blank one (row 7)" in told
    assert "2 of 3 validation rows have the tokens of a training row" in told
    assert "a label that no training row has: ugly (2 unfit train rows not counted); add training rows" in told


def test_rows_that_cannot_be_read_hide_nothing_of_the_others(bert: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in (*mixed(4), UNLABELLED, {"text": ["a", "film"], "label": "good"}, BLANK)]
    lines = [*lines[:3], "{no json", *lines[3:], '{"text": "a film"}', json.dumps(MISSPELT)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    error, verdict = refused(bert, NAMED, train="train.jsonl")
    told = [str(problem).partition(": data.train: ")[::2] for problem in error.problems]
    assert "row 10: column 'label' holds 'godd'" in told.pop()[1]
    assert told == [
        ("train.jsonl:4", "is no valid JSON at column 2: Expecting property name enclosed in double quotes"),
        ("train.jsonl:7", "'text' holds a list, but text in the first row; use one type"),
        ("train.jsonl:9", "has no key 'label'; known: text"),
        ("train.jsonl", "row 6: column 'label' is null: the row has no label; remove it or label it"),
    ]
    assert "1 of 10 train rows has no text, or a blank one (row 8)" in "\n".join(map(str, verdict.errors))
    (tmp_path / "train.jsonl").write_text("\n".join(lines[3:4] * 3))
    with pytest.raises(UnfitError) as raised:
        prepare.prepare(recipe(NAMED, train="train.jsonl"), bert, MACHINE)
    assert len(raised.value.problems) == 1, "of no row at all nothing else is told"


def test_the_labels_are_read_off_the_other_rows(bert: PreTrainedTokenizerBase) -> None:
    write_json("train.jsonl", [*mixed(4), UNLABELLED, {"text": "a film", "label": ""}])
    write_json("test.jsonl", [MISSPELT, *mixed(2)])
    error, _ = refused(bert, CLASSES, train="train.jsonl", test="test.jsonl")
    assert len(error.problems) == 3
    assert "'godd', which is none of the known labels: bad, good" in error.problems[2].message
    assert error.facts["train"].labels == {"bad": 2, "good": 2}
    assert error.left_out == {"train": 2, "test": 1}


def test_a_row_with_two_faults_is_told_of_both(bert: PreTrainedTokenizerBase) -> None:
    write_json("train.jsonl", [*mixed(4), {**BLANK, "label": None}, UNLABELLED])
    error, verdict = refused(bert, CLASSES, train="train.jsonl")
    assert [problem.message.split(":")[0] for problem in error.problems] == ["row 5, 6"]
    assert "1 of 6 train rows has no text, or a blank one (row 5)" in verdict.errors[0].message


def test_overlong_rows_hide_nothing_where_they_are_an_error(bert: PreTrainedTokenizerBase) -> None:
    write_json("train.jsonl", [*mixed(4), BLANK, {"text": "film " * 60, "label": "bad"}, UNLABELLED])
    error, verdict = refused(bert, CLASSES, train="train.jsonl", max_length=32, overlong="error")
    assert "1 of 6 train rows have more than 32 tokens (row 6;" in error.problems[1].message
    assert "1 of 7 train rows has no text" in verdict.errors[0].message
    assert "fewer than one batch" not in "\n".join(map(str, verdict.warnings))


def test_a_split_without_any_fit_row_hides_no_other(bert: PreTrainedTokenizerBase) -> None:
    write_json("train.jsonl", [UNLABELLED] * 3)
    write_json("dev.jsonl", [*mixed(2), BLANK])
    error, verdict = refused(bert, CLASSES, train="train.jsonl", validation="dev.jsonl")
    assert list(error.facts) == ["validation"]
    assert [problem.key for problem in verdict.errors] == ["data.validation"]


def test_balanced_weights_are_of_the_rows_that_are_kept(bert: PreTrainedTokenizerBase) -> None:
    off = {"empty_text": "warn"}
    write_json("train.jsonl", [*good(3), *good(1, "bad"), BLANK, BLANK])
    weighted = {**CLASSES, "class_weights": "balanced"}
    targets = prepare.prepare(recipe(weighted, train="train.jsonl", checks=off), bert, MACHINE).targets
    assert (targets.names, targets.counts) == (("bad", "good"), (1, 3))
    assert targets.weights == pytest.approx((4 / 2, 4 / 6))


def test_a_label_of_dropped_rows_alone_can_not_be_balanced(bert: PreTrainedTokenizerBase) -> None:
    write_json("train.jsonl", [*mixed(4), {**BLANK, "label": "ugly"}])
    error, verdict = refused(bert, {**CLASSES, "class_weights": "balanced"}, train="train.jsonl")
    assert str(error).startswith("task.class_weights: balanced is undefined, as no training row has the label 'ugly'")
    assert "1 of 5 train rows has no text" in verdict.errors[0].message


def test_a_stream_that_can_not_be_read_hides_no_validation_rows(tiny_llama: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    write_json("train.jsonl", [{"txt": "a film"}])
    write_json("dev.jsonl", [{"text": "a film"}, {"text": ""}])
    error, verdict = refused(tokenizer, TEXTS, train="train.jsonl", validation="dev.jsonl", streaming=True)
    assert "has no column 'text'" in str(error)
    assert "1 of 2 validation rows has no text" in verdict.errors[0].message


def test_where_most_training_rows_are_unfit_nothing_is_said_of_their_labels(bert: PreTrainedTokenizerBase) -> None:
    write_json("train.jsonl", [*good(2), MISSPELT, MISSPELT])
    _, verdict = refused(bert, NAMED, train="train.jsonl")
    assert verdict == Found()
    write_json("train.jsonl", [*good(4), MISSPELT])
    _, verdict = refused(bert, NAMED, train="train.jsonl")
    assert "only the label 'good' of good, bad, ugly (1 unfit train row not counted); a" in verdict.errors[0].message
