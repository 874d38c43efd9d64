"""The data report: what it says, and its limits."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prepared import CLASSES, hostile, make, reviews, write

from hf_finetune.errors import StorageError
from hf_finetune.log.text import exact, harmless
from hf_finetune.reports import data
from hf_finetune.tracking import charts, figures


def table(text: str, section: str) -> list[str]:
    """The rows of the tables of a section as plain text."""
    inside = re.search(rf'<section id="{section}">(.*?)</section>', text, re.DOTALL)
    assert inside is not None
    rows = re.findall(r"<tr>(.*?)</tr>", inside[1], re.DOTALL)
    return [" ".join(re.sub(r"<[^>]+>", " ", row).split()) for row in rows]


def test_it_says_what_became_of_the_rows(tmp_path: Path, tiny_bert: str) -> None:
    rows = table(write(hostile(tmp_path, tiny_bert), tmp_path / "page.html"), "rows")
    assert "Rows read from the source 45 8 2" in rows
    assert "Cut kept, but truncated to max_length 2 4.4 % 0 0.0 % 0 0.0 %" in rows


def test_it_says_how_labels_are_balanced(tmp_path: Path, tiny_bert: str) -> None:
    rows = table(write(hostile(tmp_path, tiny_bert), tmp_path / "page.html"), "labels")
    assert rows[1:3] == ["positive 23 51.1 % 4 50.0 % 1 50.0 %", "negative 21 46.7 % 4 50.0 % 1 50.0 %"]


def test_it_says_which_rows_are_there_twice(tmp_path: Path, tiny_bert: str) -> None:
    text = write(hostile(tmp_path, tiny_bert), tmp_path / "page.html")
    rows = table(text, "duplicates")
    assert next(row for row in rows if row.startswith("duplicates")).endswith("train.jsonl: rows 43, 44, 45")
    leaked = next(row for row in rows if row.startswith("leakage"))
    assert "8 100.0 %" in leaked
    assert leaked.endswith("validation.jsonl: rows 1, 2, 3, 4, 5, 6, 7, 8")


def test_the_same_data_make_the_same_page(tmp_path: Path, tiny_bert: str) -> None:
    made = hostile(tmp_path, tiny_bert)
    assert write(made, tmp_path / "one.html") == write(made, tmp_path / "two.html")


def test_ten_megabytes_in_a_row_make_no_large_page(tmp_path: Path, tiny_bert: str) -> None:
    rows = [{"text": "film " * 100_000, "label": "x" * 10_000_000}, *reviews(4)]
    made = make(tmp_path, tiny_bert, CLASSES, {"train": rows}, max_length=1_048_576)
    assert len(write(made, tmp_path / "page.html")) < 500_000
    assert sum(map(len, data.lines(made.recipe, made.prepared, made.tokenizer, 9, False))) < 20_000


@pytest.mark.parametrize(
    ("task", "label", "drawn"),
    [({"problem": "regression"}, 2.5, 1), ({"problem": "multi_label"}, ["funny", "warm"], 2)],
)
def test_every_problem_has_a_page(tmp_path: Path, tiny_bert: str, task: dict[str, Any], label: Any, drawn: int) -> None:
    block = {"streaming": True} if task.pop("streaming", False) else {}
    rows = [{"text": f"the film {'very ' * i}", "label": label} for i in range(4)]
    made = make(tmp_path, tiny_bert, CLASSES | task, {"train": rows}, **block)
    assert write(made, tmp_path / "page.html").count("<svg") == drawn


@pytest.mark.parametrize("place", ["missing/page.html", "folder"])
def test_a_page_that_cannot_be_written_is_a_storage_error(tmp_path: Path, tiny_bert: str, place: str) -> None:
    made = make(tmp_path, tiny_bert, CLASSES, {"train": reviews(4)})
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StorageError, match="can't write the data report") as caught:
        write(made, tmp_path / place)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_of_many_labels_the_commonest_are_drawn(tmp_path: Path, tiny_bert: str) -> None:
    rows = [{"text": f"the {'very ' * i} film", "label": f"label {i:03}"} for i in range(210)]
    text = write(make(tmp_path, tiny_bert, CLASSES, {"train": [*rows, rows[-1]]}), tmp_path / "page.html")
    assert table(text, "labels")[1].startswith("label 209 2")
    assert "198 rarer labels are not drawn." in text
    assert "and 10 labels more." in text


def test_names_are_no_formulas() -> None:
    drawn = figures.svg(charts.shares(["$x^2$", "\u202e", "電影"], {"train": [50.0, 25.0, 25.0]}), about="about")
    assert all(name in drawn for name in ("$x^2$", r"\u202e", "電影"))


def test_the_limit_is_drawn_wherever_it_is() -> None:
    for limit, note in [(8, "max_length 8"), (50, "max_length 50"), (512, "max_length 512 →")]:
        drawn = figures.svg(charts.lengths([0, 10, 20, 5000], [5, 3, 1], limit, 0), about="about")
        assert f">{note}</text>" in drawn
        assert ">to 4,999</text>" in drawn


def test_a_line_break_and_its_spelling_look_different() -> None:
    assert (exact("a\nb"), exact(r"a\nb")) == (r"a\nb", r"a\\nb")
    assert harmless("\x1b[2J\u202e\ud800\U000e0001 é 電 👩‍👩‍👧") == r"\x1b[2J\u202e\ud800\U000e0001 é 電 👩‍👩‍👧"


def test_libraries_for_drawing_wait_until_they_draw() -> None:
    code = "import hf_finetune.reports.data, sys; print({'matplotlib'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"
