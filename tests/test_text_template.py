"""Texts made of columns."""

from __future__ import annotations

from typing import Any

import pytest

from hf_finetune.errors import DataError
from hf_finetune.tasks._examples import columns, fill, parse

ROW: dict[str, Any] = {"question": "why?", "n": 3, "two words": "yes", "null": None, "list": ["a"]}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("question", "why?"),
        ("{question}", "why?"),
        ("Q: {question} ({n})", "Q: why? (3)"),
        ("two words", "yes"),
        ("{two words}", "yes"),
        ("{{{question}}} {{}}", "{why?} {}"),
        ("{question}\n\n{null}", "why?\n\n"),
    ],
)
def test_fill(template: str, text: str) -> None:
    assert fill(parse(template), ROW) == text


def test_braces_in_the_data_stay_as_they_are() -> None:
    assert fill(parse("{a}{b}"), {"a": "{b}", "b": "{0.__class__}"}) == "{b}{0.__class__}"


@pytest.mark.parametrize(
    "template", ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{b}}", "{}", "{a", "a}", "{{a}}", "{a.__class__}"]
)
def test_only_bare_names_stand_in_braces(template: str) -> None:
    with pytest.raises(ValueError, match=r"brace|'\{'|'\}'"):
        parse(template)


def test_columns_are_named_once_in_order() -> None:
    assert columns("{b} {a} {b}") == ["b", "a"]


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        ("answer", "no column 'answer'; the data have 'question', 'n'"),
        ("null", "'null' holds NoneType"),
        ("{list} {n}", "'list' holds list"),
    ],
)
def test_cells_that_are_no_text_are_refused(template: str, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        fill(parse(template), ROW)
