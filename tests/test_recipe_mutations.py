"""Random mistakes in a valid recipe: reported with their places, never a crash, never an unknown key that is taken."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hf_finetune.config import yamlfile
from hf_finetune.config.reading import Reading
from hf_finetune.config.yamlfile import OVERRIDE
from hf_finetune.pipeline.check import look
from hf_finetune.recipe import Recipe, read

VALID = """\
task: {kind: text_classification, text: sentence, label: label, labels: [a, b], class_weights: {a: 1.0, b: 2.0}}
model: {name: some/model, revision: abc}
data: {train: [train.csv], validation: dev.csv, max_length: 128}
adapter: {kind: lora, r: 16, rank_pattern: {q_proj: 4}, from: null}
training: {epochs: 3, batch_size: 64, learning_rate: 5e-4, early_stopping: {patience: 2}, best_metric: loss}
checkpoints: {every: 10, keep: 3}
output: runs/x
"""
TREE = yamlfile.parse(VALID, "").value
FREE = {("task", "class_weights"), ("adapter", "rank_pattern")}
"""Blocks whose keys are the user's."""
ODD = ["", "1e400", "0x1f", "no", "010", "2024-01-01", "~", "${HOME}", "hf_" + "a" * 30, "../x", "\0", "é", "causal_lm"]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=6), st.sampled_from(ODD)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)
many = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def keys(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Path of every key."""
    found = []
    for key, value in tree.items() if isinstance(tree, dict) else ():
        found += [(*path, key), *keys(value, (*path, key))]
    return found


KEYS = keys(TREE)
OURS = [path for path in KEYS if path[:-1] not in FREE]


def block(tree: Any, path: tuple[str, ...]) -> Any:
    """The mapping that a path ends in."""
    for part in path[:-1]:
        tree = tree[part]
    return tree


def reported(text: str, *overrides: str) -> Reading[Recipe]:
    """What is read of a text; whatever is wrong is a problem in one line that has its place."""
    Path("x.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    found = read("x.yaml", overrides)
    assert (found.recipe is None) == bool(found.problems)
    assert len(set(found.problems)) == len(found.problems)
    for problem in found.problems:
        assert problem.file in {"x.yaml", OVERRIDE}
        # What is missing at the top, and a file that is nothing at all, stand in no line.
        has_no_line = "is missing" in problem.message or "is empty" in problem.message
        assert problem.file == OVERRIDE or problem.line or has_no_line
        assert "\n" not in str(problem)
    for problem in look(found).errors:  # all that `check` does before it needs torch
        assert "\n" not in str(problem)
    return found


@many
@given(data=st.data(), path=st.sampled_from(OURS))
def test_a_misspelt_key_is_never_taken(data: st.DataObject, path: tuple[str, ...]) -> None:
    name = path[-1]
    at = data.draw(st.integers(0, len(name)))
    letter = data.draw(st.sampled_from("abcdeglmnorstuxyz_"))
    wrong = data.draw(st.sampled_from([name[:at] + letter + name[at:], name[:at] + name[at + 1 :], name.upper()]))
    tree = copy.deepcopy(TREE)
    inner = block(tree, path)
    assume(wrong and wrong not in inner and wrong != name)
    inner[wrong] = inner.pop(name)
    found = reported(yaml.safe_dump(tree, sort_keys=False))
    # Without its kind, nobody knows what else a block may hold.
    blamed = path[:-1] if name == "kind" else (*path[:-1], wrong)
    assert any(problem.key[: len(".".join(blamed))] == ".".join(blamed) for problem in found.problems)


@many
@given(data=st.data(), path=st.sampled_from(KEYS))
def test_a_value_of_any_kind_is_read_or_reported(data: st.DataObject, path: tuple[str, ...]) -> None:
    tree = copy.deepcopy(TREE)
    block(tree, path)[path[-1]] = data.draw(VALUES)
    found = reported(yaml.safe_dump(tree, sort_keys=False))
    assert found.recipe is None or read_back(found.recipe) == found.recipe


@many
@given(gone=st.lists(st.sampled_from(KEYS), min_size=1, max_size=6, unique=True))
def test_deleted_keys_are_missing_or_have_defaults(gone: list[tuple[str, ...]]) -> None:
    tree = copy.deepcopy(TREE)
    for path in sorted(gone, key=len, reverse=True):
        block(tree, path).pop(path[-1])
    found = reported(yaml.safe_dump(tree, sort_keys=False))
    absent = {".".join(path) for path in gone}
    if found.recipe is not None:
        assert absent & {"task", "task.kind", "model", "model.name", "data"} == set()


@many
@given(path=st.sampled_from(OURS), value=VALUES, name=st.text("abcxyz_-. 0", min_size=1, max_size=6))
def test_an_unknown_key_is_never_accepted(path: tuple[str, ...], value: object, name: str) -> None:
    name = f"{name}zq"
    tree = copy.deepcopy(TREE)
    block(tree, path)[name] = value
    assert reported(yaml.safe_dump(tree, sort_keys=False)).recipe is None


@many
@given(text=st.text(st.characters(codec="utf-8"), max_size=30), at=st.integers(0, len(VALID)), cut=st.integers(0, 20))
def test_any_text_in_the_file_is_read_or_reported(text: str, at: int, cut: int) -> None:
    reported(VALID[:at] + text + VALID[at + cut :])


@many
@given(path=st.sampled_from(KEYS), text=st.text(max_size=20) | st.sampled_from(ODD))
def test_any_override_is_read_or_reported(path: tuple[str, ...], text: str) -> None:
    reported(VALID, f"{'.'.join(path)}={text}", text)


@many
@given(data=st.data())
def test_any_part_on_top_of_a_recipe_is_read_or_reported(data: st.DataObject) -> None:
    Path("base.yaml").write_text(VALID)
    part: dict[str, Any] = {"extends": "base.yaml"}
    for path in data.draw(st.lists(st.sampled_from(KEYS), max_size=4)):
        inner = part
        for key in path[:-1]:
            inner = inner.setdefault(key, {}) if isinstance(inner, dict) else {}
        if isinstance(inner, dict):
            inner[path[-1]] = data.draw(VALUES)
    Path("x.yaml").write_text(yaml.safe_dump(part, sort_keys=False))
    found = read("x.yaml")
    assert all(problem.line and problem.file in {"x.yaml", "base.yaml"} for problem in found.problems)


def read_back(recipe: Recipe) -> Recipe | None:
    Path("y.yaml").write_text(recipe.dump())
    return read("y.yaml").recipe
