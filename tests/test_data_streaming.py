"""Streamed training rows: order, passes, policies, counts, errors."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from test_data import CLASSES, LONG, MACHINE, TEXTS, bare, recipe, write_json, write_lengths
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_finetune.data import prepare
from hf_finetune.data import stream as data_stream
from hf_finetune.data.splits import SplitReport
from hf_finetune.errors import DataError, FinetuneError


@pytest.fixture(scope="module")
def llama(tiny_llama: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def stream(tokenizer: PreTrainedTokenizerBase, **block: Any) -> data_stream.Stream:
    prepared = prepare.prepare(recipe(block.pop("task", TEXTS), streaming=True, **block), tokenizer, MACHINE)
    assert isinstance(prepared.train, data_stream.Stream)
    return prepared.train


def lengths(rows: Iterator[Any], count: int) -> list[int]:
    return [row["size"] for row in itertools.islice(rows, count)]


def counted(rows: data_stream.Stream, count: int) -> SplitReport:
    """What became of the rows of the first pass, after so many were taken."""
    lanes = rows.lanes(1, [0], [0])
    return SplitReport.total(lanes.take([0]).report for _ in range(count))


def test_a_pass_holds_every_row_once_and_the_next_has_another_order(llama: PreTrainedTokenizerBase) -> None:
    write_lengths("train.jsonl", range(1, 41))
    read = lengths(stream(llama, train="train.jsonl").rows(1), 80)
    assert sorted(read[:40]) == sorted(read[40:]) == list(range(2, 42))
    assert read[:40] != read[40:]
    assert read[:40] != sorted(read[:40])


def test_the_order_follows_from_the_seed_alone(llama: PreTrainedTokenizerBase) -> None:
    write_lengths("train.jsonl", range(1, 41))
    here = stream(llama, train="train.jsonl", shuffle_buffer=10)
    there = pickle.loads(pickle.dumps(here))
    assert lengths(here.rows(1), 100) == lengths(there.rows(1), 100)
    assert lengths(here.rows(1), 100) == lengths(here.rows(1), 100)
    assert lengths(here.rows(1), 40) != lengths(here.rows(2), 40)


def test_a_streamed_row_equals_a_loaded_one(llama: PreTrainedTokenizerBase) -> None:
    write_lengths("train.jsonl", range(1, 9))
    loaded = prepare.prepare(recipe(TEXTS, train="train.jsonl", max_length=5), llama, MACHINE).train
    assert isinstance(loaded, datasets.Dataset)
    streamed = itertools.islice(stream(llama, train="train.jsonl", max_length=5).rows(1), 8)
    assert sorted(streamed, key=str) == sorted(loaded.remove_columns("row").to_list(), key=str)


def test_several_files_stream_as_one(llama: PreTrainedTokenizerBase) -> None:
    for name, counts in (("a", range(1, 4)), ("b", range(4, 7))):
        write_lengths(f"{name}.jsonl", counts)
    assert sorted(lengths(stream(llama, train="*.jsonl").rows(1), 6)) == [2, 3, 4, 5, 6, 7]


def test_the_report_counts_the_first_pass_and_no_more(llama: PreTrainedTokenizerBase) -> None:
    write_json("train.jsonl", LONG)
    truncating = stream(llama, train="train.jsonl", max_length=8)
    whole = prepare.prepare(recipe(TEXTS, train="train.jsonl", max_length=8), llama, MACHINE).reports["train"]
    assert counted(truncating, 20) == whole


def test_dropped_rows_are_counted(llama: PreTrainedTokenizerBase) -> None:
    write_json("train.jsonl", LONG)
    dropping = stream(llama, train="train.jsonl", max_length=8, overlong="drop")
    assert sorted(lengths(dropping.rows(1), 4)) == [4, 4, 6, 6]
    assert counted(dropping, 4) == SplitReport(rows=4, kept=2, dropped=2, tokens=10, trained=8, longest=41)


def test_refused_rows_are_shown(llama: PreTrainedTokenizerBase) -> None:
    write_json("train.jsonl", LONG[:2])
    with pytest.raises(DataError, match=r"a row has 21 tokens, more than 8.*the row: {'text': 'film film"):
        list(stream(llama, train="train.jsonl", max_length=8, overlong="error").rows(1))


def test_a_pass_without_a_row_ends_in_an_error(llama: PreTrainedTokenizerBase) -> None:
    write_json("train.jsonl", LONG[3:])
    with pytest.raises(DataError, match="none of the 1 train rows can be used: 1 are too long"):
        next(stream(llama, train="train.jsonl", max_length=8, overlong="drop").rows(1))


def test_a_limit_keeps_the_same_rows_in_every_pass(llama: PreTrainedTokenizerBase) -> None:
    write_lengths("train.jsonl", range(1, 41))
    read = lengths(stream(llama, train="train.jsonl", limit=10).rows(1), 20)
    assert sorted(read[:10]) == sorted(read[10:])
    assert len(set(read)) == 10
    assert sorted(set(read)) != list(range(2, 12))


def test_a_source_that_is_missing_is_said_once(llama: PreTrainedTokenizerBase) -> None:
    write_json("a.jsonl", [{"text": "good film"}])
    with pytest.raises(DataError, match=r"^data\.mix\.1\.train: no file matches 'b\.jsonl'[^\n]*$"):
        stream(llama, mix=[{"train": "a.jsonl"}, {"train": "b.jsonl"}])
    with pytest.raises(DataError, match=r"^data\.train: no file matches 'b\.jsonl'[^\n]*$"):
        stream(llama, train="b.jsonl")


def test_a_mix_follows_the_weights(llama: PreTrainedTokenizerBase) -> None:
    write_json("a.jsonl", [{"text": "good film"}] * 300)
    write_json("b.jsonl", [{"text": "bad"}] * 300)
    read = lengths(stream(llama, mix=[{"train": "a.jsonl", "weight": 3.0}, {"train": "b.jsonl"}]).rows(1), 390)
    assert 2.3 < read.count(3) / read.count(2) < 4.0


def test_an_unfit_row_is_shown(llama: PreTrainedTokenizerBase) -> None:
    write_json("train.jsonl", [*[{"text": "film"}] * 150, {"text": None}])
    with pytest.raises(DataError, match=r"^train.jsonl: .*; the row: {'text': None}$"):
        lengths(stream(llama, train="train.jsonl").rows(1), 200)


def test_broken_files_are_named(llama: PreTrainedTokenizerBase) -> None:
    for name, content, message in [
        ("train.jsonl", b'{"text": "a"}\n{"text": \n', "train.jsonl:2: is no valid JSON"),
        ("train.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "train.jsonl:2: is not UTF-8 at byte 24"),
        ("train.csv", b"text,label\na,0\nb,c,1\n", "train.csv:3: has 3 fields, the header 2"),
        ("train.jsonl", b'{"txt": "a"}\n', "train.jsonl: has no column 'text'; it has txt; did you mean 'txt'?"),
        ("train.jsonl", b"\n\n", "has 0 rows"),
    ]:
        Path(name).write_bytes(content)
        with pytest.raises(FinetuneError) as error:
            lengths(stream(llama, train=name).rows(1), 10)
        assert message in bare(error.value)


def test_streamed_labels_need_names_and_evaluation_is_loaded(llama: PreTrainedTokenizerBase) -> None:
    write_json("train.jsonl", [{"text": "good film", "label": "good"}, {"text": "bad", "label": "bad"}])
    block: dict[str, Any] = {"streaming": True, "train": "train.jsonl", "validation": "train.jsonl"}
    with pytest.raises(DataError, match=r"list them in task.labels"):
        prepare.prepare(recipe(CLASSES, **block), llama, MACHINE)
    prepared = prepare.prepare(recipe({**CLASSES, "labels": ["bad", "good"]}, **block), llama, MACHINE)
    assert prepared.validation is not None
    assert prepared.validation["labels"][:] == [1, 0]
    assert list(prepared.reports) == ["validation"]
    assert isinstance(prepared.train, data_stream.Stream)
    assert {row["labels"] for row in itertools.islice(prepared.train.rows(1), 2)} == {0, 1}


def test_the_first_rows_are_looked_at_before_training(llama: PreTrainedTokenizerBase) -> None:
    write_lengths("train.jsonl", range(1, 41))
    look = stream(llama, train="train.jsonl").look()
    assert (look.whole, look.report.rows, look.report.tokens) == (True, 40, sum(range(2, 42)))
    look = stream(llama, train="train.jsonl").look(10)
    assert (look.whole, look.report.rows, look.report.longest) == (False, 10, 11)


def test_everything_in_the_first_rows_is_told_at_once(llama: PreTrainedTokenizerBase) -> None:
    texts = [("film", "good"), ("film", "godd"), ("film " * 50, "bad"), (" ", "bad"), ("plot", "godd")]
    write_json("train.jsonl", [{"text": text, "label": label} for text, label in texts])
    task = {**CLASSES, "labels": ["bad", "good"]}
    with pytest.raises(DataError) as error:
        stream(llama, task=task, train="train.jsonl", max_length=20, overlong="error").look()
    misspelt, empty, overlong = (problem.message for problem in error.value.problems)
    assert misspelt.endswith("the row: {'text': 'film', 'label': 'godd'} (and 1 more like it)")
    assert empty.endswith("the row: {'text': ' ', 'label': 'bad'}")
    assert overlong.startswith("a row has 50 tokens, more than 20;")


def test_a_fault_after_the_first_rows_waits_for_the_training(llama: PreTrainedTokenizerBase) -> None:
    write_json("train.jsonl", [*[{"text": "film"}] * 1_000, {"text": None}])
    assert not stream(llama, train="train.jsonl").look().whole
    write_json("train.jsonl", [*[{"text": "film"}] * 999, {"text": None}])
    with pytest.raises(DataError, match=r"the row: {'text': None}"):
        stream(llama, train="train.jsonl").look()


def test_a_stream_without_a_usable_row_is_refused_before_training(llama: PreTrainedTokenizerBase) -> None:
    write_json("train.jsonl", LONG[3:])
    with pytest.raises(DataError, match="none of the 1 train rows can be used: 1 are too long"):
        stream(llama, train="train.jsonl", max_length=8, overlong="drop").look()
