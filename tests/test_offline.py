"""Without a network: nothing is tried with HF_HUB_OFFLINE, and a Hub that refuses stops nothing that is cached."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from hubcache import DATA, FIRST, MODEL, SECOND, keep_data, keep_model
from huggingface_hub import ModelCard, constants
from safetensors.torch import load_file, save_file
from test_resume import facts

from hf_finetune.config.blocks import Model
from hf_finetune.data import sources
from hf_finetune.models import pretrained
from hf_finetune.pipeline.check import look
from hf_finetune.recipe import Recipe, read

TESTS = Path(__file__).parent
RECIPE = """\
task: {{kind: text_classification, text: text, label: label}}
model: {{name: {model}{pin}}}
data: {{source: {data}{pin}, train: train, validation: test, max_length: 32}}
adapter: {{kind: lora, r: 4, alpha: 8, target_modules: all-linear}}
training: {{steps: 4, batch_size: 16, learning_rate: 3e-3, precision: fp32, log_every: 1}}
checkpoints: {{every: 2}}
tracking: {{images: false, report: false}}
output: {output}
"""
OFFLINE = {
    "check": ["check", "{recipe}", "--show", "1"],
    "train": ["train", "{recipe}"],
    "locked": ["train", "--locked", "{run}/run.lock.json"],
    "resume": ["train", "{recipe}", "training.steps=6", "--allow-change", "training.steps"],
    "pinned": ["train", "{pinned}"],
    "tensorboard": ["tensorboard", "{run}", "--rebuild"],
    "compare": ["compare", "{run}", "{run}-repeat"],
    "evaluate": ["evaluate", "{run}", "--by", "label"],
    "predict": ["predict", "{run}", "--input", "{texts}", "--output", "{run}.csv"],
    "merge": ["merge", "{run}", "--to", "{run}-merged"],
}
"""One line a command, in this order: every verb that works on a cached model, data set or run belongs here."""
REFUSED = {name: OFFLINE[name] for name in ("check", "train")}
NAMESPACE = ["unshare", "--net", "--map-root-user"]
"""A network namespace of its own, in which not even the loopback is up."""


def rows(count: int, first: int = 0) -> list[dict[str, str]]:
    subjects = ("film", "movie", "story", "plot", "acting", "cast", "scene", "music")
    said = {"good": ("good", "great", "fine", "lovely"), "bad": ("bad", "poor", "dull", "weak")}
    made = []
    for index in range(first, first + count):
        label = "good" if index % 2 else "bad"
        words = f"the {subjects[index // 2 % 8]} is {'very ' * (index // 64)}{said[label][index // 16 % 4]}"
        made.append({"text": words, "label": label})
    return made


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str) -> dict[str, str]:
    """Environment with full caches of one model and one data set."""
    folder = tmp_path_factory.mktemp("cached")
    keep_model(folder / "hub", tiny_bert)
    keep_data(folder / "datasets", {"train": rows(64), "test": rows(32, 64)})
    names = ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HOME", "HF_FINETUNE_CACHE")
    return dict(zip(names, (str(folder / name) for name in ("hub", "datasets", "home", "own")), strict=True))


def run(folder: Path, commands: dict[str, list[str]], env: dict[str, str], *start: str) -> dict[str, Any]:
    """What came of each command; `output` holds what all of them printed."""
    places = {name: str(folder / f"{name}.yaml") for name in ("recipe", "pinned")} | {"run": str(folder / "run")}
    places["texts"] = str(folder / "texts.txt")
    (folder / "texts.txt").write_text("the film is good\nthe plot is dull\n")
    pin = f", revision: {FIRST}"
    (folder / "recipe.yaml").write_text(RECIPE.format(model=MODEL, data=DATA, pin="", output=places["run"]))
    pinned = RECIPE.format(model=MODEL, data=DATA, pin=pin, output=folder / "pinned") + "require_pinned: true\n"
    (folder / "pinned.yaml").write_text(pinned)
    words = {name: [word.format(**places) for word in command] for name, command in commands.items()}
    (folder / "commands.json").write_text(json.dumps(words))
    command = [*start, sys.executable, str(TESTS / "guarded.py"), str(folder / "commands.json"), str(folder / "result")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False, cwd=TESTS.parent)
    assert (folder / "result").exists(), done.stdout + done.stderr
    found: dict[str, Any] = json.loads((folder / "result").read_text())
    return found | {"output": done.stdout + done.stderr, "folder": folder}


def environment(cached: dict[str, str], **more: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if "OFFLINE" not in name}
    return {**plain, **cached, **more}


def namespace() -> list[str]:
    """The words before a command that cut it off; none where that is not allowed."""
    able = shutil.which("unshare") and subprocess.run([*NAMESPACE, "true"], check=False, capture_output=True)
    return NAMESPACE if able and able.returncode == 0 else []


@pytest.fixture(scope="module")
def offline(cached: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every command of `OFFLINE`, with HF_HUB_OFFLINE=1 and, where that is allowed, without any network device."""
    env = environment(cached, HF_HUB_OFFLINE="1")
    return run(tmp_path_factory.mktemp("offline"), OFFLINE, env, *namespace())


@pytest.fixture(scope="module")
def refused(cached: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same, in part, where nothing says that it is offline, and the Hub's address refuses."""
    cached = {**cached, "HF_FINETUNE_CACHE": cached["HF_FINETUNE_CACHE"] + "-2"}
    return run(tmp_path_factory.mktemp("refused"), REFUSED, environment(cached, HF_ENDPOINT="http://127.0.0.1:9"))


def test_offline_a_command_works_and_tries_no_connection(offline: dict[str, Any]) -> None:
    for name in OFFLINE:
        assert offline[name] == {"code": 0, "tried": []}, offline["output"]


@pytest.mark.slow
def test_f32_a_hub_that_refuses_stops_nothing_and_nobody_else_is_asked(refused: dict[str, Any]) -> None:
    for name in REFUSED:
        assert refused[name]["code"] == 0, refused["output"]
        assert {address for address in refused[name]["tried"] if "127.0.0.1" not in address} == set()


@pytest.mark.slow
def test_the_guard_sees_who_asks(refused: dict[str, Any]) -> None:
    assert any("('127.0.0.1', 9)" in address for address in refused["check"]["tried"])
    assert refused["train"]["tried"] == []  # asked once a process


def test_an_offline_run_is_whole(offline: dict[str, Any]) -> None:
    folder = offline["folder"] / "run"
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    assert "resuming from" in offline["output"]
    assert (folder / "adapter" / "README.md").is_file()
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if line["phase"] == "train"] == [1, 2, 3, 4, 5, 6]


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hub that refuses, for this process."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)


@pytest.mark.usefixtures("unreachable")
def test_a_hub_that_refuses_is_asked_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(model=MODEL, data=DATA, pin="", output="run"))
    sources.settle(Recipe.load(str(file)))
    assert "http://127.0.0.1:9 can't be reached" in capsys.readouterr().err
    assert (constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE) == (True, True)
    sources.settle(Recipe.load(str(file)))
    assert capsys.readouterr().err == ""
    assert constants.HF_HUB_OFFLINE


@pytest.mark.usefixtures("unreachable")
def test_who_needs_no_hub_does_not_ask(tmp_path: Path, tiny_bert: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(model=tiny_bert, data=tmp_path, pin="", output="run"))
    sources.settle(Recipe.load(str(file)))
    assert not constants.HF_HUB_OFFLINE
    assert capsys.readouterr().err == ""


def test_the_commit_of_a_model_is_what_its_branch_means(
    cached: dict[str, str], tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        constants, "HF_HUB_CACHE", str(shutil.copytree(cached["HF_HUB_CACHE"], tmp_path / "hub", symlinks=True))
    )
    assert pretrained.commit(Model(name=MODEL)) == FIRST
    place = tmp_path / "hub" / f"models--{MODEL.replace('/', '--')}"
    (place / "snapshots" / FIRST).rename(place / "snapshots" / SECOND)
    (place / "refs" / "main").write_text(SECOND)
    assert pretrained.commit(Model(name=MODEL, revision="main")) == SECOND
    assert pretrained.commit(Model(name=tiny_bert)) is None


@pytest.mark.slow
def test_s8_a_branch_that_moved_does_not_move_a_repeat(cached: dict[str, str], tmp_path: Path, tiny_bert: str) -> None:
    hub = Path(shutil.copytree(cached["HF_HUB_CACHE"], tmp_path / "hub", symlinks=True))
    other = Path(shutil.copytree(tiny_bert, tmp_path / "other"))
    state = load_file(other / "model.safetensors")
    save_file({name: value + 0.1 for name, value in state.items()}, other / "model.safetensors", {"format": "pt"})
    keep_model(hub, str(other), SECOND)
    first, then = tmp_path / "first", tmp_path / "then"
    first.mkdir()
    then.mkdir()
    env = environment(cached, HF_HUB_OFFLINE="1")
    assert run(first, {"train": ["train", "{recipe}"]}, env)["train"]["code"] == 0
    locked = ["train", "--locked", f"{first / 'run'}/run.lock.json", f"output={then / 'repeat'}"]
    commands = {"plain": ["train", "{recipe}"], "locked": locked}
    found = run(then, commands, {**env, "HF_HUB_CACHE": str(hub)})
    assert (found["plain"]["code"], found["locked"]["code"]) == (0, 0), found["output"]
    assert facts(then / "repeat") == facts(first / "run") != facts(then / "run")


def test_a_run_that_was_changed_on_the_way_says_so_in_its_lock(offline: dict[str, Any]) -> None:
    lock = json.loads((offline["folder"] / "run" / "run.lock.json").read_text())
    assert lock["changed"] == ["training.steps was 4, is 6"]
    assert json.loads((offline["folder"] / "run-repeat" / "run.lock.json").read_text())["changed"] == []


def test_s8_a_branch_is_resolved_to_a_commit_in_the_lock(offline: dict[str, Any]) -> None:
    lock = json.loads((offline["folder"] / "run" / "run.lock.json").read_text())
    found = [lock["model"], lock["data"]["data.train"], lock["data"]["data.validation"]]
    assert [(one["asked"], one["commit"]) for one in found] == [(None, FIRST)] * 3
    assert [one["source"] for one in found] == [MODEL, DATA, DATA]


def test_s8_a_repeat_pins_what_the_lock_resolved(offline: dict[str, Any]) -> None:
    repeated = Recipe.load(str(offline["folder"] / "run-repeat" / "recipe.yaml"))
    assert (repeated.model.revision, repeated.data.revision) == (FIRST, FIRST)


def test_the_card_and_the_adapter_name_the_commit_that_was_trained_on(offline: dict[str, Any]) -> None:
    folder = offline["folder"] / "run" / "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["revision"] == FIRST
    card = ModelCard.load(folder / "README.md")
    assert card.data.base_model == MODEL
    assert {result.dataset_revision for result in card.data.eval_results} == {FIRST}
    assert f"at revision `{FIRST}`" in card.text


def test_s8_a_branch_is_refused_where_commits_are_required(offline: dict[str, Any]) -> None:
    for key in ["model.revision", "data.revision"]:
        for revision in ["main", "v1.0", None]:
            reading = read(str(offline["folder"] / "pinned.yaml"), [f"{key}={revision or 'null'}"])
            findings = look(reading)
            assert findings.exit_code == 2
            assert any(problem.key == key and "require_pinned" in problem.message for problem in findings.errors)
