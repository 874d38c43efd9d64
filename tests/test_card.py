"""The model card: metadata that the Hub takes, metrics as measured, code that runs, text that stays text."""

from __future__ import annotations

import ast
import inspect
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import Run
from hubserver import Fault, Repo, serving
from huggingface_hub import ModelCard, constants
from models import CLASSIFIER, FOUR, LANGUAGE_MODEL, TWO, build, loaded, recipe
from pushing import environment

from hf_finetune.inference import saving
from hf_finetune.models import pretrained
from hf_finetune.recipe import Recipe
from hf_finetune.reports import card
from hf_finetune.reports.intervals import Intervals
from hf_finetune.reports.run import Result
from hf_finetune.tasks.base import State

LORA = {"kind": "lora", "r": 4}
EVIL = "x`\n---\nbase_model: evil\n---\n# Pwned\n[a](http://e.vil)<img src=x>|```python\nimport os\n```"
SCRIPT = """
import io, os, re, sys, contextlib
for folder in sys.argv[1:]:
    os.chdir(folder)
    scope, said = {}, io.StringIO()
    with contextlib.redirect_stdout(said):
        for block in re.findall(r"```python\\n(.*?)```", open("README.md").read(), re.S):
            exec(block, scope)
    open("../said.txt", "w").write(said.getvalue())
"""


def card_of(run: Path) -> str:
    """Its text."""
    return (run / "adapter" / "README.md").read_text()


def scores(run: Path) -> dict[str, float]:
    """Final metrics of a run, from the line that closes metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {name.removeprefix("validation_"): v for name, v in lines[-1].items() if name.startswith("validation_")}


@pytest.mark.parametrize("kind", ["classifier", "chatter"])
def test_the_model_index_has_the_metrics_of_the_run_with_their_intervals(
    kind: str, request: pytest.FixtureRequest
) -> None:
    run = request.getfixturevalue(kind)
    data: Any = ModelCard(card_of(run)).data
    results = data.eval_results
    assert results
    measured = scores(run)
    whole = {name: value for name, value in measured.items() if not re.match(r"(precision|recall|f1|support)\.", name)}
    assert {result.metric_name: result.metric_value for result in results} == whole
    assert {result.dataset_split for result in results} == {"validation"}
    bounds = {result.metric_name: result.metric_args for result in results if result.metric_args}
    low, high = bounds["loss"]["confidence_interval"]
    assert low < measured["loss"] < high
    assert bounds["loss"]["confidence_level"] == 0.95


@pytest.mark.skipif(
    "ENDPOINT" not in inspect.getsource(ModelCard.validate), reason="this huggingface_hub asks huggingface.co whatever"
)
def test_the_hub_finds_nothing_wrong_with_a_card(
    classifier: Path, chatter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving("none") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        for run in (classifier, chatter):
            ModelCard(card_of(run)).validate()
        assert len(hub.asked("validate-yaml")) == 2


def test_curves_and_confusion_matrix_are_shown(classifier: Path) -> None:
    shown = re.findall(r"!\[[^\]]+\]\((images/[\w.-]+)\)", card_of(classifier))
    assert {"images/loss.png", "images/confusion_matrix-validation.png"} <= set(shown)
    assert {f"images/{file.name}" for file in (classifier / "adapter" / "images").iterdir()} == set(shown)


def test_limits_tell_what_was_cut_and_how_uneven_the_labels_are(run: Any) -> None:
    done: Run = run("training.steps=2", "data.max_length=6", "data.checks.leakage=off", "data.checks.duplicates=off")
    text = card_of(done.folder)
    kept = [line for line in text.splitlines() if line.startswith("- train: ")]
    assert re.search(r"\d+ cut to max_length", kept[0])
    assert "- check of the data conflicting_labels (warn): 41 in train, 9 in validation" in text


def test_uneven_labels_are_a_limit(classifier: Path) -> None:
    run: Any = SimpleNamespace(facts={}, scores={"validation": {}})
    assert list(card._limits(run, TWO)) == []
    uneven = replace(TWO, counts=(3, 30))
    assert list(card._limits(run, uneven)) == ["uneven labels: 30 rows of positive, 3 of negative"]


def test_the_recipe_of_a_card_names_nothing_of_this_machine(classifier: Path, tiny_bert: str) -> None:
    text = card_of(classifier)
    assert str(classifier) not in text
    assert str(Path(tiny_bert).parent) not in text
    shown = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[-1])
    assert (shown["model"]["name"], shown["data"]["train"]) == ("(local)", "(local)")
    assert shown["training"]["learning_rate"] == 3e-3
    assert shown["adapter"]["r"] == 4
    assert "output" not in shown


def test_paths_addresses_and_tokens_are_hidden() -> None:
    for text, hidden in [
        ("see /home/alice/x.csv", "see (local)"),
        ("~/data and ./here/y", "(local) and (local)"),
        ("s3://bucket/runs?key=1", "(local)"),
        ("https://host.corp:8080/x", "(local)"),
        (r"C:\Users\alice", "(local)"),
        ("</s> and/or {a}/{b} owner/name", "</s> and/or {a}/{b} owner/name"),
        ("use hf_" + "a1" * 12, "use <hidden>"),
    ]:
        assert card.hidden(text) == hidden


def test_a_card_says_that_its_code_loads_no_quantised_base(tiny_bert: str) -> None:
    made = recipe(tiny_bert, LORA)
    assert "quantised" not in (card.card(made, TWO, ["code"]))
    made = made.model_copy(update={"model": made.model.model_copy(update={"quantization": "nf4"})})
    told = card.card(made, TWO, ["code"]).partition("```python")[0]
    assert "every metric here measured, on the base quantised to nf4" in told


def test_rows_cut_off_the_training_split_are_not_called_the_hubs_validation(tiny_bert: str) -> None:
    tree = recipe(tiny_bert, LORA).model_dump(mode="json")
    tree["data"] = {"source": "nyu-mll/glue", "train": "train", "validation_share": 0.1, "limit": 50}
    result = Result("validation", {"accuracy": 0.5}, Intervals())
    made = card._eval_result(Recipe.model_validate(tree), result, "accuracy")
    seed = tree["training"]["seed"]
    assert (made.dataset_split, made.dataset_args) == ("train", {"share": 0.1, "limit": 50, "seed": seed})


NO_TEMPLATE, TEMPLATE = (SimpleNamespace(chat_template=template) for template in (None, "{{ messages }}"))


def test_data_of_the_hub_are_named_and_files_are_not(tiny_bert: str) -> None:
    made = recipe(tiny_bert, LORA)
    tree = made.model_dump(mode="json") | {"data": {"source": "nyu-mll/glue", "subset": "sst2", "train": "train"}}
    public = Recipe.model_validate(tree)
    assert card.hub_sources(public) == ["nyu-mll/glue"]
    assert "source: nyu-mll/glue" in card.public_recipe(public)
    data: Any = ModelCard(card.plain(public, TWO, loaded(made).model.config, NO_TEMPLATE)).data
    assert data.datasets == ["nyu-mll/glue"]
    assert card.hub_sources(made) == []


def test_s14_s15_labels_and_recipes_cannot_break_out_of_a_card(tiny_bert: str) -> None:
    names = (EVIL, "plain", "\x1b[31mred\u202e")
    targets = State(names=names, counts=(1, 2, 3), id_of={name: i for i, name in enumerate(names)})
    made = recipe(tiny_bert, LORA, CLASSIFIER | {"labels": list(names)[:2]})
    text = card.plain(made, targets, loaded(made, targets).model.config, NO_TEMPLATE)
    header = yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))
    assert "base_model" not in header
    assert [line for line in text.splitlines() if line.startswith("# ")] == ["# lora for text_classification"]
    shown = text.partition("## Training")[0]
    assert not any(odd in shown for odd in ("\x1b", "\u202e"))
    blocks = re.findall(r"```python\n(.*?)```", shown, re.DOTALL)
    assert "<img" not in re.sub(r"```python\n(.*?)```", "", shown, flags=re.DOTALL)
    assert len(blocks) == 2
    scope: dict[str, Any] = {}
    call = re.search(r"id2label=(.*),\n", blocks[0])
    assert call is not None
    exec(f"found = {call[1]}", scope)
    assert tuple(scope["found"].values()) == names


def test_s15_a_system_turn_cannot_end_the_code(tiny_llama: str) -> None:
    made = recipe(tiny_llama, LORA, {"kind": "causal_lm", "prompt": "a", "completion": "b", "system": EVIL})
    text = card.plain(made, State(), loaded(made, State()).model.config, TEMPLATE)
    blocks = re.findall(r"```python\n(.*?)```", text.partition("## Training")[0], re.DOTALL)
    compile(blocks[1], "card", "exec")
    fence = re.findall(r"^(`{4,})yaml\n.*?^\1$", text, re.DOTALL | re.MULTILINE)
    assert fence, "the recipe quotes the turn within a longer fence"


@pytest.mark.slow
def test_the_code_of_a_card_uses_the_model(tiny_bert: str, tiny_llama: str, tmp_path: Path) -> None:
    cases: dict[str, tuple[str, dict[str, Any], State, str]] = {
        "single": (tiny_bert, CLASSIFIER, FOUR, "|".join(re.escape(name) for name in FOUR.names)),
        "pair": (tiny_bert, CLASSIFIER | {"text": ["a", "b"]}, TWO, "negative|positive"),
        "multi": (tiny_bert, CLASSIFIER | {"problem": "multi_label", "threshold": 0.01}, FOUR, r"\['bad', .*\]"),
        "number": (tiny_bert, CLASSIFIER | {"problem": "regression"}, State(names=("label",)), r"-?\d+\.\d+"),
        "text": (tiny_llama, LANGUAGE_MODEL, State(), "(?s).*"),
        "chat": (tiny_llama, {"kind": "causal_lm", "prompt": "a", "completion": "b"}, State(), "(?s).*"),
    }
    for name, (base, task, targets, _) in cases.items():
        made = recipe(base, LORA, task)
        tokenizer = pretrained.load_tokenizer(made.model)
        saving.save(build(made, targets), made, targets, tokenizer, tmp_path / name / "adapter")
    folders = [str(tmp_path / name / "adapter") for name in cases]
    subprocess.run([sys.executable, "-c", SCRIPT, *folders], check=True, timeout=120, capture_output=True)
    for name, (_, _, _, says) in cases.items():
        assert re.fullmatch(says, (tmp_path / name / "said.txt").read_text().strip()), name


BASE_CARD = "---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\nbase_model: [1, 2]\n---\n# Base\n"


def test_the_licence_of_a_local_base_is_that_of_its_card(tiny_bert: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text((Path(tiny_bert) / "config.json").read_text())
    made = recipe(str(base), LORA)
    assert card.licence_of_base(made) == {}
    (base / "README.md").write_text(BASE_CARD)
    assert card.licence_of_base(made) == {"license": "other", "license_name": "tiny"}
    (base / "README.md").write_text("---\nlicense: [\n---\n")
    assert card.licence_of_base(made) == {}


def test_a_licence_on_the_hub_that_is_out_of_reach_is_left_out() -> None:
    assert card.licence_of_base(recipe("owner/name", LORA)) == {}


def test_a_licence_that_breaks_off_on_its_way_is_left_out(tmp_path: Path) -> None:
    with serving("none") as hub:
        hub.repos["owner/name"] = Repo(private=False)
        hub.repos["owner/name"].commit({"README.md": BASE_CARD.encode()}, "initial commit", "main")
        tree = recipe("owner/name", LORA).model_dump(mode="json")
        script = "from hf_finetune.recipe import Recipe; from hf_finetune.reports.card import licence_of_base\n"
        script += f"tree = {tree!r}\n"
        script += "print(licence_of_base(Recipe.model_validate(tree)))"
        env = environment(hub.url, tmp_path / "home", None)
        hub.faults = [Fault("GET .*/README.md", "reset", times=99)]
        asked = [subprocess.check_output([sys.executable, "-c", script], env=env, text=True)]
        hub.faults = []
        asked += [subprocess.check_output([sys.executable, "-c", script], env=env, text=True)]
    link = "https://huggingface.co/owner/name/blob/main/LICENSE"
    known = {"license": "other", "license_name": "tiny", "license_link": link}
    assert [ast.literal_eval(said) for said in asked] == [{}, known]


def test_a_licence_is_asked_for_once_and_not_again_where_the_hub_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    card._hub_card.cache_clear()
    with serving("none") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        hub.repos["owner/limited"] = Repo(private=False)
        hub.repos["owner/limited"].commit({"README.md": BASE_CARD.encode()}, "initial commit", "main")
        hub.faults = [Fault("GET .*/README.md", "status", status=429, times=99)]
        found = [card.licence_of_base(recipe("owner/limited", LORA)) for _ in range(2)]
        assert (found, len(hub.asked("README.md"))) == ([{}, {}], 1)
    card._hub_card.cache_clear()


def test_a_card_keeps_its_code_when_it_is_moved_to_a_repository(tiny_bert: str) -> None:
    made = recipe("owner/base", LORA)
    config = loaded(recipe(tiny_bert, LORA)).model.config
    text = card.plain(made, TWO, config, NO_TEMPLATE)
    moved = card.moved(text, "me/x")
    assert moved == text.replace('folder = "."', 'folder = "me/x"')
    assert "AutoPeftModelForSequenceClassification" in moved
    assert "[owner/base](https://huggingface.co/owner/base)" in moved


def test_a_card_that_cannot_be_written_costs_a_warning_and_nothing_else(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(card, "write_atomically", full)
    done: Run = run("training.steps=1")
    assert done.status["state"] == "done"
    assert "has no metrics and charts (No space left on device)" in capsys.readouterr().err
    assert "```python" in card_of(done.folder)
