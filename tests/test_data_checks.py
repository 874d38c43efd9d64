"""Levels and limits of `data.checks`."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from test_data import CLASSES, MACHINE, PAIRS, TEXTS, Found, good, mixed, recipe, write, write_json
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_finetune.config.checks import Checks
from hf_finetune.data import checks
from hf_finetune.data import prepare as data_prepare
from hf_finetune.data import stream as data_stream
from hf_finetune.data.splits import SplitReport
from hf_finetune.errors import DataError

EMPTY = {"text": " ", "label": "good"}
UGLY = {**CLASSES, "labels": ["good", "bad", "ugly"]}


@pytest.fixture(scope="module")
def tokenizers(tiny_bert: str, tiny_llama: str) -> dict[str, PreTrainedTokenizerBase]:
    folders = {"text_classification": tiny_bert, "causal_lm": tiny_llama}
    return {kind: AutoTokenizer.from_pretrained(folder) for kind, folder in folders.items()}


@pytest.fixture
def judge(tokenizers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Prepares data in an empty working directory and returns the verdict."""
    monkeypatch.chdir(tmp_path)

    def prepare(task: dict[str, Any] = CLASSES, **block: Any) -> Found:
        made = recipe(task, **block)
        found = data_prepare.prepare(made, tokenizers[task["kind"]], MACHINE)
        return Found.of(checks.findings(made, found.facts, found.counted, found.places))

    return prepare


def rows(count: int) -> list[dict[str, Any]]:
    """Rows that no check minds, half of them good."""
    return [
        {"text": f"the film is {'so ' * index}{'good' if index % 2 else 'bad'}", "label": LABELS[index % 2]}
        for index in range(count)
    ]


LABELS = ["bad", "good"]


def test_clean_data_have_no_finding(judge: Any) -> None:
    write_json("train.jsonl", rows(12))
    write_json("dev.jsonl", [{"text": f"a story {'so ' * index}", "label": LABELS[index % 2]} for index in range(4)])
    assert judge(train="train.jsonl", validation="dev.jsonl") == Found()


def test_empty_texts_are_an_error_a_warning_or_only_counted(judge: Any) -> None:
    write_json("train.jsonl", [*rows(8), EMPTY, {**EMPTY, "text": None}])
    (problem,) = judge(train="train.jsonl").errors
    assert str(problem) == (
        "train.jsonl: data.train: 2 of 10 train rows have no text, or a blank one (row 9, 10); fill them in or remove "
        "them, or set data.checks.empty_text: warn to drop them"
    )
    (warning,) = judge(train="train.jsonl", checks={"empty_text": "warn"}).warnings
    assert warning.message.endswith("fill them in or remove them; they are dropped")
    assert judge(train="train.jsonl", checks={"empty_text": "off"}) == Found()


def test_every_row_is_counted_once(tokenizers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = [("film", "good"), ("", "good"), ("film " * 90, "good"), ("story", None), ("a film", "bad")]
    write_json("train.jsonl", [{"question": asked, "answer": said} for asked, said in pairs])
    report = data_prepare.prepare(recipe(PAIRS, train="train.jsonl", max_length=40), tokenizers["causal_lm"], MACHINE)
    counted = report.reports["train"]
    assert (counted.rows, counted.kept, counted.empty, counted.untrained) == (5, 2, 2, 1)


def test_rows_without_a_trained_token(judge: Any) -> None:
    write_json("train.jsonl", [{"question": "film " * count, "answer": "good"} for count in (1, 90, 2, 3, 4)])
    (problem,) = judge(PAIRS, train="train.jsonl", max_length=40).errors
    assert "1 of 5 train rows has nothing that is trained (row 2); raise data.max_length" in str(problem)


def test_a_label_that_training_lacks(judge: Any) -> None:
    write_json("train.jsonl", rows(8))
    write_json("test.jsonl", [{"text": "an ugly film", "label": "ugly"}, {"text": "a warm film", "label": "good"}])
    verdict = judge(UGLY, train="train.jsonl", test="test.jsonl", checks={"unknown_tokens": "off"})
    (problem,) = verdict.errors
    assert (problem.file, problem.key) == ("test.jsonl", "data.test")
    assert "1 test row has a label that no training row has: ugly; add training rows" in problem.message


def test_one_class_alone_is_a_check_where_more_are_declared(judge: Any) -> None:
    write_json("train.jsonl", good(3))
    with pytest.raises(DataError, match="holds only 'good' in training"):
        judge(train="train.jsonl")
    declared = {**CLASSES, "labels": ["good", "bad"]}
    (problem,) = judge(declared, train="train.jsonl").errors
    assert "the train rows have only the label 'good' of good, bad" in problem.message
    assert judge(declared, train="train.jsonl", checks={"single_class": "off"}).errors == []


def test_labels_that_look_the_same(judge: Any) -> None:
    for other, shown, differing in [
        ("Good", "'Good'", "case"),
        ("good ", "'good '", "spaces"),
        ("good\u00a0", "'good\\xa0'", "spaces"),
        ("go\u200bod", "'go\\u200bod'", "invisible characters"),
        ("g\uff4fod", "'g\\uff4fod'", "Unicode form"),
        (" GOOD", "' GOOD'", "spaces and case"),
    ]:
        lines = [*rows(8), {"text": "a warm film", "label": other}, {"text": "a cold film", "label": other}]
        write_json("train.jsonl", lines)
        (problem,) = judge(train="train.jsonl", checks={"unknown_tokens": "off"}).warnings
        assert f"train labels differ only by {differing}: 'good' (4), {shown} (2, row 9)" in problem.message
        assert (problem.file, problem.key) == ("train.jsonl", "data.train")


def test_numbers_and_lists_of_labels_that_look_the_same(judge: Any) -> None:
    off = {"unknown_tokens": "off", "duplicates": "off"}
    write_json("train.jsonl", [{**row, "label": "1" if row["label"] == "good" else "01"} for row in rows(8)])
    (problem,) = judge(train="train.jsonl", checks=off).warnings
    assert "'01' (4), '1' (4, row " in problem.message or "'1' (4), '01' (4, row " in problem.message
    write_json("train.jsonl", [{**row, "label": [row["label"], "Bad"]} for row in rows(8)])
    many = {**CLASSES, "problem": "multi_label"}
    (problem,) = judge(many, train="train.jsonl", checks=off).warnings
    assert "differ only by case: 'Bad' (8), 'bad' (4, row " in problem.message
    assert judge(many, train="train.jsonl", checks={**off, "similar_labels": "off"}) == Found()


def test_a_label_of_validation_that_looks_like_a_known_one(judge: Any) -> None:
    write_json("train.jsonl", rows(8))
    write_json("dev.jsonl", [{"text": "a warm film", "label": "good "}])
    with pytest.raises(DataError, match="holds 'good ', which differs from the known label 'good' by spaces"):
        judge(train="train.jsonl", validation="dev.jsonl")


def test_leakage_above_its_limit(judge: Any) -> None:
    for limit, struck in [(0.4, True), (0.5, False)]:
        write_json("train.jsonl", rows(8))
        write_json("dev.jsonl", [rows(1)[0], {"text": "a warm story", "label": "good"}])
        errors = judge(train="train.jsonl", validation="dev.jsonl", checks={"max_leakage": limit}).errors
        assert [problem.key for problem in errors] == ["data.validation"] * struck


def test_what_is_only_told(judge: Any) -> None:
    for lines, message in [
        ([*rows(8), *rows(1)], "1 of 9 train rows has the tokens of an earlier row (11.1%, limit 5.0%; row 9)"),
        ([*rows(8), {**rows(1)[0], "label": "good"}], "2 of 9 train rows have the tokens of another row with another"),
        (
            [*good(1), *[{"text": "bad " * n, "label": "bad"} for n in range(1, 22)]],
            "the label 'bad' has 21 train rows",
        ),
        ([*rows(8), {"text": "so " * 90, "label": "bad"}], "1 of 9 train rows is cut to 40 tokens (11.1%, limit 5.0%"),
        ([*rows(8), {"text": "qwerty", "label": "bad"}], "1 of 79 train tokens is unknown to the tokenizer (1.3%"),
        ([*rows(8), {"text": "a\u202efilm", "label": "bad"}], "1 of 9 train rows has control characters"),
        (rows(3), "training.batch_size: the train split has 3 rows, fewer than one batch of 4"),
    ]:
        write_json("train.jsonl", lines)
        verdict = judge(train="train.jsonl", max_length=40)
        assert verdict.errors == []
        assert message in "\n".join(map(str, verdict.warnings))


def test_the_way_out_of_imbalance_is_one_that_works(judge: Any) -> None:
    write_json("train.jsonl", [*good(1), *[{"text": "bad " * n, "label": "bad"} for n in range(1, 22)]])
    off = {"unknown_tokens": "off"}
    assert judge({**CLASSES, "class_weights": "balanced"}, train="train.jsonl", checks=off) == Found()
    (problem,) = judge(UGLY, train="train.jsonl", checks=off).warnings
    assert problem.message.endswith("'ugly' 0 (limit 20 to 1); add rows, or remove the label from task.labels")


def test_shares_are_of_the_rows_that_are_used(judge: Any) -> None:
    write_json("train.jsonl", [*rows(8), *rows(1), EMPTY])
    (problem,) = judge(train="train.jsonl", checks={"empty_text": "off"}).warnings
    assert problem.message.startswith("1 of 9 train rows has the tokens of an earlier row (11.1%,")


def test_words_for_missing_are_told(judge: Any) -> None:
    write("train.csv", "text,label", "NA,good", "bad film,bad", "good film,good", "dull film,bad")
    (problem,) = judge(train="train.csv", checks={"unknown_tokens": "off"}).warnings
    assert "has a cell that is exactly NA, N/A, null, None or nan, which is read as text (row 1)" in problem.message


def test_nul_is_an_error(judge: Any) -> None:
    write_json("train.jsonl", [*rows(8), {"text": "a\0 film", "label": "bad"}])
    (problem,) = judge(train="train.jsonl").errors
    assert "1 of 9 train rows has the character NUL in the text (row 9)" in problem.message


def test_every_check_can_be_turned_off(judge: Any) -> None:
    write_json("train.jsonl", [EMPTY, *rows(2), *rows(2), {"text": "qwerty\0\x07 film", "label": "bad"}])
    assert len(judge(train="train.jsonl").warnings) == 3
    off = {name: "off" for name in Checks.model_fields if not name.startswith("max_")}
    assert judge(train="train.jsonl", validation="train.jsonl", checks=off) == Found()


def test_a_cut_off_split_is_named_by_the_share(judge: Any) -> None:
    write_json("train.jsonl", mixed(40))
    errors = judge(train="train.jsonl", validation_share=0.25).errors
    assert {problem.key for problem in errors} == {"data.validation_share"}


@pytest.mark.parametrize(("level", "raised"), [("error", True), ("warn", False)])
def test_streamed_rows_without_text(level: str, raised: bool, tokenizers: Any, tmp_path: Path) -> None:
    write_json(str(tmp_path / "train.jsonl"), [*[{"text": "film"}] * 5, {"text": ""}])
    block: dict[str, Any] = {"train": str(tmp_path / "train.jsonl"), "streaming": True, "checks": {"empty_text": level}}
    stream = data_prepare.prepare(recipe(TEXTS, **block), tokenizers["causal_lm"], MACHINE).train
    assert isinstance(stream, data_stream.Stream)
    if raised:
        with pytest.raises(DataError, match=r"a row has no text.*warn to drop such rows; the row: {'text': ''}"):
            list(itertools.islice(stream.rows(0), 6))
    else:
        lanes = stream.lanes(0, [0], [0])
        report = SplitReport.total(lanes.take([0]).report for _ in range(6))
        assert (report.kept, report.empty) == (5, 1)
