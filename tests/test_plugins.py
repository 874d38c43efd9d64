"""Sections, and plugins found by their file names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pydantic import ValidationError, create_model

from hf_finetune.config.section import Plugin, Section, discover, key_of, union
from hf_finetune.recipe import Recipe

PLUGIN = """
from hf_finetune.config.section import Plugin

class {name}(Plugin):
    '''One variant.'''

    size: int = 1
    '''How large.'''
"""


class Strict(Section):
    """One field of each type."""

    flag: bool = False
    """A truth value."""
    count: int = 1
    """A whole number."""
    rate: float = 1.0
    """A number."""
    text: str = ""
    """A text."""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """Makes an importable package of the given files and returns its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(**files: str) -> str:
        folder = tmp_path / "variants"
        folder.mkdir()
        for name, text in {"__init__": "", **files}.items():
            (folder / f"{name}.py").write_text(text)
        return "variants"

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] == "variants"]:
        del sys.modules[name]


def test_sections_take_exact_types_only() -> None:
    for values in [
        {"flag": "false"},
        {"flag": 0},
        {"count": 1.5},
        {"count": 3.0},
        {"count": "3"},
        {"count": True},
        {"rate": "5e-4"},
        {"rate": True},
        {"rate": float("nan")},
        {"rate": float("inf")},
        {"text": 3},
        {"other": 1},
    ]:
        with pytest.raises(ValidationError):
            Strict.model_validate(values)


def test_a_whole_number_is_a_number() -> None:
    assert Strict.model_validate({"rate": 3}).rate == 3.0


def test_sections_do_not_change() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Strict().count = 2  # type: ignore[misc]


def test_a_file_is_a_kind(package: Callable[..., str]) -> None:
    name = package(small=PLUGIN.format(name="Small"), big=PLUGIN.format(name="Big"), support="from .big import Big")
    assert list(discover(name, Plugin)) == ["big", "small"]
    block = create_model("block", __base__=Section, variant=(union(name, Plugin), ...))
    parsed = block.model_validate({"variant": {"kind": "small", "size": 3}})
    assert parsed.model_dump() == {"variant": {"kind": "small", "size": 3}}


def test_abstract_plugins_are_no_kind(package: Callable[..., str]) -> None:
    abstract = "\n    from abc import abstractmethod\n    @abstractmethod\n    def work(self): ...\n"
    name = package(base=PLUGIN.format(name="Base") + abstract, real=PLUGIN.format(name="Real"))
    assert list(discover(name, Plugin)) == ["real"]


def test_two_plugins_in_a_file_are_refused(package: Callable[..., str]) -> None:
    name = package(both=PLUGIN.format(name="One") + PLUGIN.format(name="Two"))
    with pytest.raises(TypeError, match="two plugins"):
        discover(name, Plugin)


def test_a_broken_plugin_says_what_is_broken(package: Callable[..., str]) -> None:
    name = package(broken="import no_such_library")
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        discover(name, Plugin)


def test_kind_is_filled_in_and_can_not_lie(package: Callable[..., str]) -> None:
    small = discover(package(small=PLUGIN.format(name="Small")), Plugin)["small"]
    assert small().kind == "small"
    with pytest.raises(ValidationError, match="must be 'small', not 'big'"):
        small(kind="big")


def test_json_schema_fixes_the_kind(package: Callable[..., str]) -> None:
    small = discover(package(small=PLUGIN.format(name="Small")), Plugin)["small"]
    schema = small.model_json_schema()
    assert schema["properties"]["kind"]["const"] == "small"
    assert schema["properties"]["size"]["description"] == "How large."
    assert schema["required"] == ["kind"]


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (
            "training.learning_rate",
            {"resume": "ask", "lock": "value", "card": True, "study": True, "finished": "never"},
        ),
        ("training.early_stopping.patience", {"resume": "ask", "study": True}),
        ("training.eval_batch", {"resume": "free", "lock": "value", "study": False, "finished": "free"}),
        ("tracking.images", {"resume": "free", "lock": "ignored", "card": False, "finished": "never"}),
        ("data.train", {"resume": "never", "lock": "content", "study": False, "replaces": ("mix",)}),
        ("data.mix.0.source", {"resume": "never", "lock": "value", "owns": ("subset", "revision")}),
        ("data.cache", {"resume": "free", "card": False, "finished": "free"}),
        ("adapter.from", {"resume": "never", "lock": "content"}),
        ("task.class_weights.a.b", {"resume": "never", "finished": "free"}),
        ("task.label", {"finished": "name"}),
        ("training.nonsense", {"resume": "never", "finished": "never"}),
    ],
)
def test_a_key_means_what_its_field_says_or_else_its_block(key: str, said: dict[str, object]) -> None:
    found = key_of(Recipe, key)
    assert {name: getattr(found, name) for name in said} == said
