"""What is counted in the rows of a split."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from test_data import CLASSES, MACHINE, TEXTS, good, mixed, recipe, write, write_json
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_finetune.data import encoding
from hf_finetune.data import prepare as data_prepare
from hf_finetune.data.facts import Facts, Tally
from hf_finetune.errors import DataError

CHATS = {"kind": "causal_lm", "messages": "messages"}


@pytest.fixture(scope="module")
def tokenizers(tiny_bert: str, tiny_llama: str) -> dict[str, PreTrainedTokenizerBase]:
    folders = {"text_classification": tiny_bert, "causal_lm": tiny_llama}
    return {kind: AutoTokenizer.from_pretrained(folder) for kind, folder in folders.items()}


@pytest.fixture
def facts(tokenizers: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Prepares data in an empty working directory and returns the facts by split."""
    monkeypatch.chdir(tmp_path)

    def prepare(task: dict[str, Any] = CLASSES, **block: Any) -> dict[str, Facts]:
        return dict(data_prepare.prepare(recipe(task, **block), tokenizers[task["kind"]], MACHINE).facts)

    return prepare


def chat(answer: str | None, asked: str = "what is it") -> dict[str, Any]:
    said = [] if answer is None else [{"role": "assistant", "content": answer}]
    return {"messages": [{"role": "user", "content": asked}, *said]}


def test_clean_rows_strike_nothing(facts: Any) -> None:
    write_json("train.jsonl", [{"text": f"the film is good {'so ' * n}", "label": "ab"[n % 2]} for n in range(9)])
    assert facts(train="train.jsonl")["train"].tallies == {}


def test_duplicates_and_conflicts_are_told_by_their_tokens(facts: Any) -> None:
    rows = [("good film", "a"), ("bad film", "b"), ("good  film", "a"), ("bad film", "a"), ("dull", "b")]
    write_json("train.jsonl", [{"text": text, "label": label} for text, label in rows])
    tallies = facts(train="train.jsonl")["train"].tallies
    assert tallies["duplicates"] == Tally(2, (("train.jsonl", 3), ("train.jsonl", 4)))
    assert tallies["conflicting_labels"] == Tally(2, (("train.jsonl", 2), ("train.jsonl", 4)))


def test_leakage_is_counted_in_the_held_out_split(facts: Any) -> None:
    write_json("train.jsonl", mixed(6))
    write_json("dev.jsonl", [{"text": "never so good", "label": "good"}, good(1)[0]])
    found = facts(train="train.jsonl", validation="dev.jsonl")
    assert found["validation"].tallies["leakage"] == Tally(1, (("dev.jsonl", 2),))
    assert "leakage" not in found["train"].tallies


def test_labels_are_counted_in_every_split(facts: Any) -> None:
    write_json("train.jsonl", [*mixed(6), {"text": "", "label": "bad"}])
    write_json("test.jsonl", good(2))
    found = facts(train="train.jsonl", test="test.jsonl")
    assert found["train"].labels == {"bad": 3, "good": 3}
    assert found["test"].labels == {"bad": 0, "good": 2}


def test_positive_cells_are_counted_for_several_labels(facts: Any) -> None:
    task = {**CLASSES, "problem": "multi_label"}
    write_json("train.jsonl", [{"text": "good film", "label": ["x", "y"]}, {"text": "bad film", "label": ["y"]}])
    assert facts(task, train="train.jsonl")["train"].labels == {"x": 1, "y": 2}


def test_numbers_have_neither_labels_nor_conflicts(facts: Any) -> None:
    write_json("train.jsonl", [{"text": "good film", "label": 0.5}, {"text": "good film", "label": 1.5}])
    found = facts({**CLASSES, "problem": "regression"}, train="train.jsonl")["train"]
    assert found.labels == {}
    assert list(found.tallies) == ["duplicates"]


def test_telling_tokens_are_those_of_one_label_and_no_special_ones(facts: Any) -> None:
    rows = [{"text": "good good film", "label": "a"}, {"text": "bad bad bad film", "label": "b"}]
    write_json("train.jsonl", rows * 4)
    assert facts(train="train.jsonl")["train"].telling == {"a": (("good", 8, 8),), "b": (("bad", 12, 12),)}
    write_json("train.jsonl", rows)  # twice is no evidence
    assert facts(train="train.jsonl")["train"].telling == {"a": (), "b": ()}
    write_json("texts.jsonl", [{"text": "good film"}, {"text": "good"}])
    assert facts(TEXTS, train="texts.jsonl")["train"].telling == {"": (("good", 2, 2), ("film", 1, 1))}


def test_lengths_are_those_before_cutting(facts: Any) -> None:
    write_json("train.jsonl", [{"text": "film " * count} for count in (*range(1, 41), 500)])
    found = facts(TEXTS, train="train.jsonl", max_length=8)["train"]
    assert sum(found.lengths) == 41
    assert len(found.length_edges) == len(found.lengths) + 1
    assert found.length_edges[-1] > 501
    assert list(found.length_edges) == sorted(set(found.length_edges))


def test_empty_and_untrained_rows_are_told_apart(facts: Any) -> None:
    write_json("train.jsonl", [chat("good film"), {"messages": []}, chat(None), {"messages": None}])
    tallies = facts(CHATS, train="train.jsonl")["train"].tallies
    assert tallies["empty_text"] == Tally(2, (("train.jsonl", 2), ("train.jsonl", 4)))
    assert tallies["no_trained_token"] == Tally(1, (("train.jsonl", 3),))


def test_text_of_which_the_tokenizer_leaves_nothing_is_not_trained(
    facts: Any, tiny_bert: str, tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    monkeypatch.setitem(tokenizers, "text_classification", tokenizer)
    write_json("train.jsonl", [*mixed(4), {"text": "\u200b", "label": "bad"}])
    assert facts(train="train.jsonl")["train"].tallies["no_trained_token"] == Tally(1, (("train.jsonl", 5),))


def test_turns_without_a_role_are_unfit_and_not_empty(facts: Any) -> None:
    write_json("train.jsonl", [chat("good film"), {"messages": [{"rol": "user", "content": "film"}]}])
    with pytest.raises(DataError, match=r"train.jsonl: data.train: row 2: turn 1 is no {role, content}"):
        facts(CHATS, train="train.jsonl")


def test_whole_batches_without_text_are_left_out(facts: Any) -> None:
    write_json("train.jsonl", [*mixed(2), *[{"text": "", "label": "bad"}] * 2500, *mixed(2)])
    tallies = facts(train="train.jsonl")["train"].tallies
    assert tallies["empty_text"].count == 2500
    assert tallies["duplicates"].rows == (("train.jsonl", 2503), ("train.jsonl", 2504))


def test_rows_that_do_not_end_are_counted_unless_they_are_cut(facts: Any, tokenizers: dict[str, Any]) -> None:
    tokenizer = tokenizers["causal_lm"]
    template, tokenizer.chat_template = (
        tokenizer.chat_template,
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
        "{% if m['content'] != 'no' %}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    write_json("train.jsonl", [chat("good film " * 9), chat("no"), chat("yes")])
    try:
        tallies = facts(CHATS, train="train.jsonl", max_length=14)["train"].tallies
    finally:
        tokenizer.chat_template = template
    assert tallies["untrained_end"] == Tally(1, (("train.jsonl", 2),))


def test_a_bos_that_the_chat_repeats_is_counted(
    facts: Any, tiny_llama: str, tokenizers: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, bos_token="<|pad|>")
    tokenizer.chat_template = "<|pad|>{{ messages[0]['content'][:7] }}" + tokenizer.chat_template
    monkeypatch.setitem(tokenizers, "causal_lm", tokenizer)
    write_json("train.jsonl", [chat("good", "<|pad|>what"), chat("good", "what is")])
    assert facts(CHATS, train="train.jsonl")["train"].tallies["doubled_bos"] == Tally(1, (("train.jsonl", 1),))


def test_unknown_tokens_are_counted_with_their_rows(facts: Any) -> None:
    write_json("train.jsonl", [*mixed(2), {"text": "qwerty asdf film", "label": "bad"}])
    assert facts(train="train.jsonl")["train"].tallies["unknown_tokens"] == Tally(2, (("train.jsonl", 3),))


def test_marks_of_raw_text() -> None:
    for text, marks in [
        ("a film\n\ttwo", 0),
        ("\u05de\u05d4 \u200f\U0001f600", 0),
        ("a\0film", encoding.NUL),
        ("a\x07film", encoding.CONTROL),
        ("a\u202efilm", encoding.CONTROL),
        ("NA", encoding.MISSING),
        ("NA film", 0),
    ]:
        nested = [{"role": "user", "content": text}]
        assert encoding.marks_of({"text": [text], "label": ["x"]}) == [marks]
        assert encoding.marks_of({"messages": [nested]}) == [marks & ~encoding.MISSING]


def test_words_for_missing_count_in_tables_alone(facts: Any) -> None:
    write("train.csv", "text,label", "NA,good", "bad film,null", "good film,good")
    assert facts(train="train.csv")["train"].tallies["missing_words"].count == 2
    write_json("train.jsonl", [{"text": "NA", "label": "a"}, {"text": "b", "label": "null"}])
    assert "missing_words" not in facts(train="train.jsonl")["train"].tallies


def test_facts_survive_the_cache(facts: Any) -> None:
    write_json("train.jsonl", [*mixed(6), {"text": "", "label": "bad"}])
    first, second = facts(train="train.jsonl"), facts(train="train.jsonl")
    assert first == second
    assert TypeAdapter(Facts).validate_python(json.loads(json.dumps(asdict(first["train"])))) == first["train"]


def test_levels_are_no_part_of_the_cache(facts: Any) -> None:
    write_json("train.jsonl", mixed(6))
    strict = facts(train="train.jsonl", checks={"duplicates": "error"})
    assert strict == facts(train="train.jsonl", checks={"duplicates": "off"})
