"""Reading YAML strictly."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_finetune.config import yamlfile
from hf_finetune.errors import RecipeError


def complaint(text: str) -> str:
    """What `parse` says to a text, in one line."""
    with pytest.raises(RecipeError) as caught:
        yamlfile.parse(text, "x.yaml")
    return str(caught.value)


def test_scalars_follow_yaml_1_2() -> None:
    for text, value in [
        ("5e-4", 5e-4),
        ("1E3", 1000.0),
        (".5", 0.5),
        ("3", 3),
        ("-3", -3),
        ("010", 10),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("0x1f", "0x1f"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("٣", "٣"),
        ("~", None),
        ("", None),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("1e400", math.inf),
        ("9" * 5000, math.inf),
        ("'5e-4'", "5e-4"),
        ('"null"', "null"),
        ("[a, b, 1.5]", ["a", "b", 1.5]),
        ("{a: {b: null}}", {"a": {"b": None}}),
    ]:
        read = yamlfile.parse(text, "x.yaml").value
        assert read == value
        assert type(read) is type(value)


def test_what_is_no_text_is_kept_as_it_is_written() -> None:
    document = yamlfile.parse("a: 1e5\nb: [0x1f, 12, text]\nc: ~\n", "x.yaml")
    assert document.written == {("a",): "1e5", ("b", 1): "12", ("c",): "~"}


def test_a_number_with_a_leading_zero_is_a_complaint_and_left_out() -> None:
    document = yamlfile.parse("a: 010\nb: '010'\nc: 0.5\nd: 0\ne: -007\n", "x.yaml")
    assert document.value == {"b": "010", "c": 0.5, "d": 0}
    assert document.unread == {("a",), ("e",)}
    assert [(problem.key, problem.line) for problem in document.problems] == [("a", 1), ("e", 5)]
    assert "write 10 without the zero" in document.problems[0].message


def test_every_key_and_item_has_its_line() -> None:
    document = yamlfile.parse("a:\n  b: 1\n  c:\n    - x\n    - y: 2\n", "x.yaml")
    assert document.lines == {("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", 0): 4, ("a", "c", 1): 5} | {
        ("a", "c", 1, "y"): 5
    }


def test_second_key_is_a_complaint_and_the_first_one_counts() -> None:
    document = yamlfile.parse("a:\n  b: 1\n  b: 2\n", "x.yaml")
    assert document.value == {"a": {"b": 1}}
    assert [str(p) for p in document.problems] == ["x.yaml:3: a.b: is given twice, first in line 2; keep one"]


def test_a_key_must_be_text() -> None:
    for key in ["1", "true", "null", "1.5", "[a]", "{a: b}", "? [a]\n"]:
        document = yamlfile.parse(f"a: 1\n{key}: 2\n", "x.yaml")
        assert document.value == {"a": 1}
        assert "a key that is no text" in str(document.problems[0])
        assert document.problems[0].line == 2


def test_what_is_refused_names_its_line() -> None:
    for text, says in [
        ("a: &x 1\nb: *x\n", "x.yaml:1: anchors and aliases are not read; write the value out\nx.yaml:2: anchors"),
        ("a: !!python/object:os.system 1", "x.yaml:1: the tag tag:yaml.org,2002:python/object:os.system is not read"),
        ("a: !local 1", "x.yaml:1: the tag !local is not read"),
        ("a: !!str 1", "x.yaml:1: the tag"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2: is not valid YAML: expected a single document in the stream"),
        ("a:\n\tb: 1\n", "x.yaml:2: is not valid YAML"),
        ("a: [1, 2\n", "x.yaml:2: is not valid YAML"),
        ("a\n  b: 1\n", "x.yaml:1: is not valid YAML: 'a' has no colon; write `a:`"),
        ("a:\n  b 1\n  # c\n  c: 2\n", "x.yaml:2: is not valid YAML: 'b' has no colon; write `b:` and a space"),
        ("a:\n  b: 1\n  c 2\nd: 3\n", "x.yaml:3: is not valid YAML: 'c' has no colon; write `c:` and a space"),
        ("a: b: c\n", "x.yaml:1: is not valid YAML: there is a second colon in the value; put the value in quotes"),
        ("a: 1\n  b: 2\n", "x.yaml:2: is not valid YAML: it is indented as if it were a part of line 1"),
        ("a: 1\nb: \x00\n", "x.yaml:2: holds the character U+0000"),
        ("[" * 30, "x.yaml:1: is nested deeper than 20 levels"),
        ("{a: " * 5000, "x.yaml:1: is nested deeper than 20 levels"),
        ("a: @x", "x.yaml:1: is not valid YAML"),
    ]:
        assert complaint(text).startswith(says)


def test_files_that_hold_no_recipe(tmp_path: Path) -> None:
    for raw, says in [
        (b"", "is empty"),
        (b"# only a comment\n", "is empty"),
        (b"- a\n", ":1: must be a mapping"),
        (b"text\n", ":1: must be a mapping"),
        (b"a: 1\nb: caf\xe9\n", ":2: is not UTF-8 at byte 11; save it as UTF-8"),
        (b"a: 1\n" * 300_000, "is larger than 1048576 bytes"),
    ]:
        file = tmp_path / "x.yaml"
        file.write_bytes(raw)
        with pytest.raises(RecipeError, match=says):
            yamlfile.read(str(file))


def test_places_that_hold_no_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        yamlfile.read(str(tmp_path / "absent.yaml"))
    with pytest.raises(RecipeError, match="is a folder"):
        yamlfile.read(str(tmp_path))
    with pytest.raises(RecipeError, match="can't be read"):
        yamlfile.read("a\0b")


def test_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert yamlfile.read(str(file)).value == {"a": 1}


@given(st.text(alphabet=st.sampled_from("ab:-[]{}'\"#&*!|>%@`,? \n\t\0\x85\ufeff\ud800~.0123eE+é"), max_size=60))
def test_any_text_reads_or_is_refused(text: str) -> None:
    read, message = True, ""
    try:
        yamlfile.parse(text, "x.yaml")
    except RecipeError as error:
        read, message = False, error.problems[0].message
    assert read == (not message)
    assert "\n" not in message
