"""Recipes: load, override, complain, dump, JSON Schema."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_finetune import recipe as recipe_module
from hf_finetune.config import yamlfile
from hf_finetune.errors import Problem, RecipeError
from hf_finetune.recipe import Recipe, json_schema

RECIPES = sorted((Path(__file__).parent.parent / "recipes").rglob("*.yaml"))

VALID = """\
task:
  kind: text_classification
  text: sentence
  label: label
model:
  name: some/model
data:
  train: train.csv
  validation: dev.csv
adapter:
  kind: lora
  r: 16
training:
  epochs: 3
  batch_size: 64
  learning_rate: 5e-4
output: runs/x
"""

Load = Callable[..., Recipe]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a recipe from text, as the file x.yaml of the working directory."""
    monkeypatch.chdir(tmp_path)

    def load(text: str = VALID, *overrides: str) -> Recipe:
        Path("x.yaml").write_bytes(text.encode())
        return Recipe.load("x.yaml", overrides)

    return load


def complaints(load: Load, text: str, *overrides: str) -> list[str]:
    """Every line that `load` complains in."""
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides)
    return str(caught.value).splitlines()


def outcome(load: Callable[[], Recipe]) -> tuple[Recipe | None, tuple[Problem, ...]]:
    """The recipe, or the problems that were found."""
    try:
        return load(), ()
    except RecipeError as error:
        return None, error.problems


def test_recipes_parse() -> None:
    for path in RECIPES:
        recipe = Recipe.load(str(path))
        jsonschema.validate(yamlfile.read(str(path)).value, json_schema())
        assert recipe.output


def test_one_mistake_one_line(load: Load) -> None:
    for old, new, says in [
        ("r: 16", "rr: 16", "12: adapter.rr: unknown key; did you mean 'r'?"),
        ("output:", "seed: 1\noutput:", "17: seed: unknown key; did you mean 'training.seed'?"),
        ("r: 16", "init_r: 16", "12: adapter.init_r: unknown key; it is for kind adalora"),
        ("kind: lora", "type: lora", "11: adapter.type: unknown key; did you mean 'kind'?"),
        ("  kind: lora", "  knid: lorra", "11: adapter.knid: unknown key; did you mean 'kind'?"),
        ("r: 16", "continue_from: x", "12: adapter.continue_from: unknown key; known: kind,"),
        ("kind: lora", "kind: lorra", "11: adapter.kind: unknown kind 'lorra'; did you mean 'lora'?"),
        ("  kind: lora\n", "", "10: adapter: needs a kind; known: adalora, full, ia3, lora"),
        ("kind: lora", "kind: 5", "11: adapter.kind: must be text, not 5; known: "),
        ("  kind: lora\n  r: 16", "  - a", "10: adapter: must be a block of keys with a kind, not a list; known"),
        ("adapter:\n  kind: lora\n  r: 16", "adapter: lorra", "10: adapter.kind: unknown kind 'lorra'; did you mean"),
        ("epochs: 3", "epochs: 0", "14: training.epochs: must be more than 0.0, not 0"),
        ("epochs: 3", "epochs: .inf", "14: training.epochs: must be a finite number, not .inf"),
        ("epochs: 3", "epochs: yes", "14: training.epochs: must be a number (more than 0.0 and at most 10000.0), not"),
        ("size: 64", "size: 1.5", "15: training.batch_size: must be a whole number (at least 1), not 1.5"),
        ("size: 64", "size: '64'", "15: training.batch_size: must be a whole number (at least 1), not '64'; remove"),
        ("size: 64", "size:", "15: training.batch_size: must be a whole number (at least 1), not null"),
        ("  name: some/model\n", "  revision: a\n", "5: model.name: is missing; add text"),
        ("name: some/model", "name: 12345", "6: model.name: must be text, not 12345; put it in quotes"),
        ("name: some/model", "name: ''", "6: model.name: must not be empty text, not ''"),
        ("  name: some/model", "  - a", "5: model: must be a block of keys with name, not a list"),
        ("train: train.csv", "train: [a, 5]", "8: data.train.1: must be text, not 5; put it in quotes"),
        ("train: train.csv", "train: []", "8: data.train: must have at least 1 entries, not 0"),
        ("train: train.csv", "train: {a: b}", "8: data.train: must be text or a list of text, not a block of keys"),
        (
            "epochs: 3",
            "epochs: 3\n  eval_every: epochs",
            "15: training.eval_every: must be a whole number (at least 1) or 'epoch', not 'epochs'; did you mean",
        ),
        ("epochs: 3", "epochs: 3\n  precision: bf61", "15: training.precision: must be 'auto', 'fp32', 'bf16' or"),
        ("epochs: 3", "epochs: 3\n  epochs: 4", "15: training.epochs: is given twice, first in line 14; keep one"),
        ("epochs: 3", "epochs: 3\n  1: 4", "15: training: holds a key that is no text; put the key in quotes"),
        ("epochs: 3", "epochs: 3\n  steps: 4", "13: training: give either epochs or steps"),
        ("task:", "version: 2\ntask:", "1: version: must be at most 1, not 2"),
        (
            "epochs: 3",
            "epochs: 3\n  best_metric: acuracy",
            "15: training.best_metric: text_classification has no metric",
        ),
        ("train: train.csv", "train: train.csv\n  packing: true", "9: data.packing: text_classification rows can't"),
    ]:
        assert old in VALID
        lines = complaints(load, VALID.replace(old, new, 1))
        assert [line[: len(says) + 7] for line in lines] == [f"x.yaml:{says}"]


def test_all_mistakes_come_in_one_report_by_line(load: Load) -> None:
    text = VALID.replace("text: sentence", "text: 5").replace("r: 16", "r: 0").replace("  label: label\n", "")
    lines = complaints(load, text.replace("output: runs/x\n", ""), "training.log_every=0", "nonsense")
    assert [line.split(": ")[:2] for line in lines] == [
        ["x.yaml:1", "task.label"],
        ["x.yaml:3", "task.text"],
        ["x.yaml:11", "adapter.r"],
        ["command line", "'nonsense' is no override; write key.path=value"],
        ["command line", "training.log_every"],
    ]


SHORT = VALID[: VALID.index("adapter:")]


def test_task_model_and_data_are_a_recipe(load: Load) -> None:
    made = load(SHORT)
    assert (made.adapter.kind, made.training.batch_size, made.training.epochs) == ("lora", 16, 3)
    assert made.output == "runs/x-{n}"
    assert load(made.dump()) == made
    chat = "task: {kind: causal_lm, messages: chat}"
    for text, rate in [
        (SHORT, 5e-4),
        (SHORT + "adapter: lora\n", 5e-4),
        (SHORT + "adapter: full\n", 2e-5),
        (SHORT + "adapter: {kind: ia3}\n", 3e-3),
        (chat + SHORT[SHORT.index("\nmodel:") :], 2e-4),
        (SHORT + "training: {learning_rate: 0.1, steps: 5}\n", 0.1),
    ]:
        assert load(text).training.learning_rate == rate
    assert load(SHORT + "training: {steps: 5}\n").training.epochs is None
    assert load(VALID, "adapter=full").adapter.kind == "full"
    assert load(SHORT, "adapter=full").training.learning_rate == 2e-5
    assert load(SHORT, "output=a/{recipe}").output == "a/x"


def test_what_was_filled_in_is_said_with_its_reason(load: Load) -> None:
    load(SHORT + "training: {epochs: 2}\n")
    assert recipe_module.read("x.yaml").notes == [
        "not given, so by default: adapter lora, training.batch_size 16, "
        "training.learning_rate 0.0005 (lora, text_classification)"
    ]
    load(VALID)
    assert not recipe_module.read("x.yaml").notes
    # A key that is given under another name has no default.
    Path("x.yaml").write_text(SHORT + "training: {epochs: 2, learning_rte: 1e-3, train_batch_size: 8}\n")
    assert recipe_module.read("x.yaml").notes == ["not given, so by default: adapter lora"]


def test_rules_between_fields_are_checked_although_other_fields_are_wrong(load: Load) -> None:
    text = VALID.replace("size: 64", "size: x").replace("epochs: 3", "epochs: 3\n  best_metric: nonsense\n  steps: 5")
    keys = [line.split(": ")[:2] for line in complaints(load, text.replace("r: 16", "rr: 16"))]
    assert keys == [
        ["x.yaml:12", "adapter.rr"],
        ["x.yaml:13", "training"],
        ["x.yaml:15", "training.best_metric"],
        ["x.yaml:17", "training.batch_size"],
    ]


def test_a_rule_that_needs_a_wrong_field_stays_silent(load: Load) -> None:
    lines = complaints(load, VALID.replace("epochs: 3", "epochs: x\n  steps: 5"))
    assert len(lines) == 1


def test_overrides_have_yaml_types(load: Load) -> None:
    for override, key, value in [
        ("training.learning_rate=1e-3", ("training", "learning_rate"), 1e-3),
        ("training.max_grad_norm=null", ("training", "max_grad_norm"), None),
        ("data.train=[a.csv, b.csv]", ("data", "train"), ["a.csv", "b.csv"]),
        ("model.name='5'", ("model", "name"), "5"),
        ("output=a=b", ("output",), "a=b"),
        ("training.early_stopping.patience=7", ("training", "early_stopping", "patience"), 7),
        ("training={epochs: 1, batch_size: 2, learning_rate: 1e-3}", ("training", "batch_size"), 2),
    ]:
        found: Any = load(VALID, "training.best_metric=loss", "training.epochs=1", override)
        for part in key:
            found = getattr(found, part)
        assert found == value


def test_overrides_reach_into_lists(load: Load) -> None:
    text = VALID.replace("train: train.csv", "mix:\n    - train: a.csv\n    - train: b.csv")
    assert load(text, "data.mix.1.weight=2").data.mix[1].weight == 2.0  # type: ignore[index]
    assert complaints(load, text, "data.mix.2.weight=2") == [
        "command line: data.mix.2.weight: the list has 2 entries, counted from 0; there is no entry '2'"
    ]


def test_wrong_overrides_are_complained_about_like_the_file(load: Load) -> None:
    for override, says in [
        ("training.batchsize=3", "training.batchsize: unknown key; did you mean 'batch_size'?"),
        ("trainig.batch_size=3", "trainig: unknown key; did you mean 'training'?"),
        ("training.batch_size=many", "training.batch_size: must be a whole number (at least 1), not 'many'"),
        ("training.batch_size=[", "training.batch_size: is not valid YAML"),
        ("training.batch_size=!!int 3", "training.batch_size: the tag"),
        ("training.early_stopping={patience: 1, patience: 2}", "training.early_stopping.patience: is given twice"),
        ("training..x=3", "'training..x=3' is no override; write key.path=value"),
        ("--epochs", "'--epochs' is no override; write key.path=value"),
    ]:
        first, *_ = complaints(load, VALID, "training.best_metric=loss", override)
        assert first.startswith(f"command line: {says}")


def test_a_recipe_is_made_of_plain_values_too(load: Load) -> None:
    tree = yamlfile.parse(VALID, "x.yaml").value
    assert Recipe.from_dict(tree, ["training.seed=7"]) == load(VALID, "training.seed=7")
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(tree | {"training": {"epohcs": 3, "batch_size": 8}, "output": 5})
    assert {problem.key for problem in caught.value.problems} == {"output", "training.epohcs"}
    assert Recipe.from_dict(tree | {"output": Path("läufe/😀")}).output == "läufe/😀"


def test_a_commit_goes_with_its_repository(load: Load) -> None:
    text = VALID.replace("name: some/model", "name: some/model\n  revision: abc")
    assert load(text).model.revision == "abc"
    assert load(text, "model.name=other").model.revision is None
    assert load(text, "model.name=other", "model.revision=def").model.revision == "def"
    text = VALID.replace("train: train.csv", "mix: [{train: a, source: b, revision: c}, {train: a.csv}]")
    assert load(text, "data.mix.0.source=other").data.mix[0].revision is None  # type: ignore[index]


def test_dump_loads_back_to_the_same_recipe(load: Load) -> None:
    for override in ["task.labels=['1', 'no']", "training.weight_decay=1e-7", "adapter.r=4"]:
        recipe = load(VALID, override)
        assert load(recipe.dump()) == recipe
        assert load(recipe.dump()).dump() == recipe.dump()


@given(text=st.text(min_size=1, max_size=50).filter(lambda text: text.isprintable() or "\n" in text))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_any_text_survives_a_dump(load: Load, text: str) -> None:
    recipe = load().model_copy(update={"output": text})
    assert load(recipe.dump()).output == text


@given(rate=st.floats(min_value=1e-300, max_value=10.0, exclude_min=True))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_floats_survive_a_dump_exactly(load: Load, rate: float) -> None:
    recipe = load()
    changed = recipe.model_copy(update={"training": recipe.training.model_copy(update={"learning_rate": rate})})
    assert load(changed.dump()).training.learning_rate.hex() == rate.hex()


VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(10**30), 10**30),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(
            [10**400, "1e400", "auto", "epoch", "lora", "ia3", "causal_lm", "5e-4", "\0", "loss", -1, 0, 1.5]
        ),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
def test_no_mutation_crashes(load: Load, data: st.DataObject) -> None:
    tree = copy.deepcopy(yamlfile.parse(VALID, "x.yaml").value)
    for _ in range(data.draw(st.integers(1, 4))):
        node: Any = tree
        while isinstance(node, dict) and node:
            key = data.draw(st.sampled_from([*node, "kind", "mix", "labels", "class_weights", "early_stopping", "odd"]))
            if isinstance(node.get(key), dict) and data.draw(st.integers(0, 5)):
                node = node[key]
                continue
            node[key] = data.draw(VALUES)
            break
    dumped = yaml.safe_dump(tree)
    recipe, found = outcome(lambda: load(dumped))
    assert len(set(found)) == len(found)
    assert recipe is None or load(recipe.dump()) == recipe


@given(raw=st.binary(max_size=60), at=st.integers(0, len(VALID)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=80)
def test_no_bytes_crash(load: Load, raw: bytes, at: int) -> None:
    file = Path("y.yaml")
    file.write_bytes(VALID[:at].encode() + raw + VALID[at:].encode())
    recipe, found = outcome(lambda: Recipe.load("y.yaml"))
    assert (recipe is None) == bool(found)
    assert all("\n" not in str(problem) for problem in found)


VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def fits(text: str) -> bool:
    """Whether an editor takes a file."""
    return bool(VALIDATOR.is_valid(yamlfile.parse(text, "x.yaml").value))


def test_json_schema_takes_what_load_takes(load: Load) -> None:
    VALIDATOR.check_schema(json_schema())
    assert fits(VALID)
    assert VALIDATOR.is_valid(json.loads(load().model_dump_json()))
    assert fits(VALID[: VALID.index("adapter:")])
    assert fits(VALID[: VALID.index("adapter:")] + "adapter: lora\n")
    for old, new in [
        ("kind: lora", "kind: lorra"),
        ("r: 16", "rr: 16"),
        ("epochs: 3", "epochs: '3'"),
        ("output:", "seed: 1\noutput:"),
        ("  name: some/model", "  revision: abc"),
    ]:
        assert not fits(VALID.replace(old, new)), new


def test_json_schema_takes_any_part_of_a_recipe_that_extends_another() -> None:
    for part in [
        "training: {steps: 10}",
        "adapter: {r: 3}",
        "adapter: {dropout: 0.1}",
        "adapter: {kind: ia3}",
        "adapter: {rank_pattern: {q_proj: 4}}",
        "task: {label: x}",
        "model: {dropout: 0.1}",
        "data: {mix: [{train: a}, {train: b}], checks: {leakage: off}}",
        "training: {early_stopping: null}",
        "training: {early_stopping: {min_delta: 0.1}}",
    ]:
        assert fits(f"extends: base.yaml\n{part}")
        assert not fits(part)


def test_json_schema_refuses_what_no_base_makes_right() -> None:
    for part in [
        "extends: 5",
        "extends: a.yaml\nseed: 1",
        "extends: a.yaml\ntraining: {stps: 1}",
        "extends: a.yaml\ntraining: {steps: x}",
        "extends: a.yaml\nadapter: {kind: ia3, r: 3}",
        "extends: a.yaml\nadapter: {kind: lorra}",
        "extends: a.yaml\ndata: {mix: [{source: a}, {train: b}]}",
    ]:
        assert not fits(part)


def test_json_schema_documents_every_field() -> None:
    schema = json_schema()
    bare = [
        f"{name}.{key}"
        for name, block in {"Recipe": schema, **schema["$defs"]}.items()
        for key, value in block.get("properties", {}).items()
        if not value.get("description")
    ]
    assert bare == []
    assert schema["properties"].keys() == {"extends", *Recipe.model_fields}


def test_json_schema_tells_plugins_apart() -> None:
    blocks = json_schema()["$defs"].values()
    kinds = {block["properties"]["kind"]["const"] for block in blocks if "kind" in block.get("properties", {})}
    assert {"lora", "full", "text_classification", "causal_lm"} <= kinds


def test_import_is_light() -> None:
    heavy = ["torch", "transformers", "peft", "datasets", "accelerate", "numpy", "sklearn", "scipy", "tokenizers"]
    code = (
        "import sys, time; start = time.process_time(); import hf_finetune.recipe; "
        f"print(time.process_time() - start, sorted(set({heavy!r}) & set(sys.modules)))"
    )
    seconds, loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split(" ", 1)
    assert loaded.strip() == "[]"
    assert float(seconds) < 2.0
