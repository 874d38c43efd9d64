"""metrics.jsonl as it is read: whatever a label holds, whatever a kill or a disk did to a line."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hf_finetune.run import journal


def written(file: Path, *values: dict[str, object]) -> Path:
    for step, line in enumerate(values, 1):
        journal.Appender(file).append({"step": step, "phase": "train", **line})
    return file


def test_a_label_may_hold_any_kind_of_line_end(tmp_path: Path) -> None:
    names = [f"f1.a{end}b" for end in "\u2028\u2029\x85\x0b\x1c\r\n"]
    file = written(tmp_path / "metrics.jsonl", dict.fromkeys(names, 0.5))
    assert [set(line) for line in journal.read(file)] == [{"step", "phase", *names}]


def test_nan_and_infinity_come_back(tmp_path: Path) -> None:
    (line,) = journal.read(written(tmp_path / "m", {"loss": math.inf, "grad_norm": math.nan, "unit": "s"}))
    assert (line["loss"], math.isnan(line["grad_norm"]), line["unit"]) == (math.inf, True, "s")


@pytest.mark.parametrize("damage", [b"\x00" * 20, b'{"step": 2, "ph', b"[1]", b'{"loss": 1}', b"\xff\xfe"])
def test_a_damaged_line_is_left_out_with_one_warning(
    damage: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "metrics.jsonl", {}, {}, {}, {})
    lines = file.read_bytes().split(b"\n")
    file.write_bytes(b"\n".join([lines[0], damage, damage, lines[3], b'{"step": 5, "pha']))
    assert [line["step"] for line in journal.read(file)] == [1, 4]
    assert capsys.readouterr().err == f"hf_finetune: warning: {file}:2: 2 damaged lines are left out\n"


def test_a_damaged_line_does_not_stop_a_resume(tmp_path: Path) -> None:
    file = written(tmp_path / "metrics.jsonl", {}, {}, {})
    file.write_bytes(file.read_bytes().replace(b'"step": 2', b"\x00\x00", 1))
    journal.keep_lines(file, 2)
    journal.Appender(file).append({"step": 3, "phase": "train"})
    assert [line["step"] for line in journal.read(file)] == [1, 3]


def test_what_is_missing_is_empty_and_what_cannot_be_read_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert journal.read(tmp_path / "none") == []
    assert journal.read(tmp_path) == []
    assert "can't be read (Is a directory)" in capsys.readouterr().err


def test_samples_keep_their_texts(tmp_path: Path) -> None:
    (tmp_path / "s").write_text('{"step": 1, "prompt": "1/0?", "answer": "nan", "ended": true}\n')
    assert journal.read_samples(tmp_path / "s")[0]["answer"] == "nan"
