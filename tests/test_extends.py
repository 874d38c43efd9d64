"""Recipes that extend others, overrides that decide between keys, and where each value came from."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from hf_finetune import recipe
from hf_finetune.config import reading as config_reading
from hf_finetune.config.reading import Reading
from hf_finetune.errors import Problem
from hf_finetune.recipe import Recipe

BASE = """\
task: {kind: text_classification, text: sentence, label: label}
model: {name: some/model, revision: abc}
data: {train: train.csv, validation: dev.csv}
adapter: {kind: lora, r: 16}
training: {epochs: 3, batch_size: 64, learning_rate: 5e-4}
output: runs/base
"""
CHAT = BASE.replace(
    "text_classification, text: sentence, label: label", "causal_lm, prompt: a, completion: b, system: s"
)

Read = Callable[..., Reading[Recipe]]


@pytest.fixture
def read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Read:
    """Reads x.yaml of the working directory, which holds the given text; base.yaml lies beside it."""
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text(BASE)
    Path("chat.yaml").write_text(CHAT)

    def read(text: str, *overrides: str) -> Reading[Recipe]:
        Path("x.yaml").write_text(text)
        return recipe.read("x.yaml", overrides)

    return read


def lines(reading: Reading[Recipe]) -> list[str]:
    return [str(problem) for problem in reading.problems]


def test_blocks_are_joined_and_values_replaced(read: Read) -> None:
    found = read("extends: base.yaml\ntraining: {batch_size: 8}\ndata: {train: [a.csv, b.csv]}\noutput: runs/x\n")
    expected = Recipe.load("base.yaml", ["training.batch_size=8", "data.train=[a.csv, b.csv]", "output=runs/x"])
    assert found.checked() == expected


def test_a_base_lies_relative_to_its_file_and_may_have_one_itself(read: Read) -> None:
    Path("sub").mkdir()
    Path("sub/middle.yaml").write_text("extends: ../base.yaml\nadapter: {r: 4}\n")
    found = read("extends: sub/middle.yaml\nmodel: {dropout: 0.1}\n").checked()
    assert (found.adapter.model_dump()["r"], found.model.dropout, found.output) == (4, 0.1, "runs/base")


def test_the_child_decides_what_the_base_said_otherwise(read: Read) -> None:
    for base, child, gone in [
        ("base", "training: {steps: 9}", "training.epochs"),
        ("base", "data: {mix: [{train: a.csv}, {train: b.csv}]}", "data.train"),
        ("base", "data: {validation_share: 0.1}", "data.validation"),
        ("base", "model: {name: other}", "model.revision"),
        ("base", "adapter: {kind: full}", "adapter.r"),
        ("base", "task: {kind: causal_lm, text: t}", "task.label"),
        ("chat", "task: {text: t}", "task.prompt"),
        ("chat", "task: {text: t}", "task.system"),
        ("chat", "task: {messages: m}", "task.completion"),
    ]:
        found = read(f"extends: {base}.yaml\n{child}\n")
        assert lines(found) == []
        assert {key: value for key, value, _ in found.explain()}.get(gone, "null") == "null"


def test_of_a_block_of_another_kind_nothing_stays(read: Read) -> None:
    Path("a.yaml").write_text("adapter: {kind: a, only: 1, both: {old: 1}}\n")
    read("extends: a.yaml\nadapter: {both: {new: 1}, kind: b}\n")
    layer = config_reading.load("x.yaml", Recipe)
    assert layer.tree == {"adapter": {"both": {"new": 1}, "kind": "b"}}
    assert ("adapter", "both", "old") not in layer.origin.places


def test_an_override_decides_too_and_it_is_told(read: Read) -> None:
    for override, dropped in [
        ("training.steps=9", ["training.epochs"]),
        ("data.validation_share=0.1", ["data.validation"]),
        ("adapter.kind=full", ["adapter.r"]),
        ("model.name=other", ["model.revision"]),
        ("model.name=some/model", []),
        ("adapter.kind=lora", []),
        ("training.steps=null", []),
    ]:
        found = read(BASE, override)
        assert (lines(found), list(found.dropped)) == ([], dropped)
        key = override.partition("=")[0]
        assert found.notes == [f"{gone} of the recipe is not used, because {key} was overridden" for gone in dropped]


def test_files_take_the_place_of_a_source_of_the_hub_and_of_its_splits(read: Read) -> None:
    hub = BASE.replace("train: ", "source: them/rows, revision: main, test: held_out, train: ", 1)
    folder = BASE.replace("train: ", "source: ./rows, test: held_out, train: ", 1)
    for text, override, dropped in [
        (hub, "data.train=rows.jsonl", ["data.source", "data.revision", "data.validation", "data.test"]),
        (hub, "data.train=[a.csv.gz, 'b/*.csv.gz']", ["data.source", "data.revision", "data.validation", "data.test"]),
        (hub, "data.train='train[:10%]'", []),
        (folder, "data.train=rows.jsonl", []),
        (BASE, "data.train=rows.jsonl", []),
    ]:
        assert list(read(text, override).dropped) == dropped, override


def test_two_that_exclude_each_other_in_one_place_are_a_mistake(read: Read) -> None:
    assert lines(read(BASE, "training.steps=9", "training.epochs=2")) == [
        "x.yaml:5: training: give either epochs or steps"
    ]
    assert lines(read("extends: base.yaml\ntraining: {steps: 9, epochs: 2}\n")) == [
        "x.yaml:2: training: give either epochs or steps"
    ]


def test_every_mistake_of_every_file_comes_in_one_report(read: Read) -> None:
    Path("base.yaml").write_text(BASE.replace("r: 16", "rr: 16, r: 1, r: 2").replace("epochs: 3", "epochs: x"))
    found = read("extends: base.yaml\noutput: 5\nseed: 1\n", "training.batch_size=0")
    assert [line.split(": ")[:2] for line in lines(found)] == [
        ["x.yaml:2", "output"],
        ["x.yaml:3", "seed"],
        ["base.yaml:4", "adapter.r"],
        ["base.yaml:4", "adapter.rr"],
        ["base.yaml:5", "training.epochs"],
        ["command line", "training.batch_size"],
    ]


def test_a_base_that_cannot_be_read_hides_no_other_mistake_and_makes_none_up(read: Read) -> None:
    Path("broken.yaml").write_text("a: [\n")
    found = read("extends: broken.yaml\ntraining: {bacth_size: 5}\nadapter: {r: 4}\n")
    assert [line.split(": ")[:2] for line in lines(found)] == [
        ["x.yaml:2", "training.bacth_size"],
        ["broken.yaml:2", "is not valid YAML"],
    ]
    assert not hasattr(found.partial, "output")


def test_what_cannot_be_extended_is_refused(read: Read) -> None:
    os.mkfifo("pipe")
    Path("loop.yaml").write_text("extends: x.yaml\n")
    Path("ring.yaml").write_text("extends: ring.yaml\n")
    Path("0.yaml").write_text(BASE)
    for number in range(1, 12):
        Path(f"{number}.yaml").write_text(f"extends: {number - 1}.yaml\n")
    for base, says in [
        ("x.yaml", "can't extend itself"),
        ("loop.yaml", "loop.yaml:1: extends: 'x.yaml' is part of this very chain"),
        ("ring.yaml", "ring.yaml:1: extends: 'ring.yaml' is part of this very chain"),
        ("absent.yaml", "there is no file 'absent.yaml'; the path is relative to x.yaml"),
        (".", "is no regular file"),
        ("pipe", "is no regular file"),
        ("https://host/x.yaml", "nothing is fetched"),
        ("hf://owner/x.yaml", "nothing is fetched"),
        ("~/x.yaml", "~ is not expanded"),
        ("[a.yaml]", "must be the path of one recipe file"),
        ("", "must be the path of one recipe file"),
        ("11.yaml", "2.yaml:1: extends: is nested deeper than 10 files"),
    ]:
        (problem,) = read(f"extends: {base}\n").problems
        assert says in str(problem)
        assert problem.key == "extends"
    assert lines(read("extends: 9.yaml\n")) == []


def test_a_base_outside_the_root_is_refused_also_through_a_symlink(read: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("root").mkdir()
    Path("root/base.yaml").write_text(BASE)
    Path("root/link.yaml").symlink_to(Path("base.yaml").absolute())
    monkeypatch.setenv("HF_FINETUNE_ROOT", "root")
    assert lines(read("extends: root/base.yaml\n")) == []
    for base in ("base.yaml", "root/link.yaml"):
        assert "lies outside HF_FINETUNE_ROOT" in lines(read(f"extends: {base}\n"))[0]


def test_extends_is_no_override(read: Read) -> None:
    assert lines(read(BASE, "extends=base.yaml"))[0].startswith("command line: extends: is for recipe files")


def test_explain_tells_where_every_value_came_from(read: Read) -> None:
    read("extends: base.yaml\nadapter: {r: 4}\n")
    told = {key: (value, origin) for key, value, origin in recipe.read("x.yaml", ["training.seed=7"]).explain()}
    assert told["adapter.r"] == ("4", "x.yaml:2")
    assert told["adapter.kind"] == ("lora", "base.yaml:4")
    assert told["training.seed"] == ("7", "command line")
    assert told["training.learning_rate"] == ("0.0005", "base.yaml:5")
    assert told["data.max_length"] == ("512", "default")
    assert told["adapter.from"] == ("null", "default")


def test_explain_reaches_into_lists_and_blocks_of_the_command_line(read: Read) -> None:
    mix = "data={mix: [{train: a.csv}, {train: b.csv, weight: 2}]}"
    told = {key: (value, origin) for key, value, origin in read(BASE, mix).explain()}
    assert told["data.mix.1.weight"] == ("2.0", "command line")
    assert told["data.mix.0.weight"] == ("1.0", "default")
    assert told["data.validation"] == ("null", "default")


def test_a_problem_that_is_found_later_gets_the_place_of_its_key(read: Read) -> None:
    found = read("extends: base.yaml\ndata: {mix: [{train: a.csv}, {train: b.csv}]}\n", "training.seed=3")
    assert str(found.locate(Problem("x", key="training.seed"))) == "command line: training.seed: x"
    assert str(found.locate(Problem("x", key="data.mix.1.train"))) == "x.yaml:2: data.mix.1.train: x"
    assert str(found.locate(Problem("x", key="model.name"))) == "base.yaml:2: model.name: x"
    assert str(found.locate(Problem("x", key="checkpoints.every"))) == "x.yaml: checkpoints.every: x"
    assert str(found.locate(Problem("x", key="data.train", file="a.csv", line=3))) == "a.csv:3: data.train: x"
    assert str(found.locate(Problem("x"))) == "x"


def test_what_could_be_read_is_there_although_there_are_problems(read: Read) -> None:
    found = read(BASE.replace("r: 16", "r: x").replace("output: runs/base\n", "output:\n"))
    assert found.recipe is None
    assert found.partial.model.name == "some/model"
    assert found.partial.data.has_validation
    assert not hasattr(found.partial.adapter, "r")
    assert not hasattr(found.partial, "output")


def test_a_file_that_is_no_yaml_leaves_nothing(read: Read) -> None:
    found = read("a: [")
    assert (found.recipe, found.partial, len(found.problems)) == (None, None, 1)
