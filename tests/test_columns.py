"""Columns are typed by all rows of all files, and text stays as it is written: the same in every format and verb."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from forked import Server
from test_data import CLASSES, MACHINE, recipe
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_finetune.data import prepare, readers, sources
from hf_finetune.data.loading import Wanted
from hf_finetune.data.readers import Row
from hf_finetune.data.stream import Reading
from hf_finetune.errors import DataError
from hf_finetune.inference import rows as inference_rows

ANSWERS = {"kind": "causal_lm", "prompt": "{q}?", "completion": "{a}"}
CHATS = {"kind": "causal_lm", "messages": "messages", "tools": "tools"}
Files = dict[str, Any]
"""Name -> its text, or the Arrow columns of a parquet file."""


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def llama(tiny_llama: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def bert(tiny_bert: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_bert)


def lay(files: Files) -> list[str]:
    """Write files; gives their names."""
    for name, content in files.items():
        if isinstance(content, dict):
            pq.write_table(pa.table(content), name)
        else:
            Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(files)


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def numbers(*literals: str) -> str:
    """JSON Lines whose answers are written so."""
    return "".join(f'{{"q": "how many", "a": {literal}}}\n' for literal in literals)


def reading(task: dict[str, Any], names: list[str]) -> Reading:
    block = recipe(task, train=names, streaming=True)
    return Reading(block.data, sources.locate(block.data), Wanted.by(block.task), 1)


def loaded(task: dict[str, Any], names: list[str]) -> dict[str, list[Any]]:
    """The columns as they are loaded."""
    block = recipe(task, train=names)
    origin = sources.locate(block.data).train[0]
    columns: dict[str, list[Any]] = origin.load(Path("cache"), replace(Wanted.by(block.task), held_out=False))[:]
    return columns


def streamed(task: dict[str, Any], names: list[str]) -> dict[str, list[Any]]:
    """The same, as they are streamed."""
    wanted = reading(task, names)
    found = [row for batch in wanted.batches(wanted.open(), None) for row in batch]
    return {column: [row[column] for row in found] for column in found[0]}


def predicted(names: list[str]) -> Iterator[dict[str, Any]]:
    """Rows as `predict` reads them."""
    for name in names:
        yield from (dict(row.cells) for row in inference_rows.find(name, None).rows(()))


def answers(task: dict[str, Any], rows: dict[str, list[Any]]) -> list[str]:
    """What is trained as the answer of each row."""
    trained: Any = recipe(task, train="any").task
    found: list[str] = trained.references(rows, len(next(iter(rows.values()))))
    return found


WRITTEN = ["3", "5.5", "2.50", "1e-7", "9007199254740993", "0.12345678901234567891", "-0.0"]
TEXTS = ["2024-05-01", "007", "7", "True", "3", "5.5", "NA", "1,5"]
TABLE = [("q,a\n" + "".join(f'x,"{text}"\n' for text in TEXTS)), "q\ta\n" + "".join(f"x\t{text}\n" for text in TEXTS)]
CASES: dict[str, tuple[Files, list[str]]] = {
    "numbers of one file": ({"a.jsonl": numbers(*WRITTEN)}, WRITTEN),
    "numbers of two files": ({"a.jsonl": numbers("3", "4"), "b.jsonl": numbers("5.50", "6")}, ["3", "4", "5.50", "6"]),
    "numbers of a list": (
        {"a.json": f"\ufeff\n [{numbers('3', '5.50').strip().replace(chr(10), ', ')}]\n"},
        ["3", "5.50"],
    ),
    "csv": ({"a.csv": TABLE[0]}, TEXTS),
    "csv with other line ends": ({"a.csv": TABLE[0].replace("\n", "\r\n", 3)}, TEXTS),
    "tsv": ({"a.tsv": TABLE[1]}, TEXTS),
    "all dates": (
        {"a.jsonl": lines(*({"q": "when", "a": f"2024-05-0{n}"} for n in (1, 2)))},
        ["2024-05-01", "2024-05-02"],
    ),
    "dates in the second file": (
        {"a.jsonl": lines({"q": "when", "a": "never"}), "b.jsonl": lines({"q": "when", "a": "2024-05-01T00:00:00Z"})},
        ["never", "2024-05-01T00:00:00Z"],
    ),
    "a key that comes late and is not read": (
        {
            "a.jsonl": lines({"q": "x", "a": "y", "meta": None}, {"q": "x", "a": "y", "meta": {"n": 1}, "id": 1}),
            "b.jsonl": lines({"note": ["new"], "meta": "text", "id": "one", "a": "z", "q": "x"}),
        },
        ["y", "y", "z"],
    ),
    "another column in a second csv file": ({"a.csv": "q,a\nx,1\n", "b.csv": "id,a,q\n1,01,x\n"}, ["1", "01"]),
    "numbers of parquet": (
        {
            "a.parquet": {"q": ["x"], "a": pa.array([3], pa.int32())},
            "b.parquet": {"q": ["x"], "a": [5.5], "flag": [True]},
            "c.parquet": {"a": pa.array([9007199254740993], pa.int64()), "q": ["x"]},
        },
        ["3", "5.5", "9007199254740993"],
    ),
    "decimals and categories of parquet": (
        {
            "a.parquet": {
                "q": pa.array(["x", "x"]).dictionary_encode(),
                "a": pa.array(["5.50", "7"]).cast(pa.decimal128(6, 2)),
            }
        },
        ["5.50", "7.00"],
    ),
    "nulls first": ({"a.jsonl": lines({"q": None, "a": "y"}, {"q": "x", "a": "2024-05-01"})}, ["2024-05-01"]),
}


def test_text_stays_as_it_is_written() -> None:
    for case in CASES:
        files, expected = CASES[case]
        names = lay(files)
        if len(names) > 1:
            backwards = answers(ANSWERS, loaded(ANSWERS, names[::-1]))
            assert sorted(backwards) == sorted(expected)
            assert backwards != expected

        def spoken(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            kept = [index for index, question in enumerate(rows["q"]) if question is not None]
            return {column: [values[index] for index in kept] for column, values in rows.items()}

        asked = list(predicted(names))
        for rows in (
            loaded(ANSWERS, names),
            streamed(ANSWERS, names),
            {column: [row.get(column) for row in asked] for column in ("q", "a")},
        ):
            assert answers(ANSWERS, spoken(rows)) == expected


def test_the_cache_keeps_rows_as_they_are_written(llama: PreTrainedTokenizerBase) -> None:
    lay({"a.jsonl": numbers(*WRITTEN)})
    for _ in range(2):
        raw = prepare.prepare(recipe(ANSWERS, train="a.jsonl", validation="a.jsonl"), llama, MACHINE).raw_validation
        assert raw is not None
        assert answers(ANSWERS, raw[:]) == WRITTEN


def test_rows_beyond_those_that_libraries_look_at_are_read_like_the_first() -> None:
    first, late = [{"q": "x", "a": "y"}] * 10_500, [{"q": "x", "a": "2024-05-01", "more": {"deep": [1]}}] * 3
    lay({"a.jsonl": lines(*first, *late), "a.csv": "id,q,a\n" + "1,x,7\n" * 10_500 + "one,x,007\n"})
    assert answers(ANSWERS, loaded(ANSWERS, ["a.jsonl"]))[-3:] == ["2024-05-01"] * 3
    assert answers(ANSWERS, loaded(ANSWERS, ["a.csv"]))[-2:] == ["7", "007"]


CALL = {
    "type": "function",
    "function": {"name": "book", "arguments": {"day": "2024-05-01", "n": 1, "where": ["x", 2.5]}},
}
OTHER = {"type": "function", "function": {"name": "book", "arguments": {"n": "two", "guest": {"age": 10**20}}}}
TOOL = {"type": "function", "function": {"name": "book", "parameters": {"type": "object", "properties": {}}}}


def said(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "2024-05-01"}, {"role": "assistant", "content": content, **more}]


NESTED: dict[str, tuple[Files, list[list[Any]]]] = {
    "calls in the last row alone": (
        {"a.jsonl": lines({"messages": said("a")}, {"messages": said("", tool_calls=[CALL]), "tools": [TOOL]})},
        [said("a"), said("", tool_calls=[CALL])],
    ),
    "arguments of other types and keys in a second file": (
        {
            "a.jsonl": lines({"messages": said("", tool_calls=[CALL]), "tools": [TOOL]}),
            "b.jsonl": lines({"id": 7, "tools": None, "messages": said("", tool_calls=[OTHER])}),
        },
        [said("", tool_calls=[CALL]), said("", tool_calls=[OTHER])],
    ),
    "content in parts in a second file": (
        {
            "a.jsonl": lines({"messages": said("ok"), "tools": [TOOL]}),
            "b.jsonl": lines({"messages": said([{"type": "text", "text": "ok"}])}),
        },
        [said("ok"), said([{"type": "text", "text": "ok"}])],
    ),
    "a list": (
        {"a.json": json.dumps([{"messages": said("a")}, {"messages": said("", tool_calls=[OTHER]), "tools": [TOOL]}])},
        [said("a"), said("", tool_calls=[OTHER])],
    ),
    "one object in lines of its own": (
        {"a.json": json.dumps({"messages": said("a"), "tools": [TOOL]}, indent=2)},
        [said("a")],
    ),
    "parquet whose files have other fields": (
        {
            "a.parquet": {"messages": [said("a", name="x")], "tools": [json.dumps([TOOL])]},
            "b.parquet": {"id": [1], "messages": [said("b")]},
        },
        [said("a", name="x"), said("b")],
    ),
}


def without_nulls(value: Any) -> Any:
    """Arrow fills the keys that only other turns have."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def test_chats_are_read_as_they_stand() -> None:
    for case in NESTED:
        files, expected = NESTED[case]
        names = lay(files)
        rows = loaded(CHATS, names)
        assert without_nulls(rows["messages"]) == expected
        assert any(rows["tools"])
        assert without_nulls(streamed(CHATS, names)["messages"]) == expected
        backwards = without_nulls(loaded(CHATS, names[::-1])["messages"])
        assert sorted(map(str, backwards)) == sorted(map(str, expected))


def table(*labels: str) -> str:
    return "text,label\n" + "".join(f"a film,{label}\n" for label in labels)


def labelled(*labels: Any) -> str:
    return lines(*({"text": "a film", "label": label} for label in labels))


LABELS: dict[str, tuple[Files, tuple[str, ...]]] = {
    "integers": ({"a.csv": table("10", "9", "0")}, ("0", "9", "10")),
    "leading zeros": ({"a.csv": table("007", "7", "012")}, ("007", "7", "012")),
    "leading zeros in tsv": ({"a.tsv": table("007", "7").replace(",", "\t")}, ("007", "7")),
    "leading zeros of JSON": ({"a.jsonl": labelled("007", "7")}, ("007", "7")),
    "codes in the second file": ({"a.csv": table("1", "2"), "b.csv": table("01", "x")}, ("01", "1", "2", "x")),
    "words of truth": ({"a.csv": table("True", "False", "True")}, ("False", "True")),
    "words of truth behind others": (
        {"a.csv": table("Maybe"), "b.csv": table(*["True", "False"] * 2)},
        ("False", "Maybe", "True"),
    ),
    "truth of JSON": ({"a.jsonl": labelled(True), "b.jsonl": labelled(False)}, ("false", "true")),
    "integers of other widths": (
        {"a.parquet": {"text": ["x"], "label": pa.array([1], pa.int8())}, "b.parquet": {"text": ["x"], "label": [0]}},
        ("0", "1"),
    ),
    "integers above 64 bits": ({"a.csv": table("100000000000000000000", "1")}, ("1", "100000000000000000000")),
}


def test_labels_are_what_all_cells_are(bert: PreTrainedTokenizerBase) -> None:
    for case in LABELS:
        files, expected = LABELS[case]
        names = lay(files)
        prepared = prepare.prepare(recipe(CLASSES, train=names, validation=names[::-1]), bert, MACHINE)
        assert sorted(prepared.targets.names) == sorted(expected)
        assert prepared.validation is not None
        assert len(set(prepared.validation["labels"])) == len(expected)


def test_rows_of_another_split_or_format_have_the_same_labels(bert: PreTrainedTokenizerBase) -> None:
    lay({"a.csv": table("True", "False", "Maybe"), "b.csv": table("True", "False"), "c.jsonl": labelled(True, False)})
    for held_out in ("b.csv", "c.jsonl"):
        validation = prepare.prepare(recipe(CLASSES, train="a.csv", validation=held_out), bert, MACHINE).validation
        assert validation is not None
        assert validation["labels"] == [2, 0]


FAULTS: dict[str, tuple[Files, list[str]]] = {
    "words beside integers": (
        {"a.csv": table("0", "1", "0", "ham")},
        ["a.csv:5: data.train: column 'label' holds 'ham', but integers such as '0' in line 2; correct it"],
    ),
    "words in the second file": (
        {"a.csv": table("0", "1", "0"), "b.csv": table("ham", "1")},
        ["b.csv:2: data.train: column 'label' holds 'ham', but integers such as '0' in a.csv line 2; correct it"],
    ),
    "words in the first file": (
        {"b.csv": table("ham"), "a.csv": table("0", "1", "0")},
        ["b.csv:2: data.train: column 'label' holds 'ham', but integers such as '0' in a.csv line 2; correct it"],
    ),
    "text, then numbers": (
        {"a.jsonl": labelled("pos", "neg"), "b.jsonl": labelled("neg", 1, 0)},
        ["b.jsonl:2: data.train: 'label' holds a number, but text in a.jsonl; use one type (also line 3)"],
    ),
    "numbers, then text": (
        {"a.jsonl": labelled(1), "b.jsonl": labelled("neg")},
        ["b.jsonl:1: data.train: 'label' holds text, but a number in a.jsonl; use one type"],
    ),
    "numbers, then truth": (
        {"a.parquet": {"text": ["x"], "label": [1]}, "b.parquet": {"text": ["x"], "label": [True]}},
        ["b.parquet: data.train: column 'label' holds true or false, but integers in a.parquet; use one type"],
    ),
    "points in time": (
        {"a.parquet": {"text": pa.array([0], pa.timestamp("us")), "label": [1]}},
        ["a.parquet: data.train: column 'text' holds timestamp[us], not text; write it as the text that is meant"],
    ),
    "numbers in a list beside text in another": (
        {"a.jsonl": labelled(["pos"], []), "b.jsonl": labelled(["neg"], [1])},
        ["b.jsonl:2: data.train: 'label[]' holds a number, but text in a.jsonl; use one type",
         "a.jsonl (and 1 more, rows counted through): data.train: row 1, 2, 3: column 'label' holds a list"],
    ),
    "a header in the middle": (
        {"a.csv": table("pos", "neg") + table("pos")},
        ["a.csv:4: data.train: repeats the header; remove the line"],
    ),
    "a header in the middle, with spaces and capitals": (
        {"a.csv": table("pos", "neg") + "Text, LABEL \n"},
        ["a.csv:4: data.train: repeats the header; remove the line"],
    ),
    "marks behind backslashes": (
        {"a.csv": 'text,label\n"a \\"good, long\\" film",pos\n"fine",neg\n'},
        [r'a.csv:2: data.train: escapes quotation marks as \", which csv does not know; double them ("")'],
    ),
    "a mark that is not doubled": (
        {"a.csv": 'text,label\n"a "good" film",pos\n"fine",neg\n'},
        ["a.csv:2: data.train: has text behind a closing quotation mark; double each mark"],
    ),
    "a mark that is closed by that of another row": (
        {"a.csv": 'text,label\n"a film,pos\nfine,neg\nfine,neg\n"a good film",neg\n'},
        ["a.csv:2: data.train: has text behind a closing quotation mark; double each mark inside a quoted text (\"\") "
         "(opened 3 lines before; is one never closed?)"],
    ),
    "a mark that is never closed": (
        {"a.csv": 'text,label\nfine,neg\n"a film,pos\nfine,neg\n'},
        ["a.csv:3: data.train: opens a quotation mark that is never closed; the 2 lines from here to the end would be"],
    ),
    "a mark that is closed by chance": (
        {"a.csv": 'text,label\n"a film,pos\nfine,neg\nfine,neg\nof 5",neg\nfine,pos\n"a, poem\nof two, lines",pos\n'},
        ["a.csv:2: data.train: a text holds 2 lines that are rows themselves; is a quotation mark not closed?"],
    ),
    "objects in lines of their own": (
        {"a.jsonl": json.dumps({"text": "x", "label": 1}, indent=1) * 3},
        ["a.jsonl:1: data.train: begins an object that spans several lines; write each object on one line"],
    ),
    "a list by the wrong name": (
        {"a.jsonl": json.dumps([{"text": "x", "label": 1}] * 9, indent=1)},
        ["a.jsonl:1: data.train: begins a JSON list; name the file .json, or write one object a line"],
    ),
    "a list that ends early": (
        {"a.json": json.dumps([{"text": "x", "label": 1}] * 2, indent=1)[:-4]},
        ["a.json:9: data.train: is no valid JSON in row 2"],
    ),
    "rows in an object": (
        {"a.json": json.dumps({"data": [{"text": "x", "label": 1}]})},
        ["a.json: data.train: is one object of lists, which is read as one row"],
    ),
    "a repeated key deep inside": (
        {"a.jsonl": '{"text": "x", "label": 1, "meta": {"n": 1, "n": 2}}\n'},
        ["a.jsonl:1: data.train: has the key 'n' twice"],
    ),
    "a name that is taken": (
        {"a.csv": "__row__,label\nx,1\n"},
        ["task: no column can be called '__row__'; rename it"],
    ),
}  # fmt: skip


def test_what_can_not_be_meant_is_told_with_its_place(bert: PreTrainedTokenizerBase) -> None:
    for case in FAULTS:
        files, expected = FAULTS[case]
        task = {**CLASSES, "text": "__row__"} if "taken" in case else CLASSES
        with pytest.raises(DataError) as error:
            prepare.prepare(recipe(task, train=lay(files)), bert, MACHINE)
        told = [str(problem) for problem in error.value.problems]
        assert [line[: len(start)] for line, start in zip(told, expected, strict=True)] == expected


def test_declared_labels_may_be_words_and_digits(bert: PreTrainedTokenizerBase) -> None:
    lay({"a.csv": table("1", "2", "3+")})
    prepared = prepare.prepare(recipe({**CLASSES, "labels": ["1", "2", "3+"]}, train="a.csv"), bert, MACHINE)
    assert prepared.targets.counts == (1, 1, 1)


def test_columns_of_truth_in_csv_count_as_cells(bert: PreTrainedTokenizerBase) -> None:
    several = {**CLASSES, "label": ["good", "long"], "problem": "multi_label"}
    lay({"a.csv": "text,good,long\na film,True,0\na film,False,1\n"})
    train: Any = prepare.prepare(recipe(several, train="a.csv"), bert, MACHINE).train
    assert train["labels"] == [[1, 0], [0, 1]]
    assert streamed(several, ["a.csv"])["good"] == [True, False]


def test_a_fault_of_a_stream_is_told_with_its_line() -> None:
    for case in ["text, then numbers", "a header in the middle", "marks behind backslashes"]:
        files, expected = FAULTS[case]
        names = lay(files)
        with pytest.raises(DataError) as error:
            streamed({**CLASSES, "labels": ["pos", "neg"]}, names)
        assert str(error.value).startswith(expected[0].partition(" (")[0][:60])


def test_a_long_list_is_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "CHUNK", 7)
    rows = [{"text": "é" * n, "n": n, "deep": [None, True, -1.5e3, {"x": '\\"]}'}]} for n in range(40)]
    lay({"a.json": json.dumps(rows, indent=1)})
    assert list(predicted(["a.json"])) == rows


def test_predict_recognises_a_header_and_json_and_takes_other_lines_as_text(server: Server, classifier: Path) -> None:
    for text, expected in {
        "id\ttext\n07\ta film\n": "id\ttext\tlabel",
        "a film, as text\n": '{"text": "a film, as text", "label"',
    }.items():
        done = server.run("predict", str(classifier), read=text)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(expected)
        assert ("--input-format lines" in done.stderr) == (text != "a film, as text\n")


def test_predict_counts_lines_that_an_open_mark_would_swallow(server: Server, classifier: Path) -> None:
    lay({"in.csv": "text\n" + "a film\n" * 11 + '"a good film\n' + "a film\n" * 7})
    done = server.run("predict", str(classifier), "--input", str(Path("in.csv").absolute()))
    assert done.returncode == 3
    assert "in.csv:13: opens a quotation mark that is never closed; the 8 lines from here to the end" in done.stderr


def test_each_plain_line_is_what_the_user_says_to_a_model_of_chats(llama: PreTrainedTokenizerBase) -> None:
    task: Any = recipe(CHATS, train="any").task
    from hf_finetune.inference.predict import Answers

    served: Any = None
    made = Answers(SimpleNamespace(recipe=SimpleNamespace(task=task)), served, 1)  # type: ignore[arg-type]
    row = Row(1, {inference_rows.LINE: "what is one plus two ?"})
    columns = made.columns([row], lines=True)
    assert str(llama.decode(task.ask(columns, llama)[0])).startswith(
        "<|im_start|> user \n what is one plus two ? <|im_end|>"
    )


def test_a_plain_line_is_words_to_a_tagger() -> None:
    from hf_finetune.inference.predict import Labels
    from hf_finetune.tasks.base import State
    from hf_finetune.tasks.token_classification import TokenClassification

    served: Any = None
    task = TokenClassification(kind="token_classification", words="tokens", tags="tags")
    run: Any = SimpleNamespace(recipe=SimpleNamespace(task=task), targets=State(names=("O", "B-person")))
    row = Row(1, {inference_rows.LINE: "Ada met  Bo ."})
    assert Labels(run, served).columns([row], lines=True) == {"tokens": [["Ada", "met", "Bo", "."]]}
