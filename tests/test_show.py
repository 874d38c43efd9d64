"""`check --show N`: what a terminal or a file is shown of the training rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prepared import CLASSES, PAIRS, TEXTS, Made, make, reviews
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_finetune.reports import data
from hf_finetune.reports.data import HEAD, TAIL

QUESTION = {"question": "what is two plus two ?", "answer": "four ."}


def shown(made: Made, count: int = 1, *, colour: bool = False) -> list[str]:
    return data.lines(made.recipe, made.prepared, made.tokenizer, count, colour)


def test_a_classifiers_row_counts_as_a_whole(tmp_path: Path, tiny_bert: str) -> None:
    lines = shown(make(tmp_path, tiny_bert, CLASSES, {"train": reviews(4)}))
    assert lines == [
        "row 1: 7 tokens, trained as a whole",
        "  label    positive",
        "  tokens   ⟨[CLS]⟩ the film is good . ⟨[SEP]⟩",
        "  text     [CLS] the film is good . [SEP]",
    ]


def test_as_many_rows_are_shown_as_asked_for(tmp_path: Path, tiny_bert: str) -> None:
    made = make(tmp_path, tiny_bert, CLASSES, {"train": reviews(4)})
    assert [line for line in shown(made, 3) if line.startswith("row")] == [
        f"row {number}: 7 tokens, trained as a whole" for number in (1, 2, 3)
    ]
    assert sum(line.startswith("row") for line in shown(made, 99)) == 4


def test_trained_tokens_stand_apart_without_colour(tmp_path: Path, tiny_llama: str) -> None:
    lines = shown(make(tmp_path, tiny_llama, PAIRS, {"train": [QUESTION]}))
    assert lines[:4] == [
        "row 1: 18 tokens, 3 trained",
        r"  masked   ⟨<|im_start|>⟩ user \n what is two plus two ? ⟨<|im_end|>⟩ \n ⟨<|im_start|>⟩ assistant \n",
        "  trained  four . ⟨<|im_end|>⟩",
        r"  masked   \n",
    ]
    assert not any("\x1b" in line for line in lines)


def test_colours_tell_trained_from_masked(tmp_path: Path, tiny_llama: str) -> None:
    lines = shown(make(tmp_path, tiny_llama, PAIRS, {"train": [QUESTION]}), colour=True)
    assert "  trained  \x1b[32mfour . ⟨<|im_end|>⟩\x1b[0m" in lines
    assert lines[1].startswith("  masked   \x1b[2m⟨<|im_start|>⟩")


def test_nothing_is_trained_to_predict_the_first_token(tmp_path: Path, tiny_llama: str) -> None:
    lines = shown(make(tmp_path, tiny_llama, TEXTS, {"train": [{"text": "the film is good"}]}))
    assert lines[:3] == ["row 1: 5 tokens, 4 trained", "  masked   the", "  trained  film is good ⟨<|endoftext|>⟩"]


def test_packed_rows_are_shown_in_their_sequence(tmp_path: Path, tiny_llama: str) -> None:
    rows = [{"text": "one two three"}, {"text": "four"}]
    lines = shown(make(tmp_path, tiny_llama, TEXTS, {"train": rows}, packing=True), 5)
    assert lines[0] == "rows 1, 2 in one sequence: 6 tokens, 4 trained"
    assert lines[3:6] == [
        "  ---      the next row of this sequence, which does not see those before",
        "  masked   four",
        "  trained  ⟨<|endoftext|>⟩",
    ]


def test_the_second_text_of_a_pair_is_told(tmp_path: Path, tiny_bert: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert, model_input_names=["input_ids", "token_type_ids"])
    tokenizer.save_pretrained(tmp_path / "typed")
    rows = [{"a": "one", "b": "two", "label": "yes"}, {"a": "two", "b": "two", "label": "no"}]
    lines = shown(make(tmp_path, str(tmp_path / "typed"), {**CLASSES, "text": ["a", "b"]}, {"train": rows}))
    assert lines[2:4] == ["  tokens   ⟨[CLS]⟩ one ⟨[SEP]⟩", "  pair     two ⟨[SEP]⟩"]


@pytest.mark.parametrize(
    ("task", "label", "expected"),
    [
        ({"problem": "regression", "label": "score"}, {"score": 2.5}, "2.5"),
        (
            {"problem": "multi_label", "label": ["funny", "warm", "bad"]},
            {"funny": 1, "warm": 1, "bad": 0},
            "funny, warm",
        ),
    ],
)
def test_labels_of_every_problem(
    tmp_path: Path, tiny_bert: str, task: dict[str, Any], label: dict[str, Any], expected: str
) -> None:
    rows = [{"text": "one", **label}, {"text": "two", **dict.fromkeys(label, 1)}]
    assert f"  label    {expected}" in shown(make(tmp_path, tiny_bert, CLASSES | task, {"train": rows}))


def test_a_stream_shows_its_first_rows(tmp_path: Path, tiny_bert: str) -> None:
    task = {**CLASSES, "labels": ["negative", "positive"]}
    lines = shown(make(tmp_path, tiny_bert, task, {"train": reviews(8)}, streaming=True), 2)
    assert [line.partition(":")[0] for line in lines if line.startswith("row")] == ["row 1", "row 2"]


def test_data_can_neither_paint_nor_break_a_line(tmp_path: Path, tiny_bert: str) -> None:
    label = "\x1b[2J\x07evil\nrow 9: fine\u202e\x00"
    rows = [{"text": "the\nfilm \x1b[31m", "label": label}, {"text": "film", "label": "good"}]
    lines = shown(make(tmp_path, tiny_bert, CLASSES, {"train": rows}), colour=True)
    assert r"  label    " + "\x1b[32m" + r"\x1b[2J\x07evil\nrow 9: fine\u202e\x00" + "\x1b[0m" in lines
    assert r"  tokens   ⟨[CLS]⟩ the \n film" in lines[2]
    assert all(line.replace("\x1b[32m", "").replace("\x1b[0m", "").isprintable() for line in lines)


def test_of_a_long_row_both_ends_are_shown(tmp_path: Path, tiny_llama: str) -> None:
    row = {"text": "one " + "two " * 5000 + "three"}
    lines = shown(make(tmp_path, tiny_llama, TEXTS, {"train": [row]}, max_length=8192))
    assert f"  ...      {5003 - HEAD - TAIL:,} tokens left out here" in lines
    assert lines[1] == "  masked   one"
    assert lines[-2].endswith("two three ⟨<|endoftext|>⟩")
    assert max(map(len, lines)) < 5000


def test_tokens_are_texts_whatever_the_tokenizer_spells(tmp_path: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({"<|end|>": 0} | {spelt: i for i, spelt in enumerate(alphabet, 1)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    wrap: Any = PreTrainedTokenizerFast
    wrap(tokenizer_object=core, eos_token="<|end|>").save_pretrained(tmp_path)
    lines = shown(make(tmp_path, str(tmp_path), TEXTS, {"train": [{"text": "a é\n"}]}))
    assert lines[1:] == ["  masked   a", r"  trained  ▁ Ã © \n ⟨<|end|>⟩", r"  text     a é\n<|end|>"]
