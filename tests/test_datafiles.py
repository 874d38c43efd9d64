"""Data files looked at before any library is loaded; and what the whole look finds beside it."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_data import CLASSES, recipe, write, write_json

from hf_finetune.data import readers
from hf_finetune.data.loading import Wanted
from hf_finetune.data.sources import LocalFiles
from hf_finetune.errors import DataError

WANTED = Wanted(("text", "label"), ("text",))


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def light(**block: Any) -> list[str]:
    return [str(problem) for problem in readers.problems(recipe(CLASSES, **block))]


def whole(content: bytes | str, name: str = "a.jsonl") -> list[str]:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    try:
        LocalFiles("", (name,)).load(Path("cache"), WANTED)
    except DataError as error:
        return [str(problem).removeprefix(name) for problem in error.problems]
    return []


def test_every_split_is_looked_at() -> None:
    write("train.csv", "txt,label", "good,1")
    write_json("test.jsonl", [{"text": "good"}])
    assert light(train="train.csv", validation="dev.csv", test="test.jsonl") == [
        "train.csv: data.train: has no column 'text'; it has txt, label; did you mean 'txt'?",
        "data.validation: no file matches 'dev.csv'; known: test.jsonl, train.csv",
        "test.jsonl: data.test: has no column 'label'; it has text",
    ]


def test_parts_of_a_mix_and_of_a_local_source_are_looked_at() -> None:
    write("in/train.csv", "text,lable", "good,1")
    found = light(mix=[{"source": "in", "train": "train.csv"}, {"train": "no.csv"}])
    assert [line.split(": ")[:2] for line in found] == [
        ["in/train.csv", "data.mix.0.train"],
        ["data.mix.1.train", "no file matches 'no.csv'"],
    ]


def test_the_hub_is_skipped() -> None:
    assert light(source="owner/name", train="train") == []


def test_what_could_not_be_read_of_a_recipe_is_skipped() -> None:
    class Partial:
        class data:  # noqa: N801
            train, source = "no.csv", None

    assert [problem.key for problem in readers.problems(Partial())] == ["data.train"]
    assert readers.problems(object()) == []


def test_pipes_devices_and_broken_links_are_refused_without_opening_them() -> None:
    os.mkfifo("pipe.csv")
    Path("link.jsonl").symlink_to("/absent/rows.jsonl")
    assert light(train="pipe.csv", validation="link.jsonl", test="/dev/null") == [
        "pipe.csv: data.train: is a pipe (FIFO), not a regular file; write the data into a file",
        "link.jsonl: data.validation: is a symbolic link to /absent/rows.jsonl, which does not exist",
        "/dev/null: data.test: is a device, not a regular file; write the data into a file",
    ]
    assert light(train="pipe.*") == light(train="pipe.csv")


def test_what_the_first_bytes_tell() -> None:
    for name, content, message in [
        ("a.csv.gz", gzip.compress(b"text,label\n", mtime=0), "is compressed (.gz); unpack it"),
        ("a.csv", gzip.compress(b"text,label\n", mtime=0), "is compressed (gzip); unpack it"),
        ("a.jsonl", gzip.compress(b"{}\n" * 99, mtime=0)[:12], "is compressed (gzip); unpack it"),
        ("a.csv", "text,label\na,b\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16-le"), "is UTF-16; save it as UTF-8"),
        ("a.csv", b"text,label\n\xe9t\xe9,b\n", "a.csv:2: data.train: is not UTF-8 at byte 11"),
        ("a.csv", b"text,label,text\na,b,c\n", "a.csv:1: data.train: names column 'text' twice in its header"),
        ("a.csv", b"a good film,x\na bad film,y\n", "has no header: its first line is 'a good film, x'; add one"),
        ("a.csv", b"\xef\xbb\xbf \n", "has 0 rows: the file is empty"),
        ("a.json", b'{"text": ["a", "b"], "label": [0, 1]}', "is one object of lists, which is read as one row"),
        ("a.json", b'[{"txt": "a", "label": 0}]', "has no column 'text'; it has txt, label; did you mean 'txt'?"),
        ("a.parquet", b"garbage", "is no parquet file"),
    ]:
        Path(name).write_bytes(content)
        (line,) = light(train=name)
        assert message in line


def test_good_files_pass_both_looks() -> None:
    for name, content in [
        ("a.csv", b'\xef\xbb\xbftext,label\n"a, b",c\n'),
        ("a.tsv", b'text\tlabel\n"a\tb\n'),
        ("a.json", b'\xef\xbb\xbf [ {"text": "a", "label": 0} ]'),
        ("a.json", b'{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'),
        ("a.jsonl", b'\n{"text": "a", "label": 0, "more": 1}\n'),
        ("a.jsonl", b'{"label": 0, "text": "' + b"x" * readers.HEAD + "é".encode() * 9 + b'"}\n'),
    ]:
        assert whole(content, name) == []
        assert light(train=name) == []


ROW = '{"text": "a", "label": 0}\n'


def test_lines_of_json_that_would_be_repaired_in_silence() -> None:
    for content, lines in [
        (ROW + '{"text": "a", "label": 1, "text": "b"}\n', [":2: has the key 'text' twice; the first would be lost"]),
        (ROW * 2 + '{"txt": "a", "label": 1}\n' * 3, [":3: has no key 'text'; did you mean 'txt'? (also line 4, 5)"]),
        (
            ROW + '{"text": "b", "label": "1"}\n',
            [":2: 'label' holds text, but a number in the first row; use one type"],
        ),
        (
            '{"text": "a", "label": 100000000000000000000}\n',
            [":1: 'label' holds 100000000000000000000, more than 64 b"],
        ),
        ('{"text": "a \\ud800", "label": 1}\n', [":1: 'text' holds half a surrogate pair"]),
        (ROW + '{"te\n' + ROW + "[1]\n", [":2: is no valid JSON at column 5", ":4: is no JSON object"]),
        ('{"x": 1}\n' * 2, [": has no column 'text'; it has x", ": has no column 'label'; it has x"]),
    ]:
        found = whole(content)
        assert [line[: len(start)] for line, start in zip(found, lines, strict=True)] == lines


def test_rows_of_a_json_list_are_counted() -> None:
    rows = [{"text": "a", "label": 0}, {"label": 1}, {"label": 2}]
    assert whole(json.dumps(rows), "a.json") == [": row 2: has no key 'text'; known: label (also row 3)"]


def test_lines_of_csv_that_would_be_repaired_in_silence() -> None:
    for content, lines in [
        ("text,label\na\nb,1\nc\n", [":2: has 1 field, the header 2; fill in the missing ones (also line 4)"]),
        (
            'text,label\na,1\n"b,2\nc,3\n',
            [":3: opens a quotation mark that is never closed; the 2 lines from here to the end would be one text"],
        ),
        ("text,label\na,100000000000000000000\n", []),
        ("text,label\n100000000000000000000,1\n\nb,2\n", []),
        ("text,label\n", [": has 0 rows below its header"]),
    ]:
        found = whole(content, "a.csv")
        assert [line[: len(start)] for line, start in zip(found, lines, strict=True)] == lines


def test_many_faults_are_cut_short() -> None:
    found = whole("".join(f'{{"text": "a", "label": {2**64 + n}}}\n' for n in range(30)))
    assert len(found) == 21
    assert found[-1] == ": 10 more problems"


def test_the_light_look_loads_no_library() -> None:
    heavy = ["torch", "transformers", "datasets", "numpy", "pyarrow", "pandas"]
    code = f"import sys, hf_finetune.data.readers; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_text_is_not_cut_at_a_nul(tmp_path: Path) -> None:
    file = tmp_path / "train.csv"
    file.write_bytes(b'text,label\n"ab\0c, ""d""",x\n"1",NA\n')
    rows = LocalFiles("data.train", (str(file),)).load(tmp_path / "cache", WANTED)
    assert rows.to_dict() == {"text": ['ab\0c, "d"', "1"], "label": ["x", "NA"]}
