"""Texts made of columns."""

from __future__ import annotations

from typing import Any

import pytest

from hf_finetune.errors import DataError
from hf_finetune.tasks._examples import columns, fill, parse

ROW: dict[str, Any] = {"question": "why?", "n": 3, "two words": "yes", "null": None, "list": ["a"]}


def test_fill() -> None:
    for template, text in [
        ("question", "why?"),
        ("{question}", "why?"),
        ("Q: {question} ({n})", "Q: why? (3)"),
        ("two words", "yes"),
        ("{two words}", "yes"),
        ("{{{question}}} {{}}", "{why?} {}"),
        ("{question}\n\n{null}", "why?\n\n"),
    ]:
        assert fill(parse(template), ROW) == text


def test_braces_in_the_data_stay_as_they_are() -> None:
    assert fill(parse("{a}{b}"), {"a": "{b}", "b": "{0.__class__}"}) == "{b}{0.__class__}"


def test_only_bare_names_stand_in_braces() -> None:
    for template in ["{a.b}", "{a[0]}", "{a!r}", "{a:>9}", "{a:{b}}", "{}", "{a", "a}", "{{a}}", "{a.__class__}"]:
        with pytest.raises(ValueError, match=r"brace|'\{'|'\}'"):
            parse(template)


def test_columns_are_named_once_in_order() -> None:
    assert columns("{b} {a} {b}") == ["b", "a"]


def test_cells_that_are_no_text_are_refused() -> None:
    for template, complaint in [
        ("answer", "no column 'answer'; the data have 'question', 'n'"),
        ("null", "'null' holds NoneType"),
        ("{list} {n}", "'list' holds list"),
    ]:
        with pytest.raises(DataError, match=complaint):
            fill(parse(template), ROW)
