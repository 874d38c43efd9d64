"""Every file of tasks/ keeps the contract: trained, stopped, resumed, evaluated, predicted and merged, on tiny models.

A new task is tested once its file exists. Its block is made of its required fields, each named as itself, unless
`BLOCKS` has one; its rows are its own examples; its model is the first here that its auto class knows.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hf_finetune import Run, check, load_run, train
from hf_finetune.config.section import discover
from hf_finetune.errors import Stopped
from hf_finetune.pipeline.init import init
from hf_finetune.recipe import Recipe
from hf_finetune.reports import data as reports_data
from hf_finetune.tasks._catalogue import METRICS
from hf_finetune.tasks.base import State, Task

FOUND: dict[str, Any] = dict(discover("hf_finetune.tasks", Task))
KINDS = {name: kind for name, kind in FOUND.items() if all(map(importlib.util.find_spec, kind.needs))}
BLOCKS: dict[str, dict[str, Any]] = {
    "causal_lm": {"prompt": "prompt", "completion": "completion"},
    "reward": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", "margin": "margin"},
    "decision": {
        "text": "text",
        "decisions": {
            "label": {
                "type": "choice",
                "text": "What is the label?",
                "options": ["first", "second"],
                "answer": "label",
            }
        },
    },
    "preference": {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
}
every_task = pytest.mark.parametrize("kind", KINDS)

SNIPPETS = """
import os, re, sys
for folder in sys.argv[1:]:
    os.chdir(folder)
    load, use = re.findall(r"```python\\n(.*?)```", open("README.md").read(), re.S)[:2]
    exec(load + use, {})
assert not any(name.startswith("hf_finetune") for name in sys.modules)
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, model_of: Callable[[Task], str]) -> Callable[..., dict[str, Any]]:
    """A recipe of a kind of task, with rows of its own: `recipe("causal_lm")`."""

    @cache
    def data(kind: str) -> tuple[Task, Path]:
        required = [name for name, field in KINDS[kind].model_fields.items() if field.is_required()]
        task = KINDS[kind].model_validate(BLOCKS.get(kind, {name: name for name in required}))
        folder = tmp_path_factory.mktemp(kind)
        for split, sizes in (("train", range(3, 21)), ("validation", range(21, 28))):
            rows = [task.example(State(names=("first", "second")[size % 2 :][:1]), size) for size in sizes]
            _write(rows, folder / f"{split}.parquet")
        return task, folder

    def make(kind: str, output: Path, **training: Any) -> dict[str, Any]:
        task, folder = data(kind)
        steps: dict[str, Any] = {
            "steps": 4,
            "batch_size": 8,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "log_every": 1,
        }
        return {
            "task": task.model_dump(),
            "model": {"name": model_of(task), "dropout": 0.1},
            "data": {"train": str(folder / "train.parquet"), "validation": str(folder / "validation.parquet")}
            | {"max_length": 40},
            "adapter": {"kind": "lora", "r": 4, "alpha": 8, "target_modules": "all-linear"},
            "training": {**steps, "micro_batch": 3, "log_every": 1, "eval_every": 2, **training},
            "tracking": {"images": False, "report": False},
            "output": str(output),
        }

    return make


def _write(rows: list[dict[str, Any]], file: Path) -> None:
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(file)


@pytest.fixture(scope="module")
def trained(
    recipe: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], Run]]:
    """A finished run of a kind of task, the same for all tests."""

    @cache
    def run(kind: str) -> Run:
        folder = tmp_path_factory.mktemp(f"{kind}_runs") / "run"
        return train(recipe(kind, folder))

    yield run
    run.cache_clear()


@every_task
def test_a_recipe_can_be_checked_without_weights(kind: str, recipe: Callable[..., Any], tmp_path: Path) -> None:
    checked = check(recipe(kind, tmp_path / "run"))
    assert checked.problems == []
    parts: Any = checked.parts
    assert reports_data.first(parts.recipe, parts.prepared, parts.tokenizer, 1), "rows can be shown"


@every_task
def test_init_recognises_the_rows_of_the_task(kind: str, recipe: Callable[..., Any], tmp_path: Path) -> None:
    made = recipe(kind, tmp_path / "run")
    written, _ = init(made["data"]["train"], model=made["model"]["name"], output=str(tmp_path / "recipe.yaml"))
    checked = check(written, [f"output={tmp_path / 'run'}"])
    assert checked.ok, str(checked)
    assert checked.recipe is not None
    assert checked.recipe.task.model_dump(exclude_unset=True).items() <= made["task"].items()


@every_task
def test_a_stopped_run_goes_on_bit_for_bit(
    kind: str,
    recipe: Callable[..., dict[str, Any]],
    trained: Callable[[str], Run],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hf_finetune.training.trainer import FinetuneTrainer

    step = FinetuneTrainer.training_step

    def stopping(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments, **options)

    made = recipe(kind, tmp_path / "run")
    monkeypatch.setattr(FinetuneTrainer, "training_step", stopping)
    with pytest.raises(Stopped):
        train(made)
    monkeypatch.undo()
    train(made)
    assert _facts(tmp_path / "run") == _facts(trained(kind).folder)


def _facts(folder: Path) -> tuple[list[Any], str]:
    """Numbers that do not depend on the clock, and the hash of the adapter."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [(line["step"], line["phase"], line.get("loss"), line.get("grad_norm")) for line in lines]
    weights = next((folder / "adapter").glob("*.safetensors"))
    return kept, hashlib.sha256(weights.read_bytes()).hexdigest()


@every_task
def test_evaluation_of_the_saved_run_is_that_of_training(kind: str, trained: Callable[[str], Run]) -> None:
    run = trained(kind)
    document = load_run(run.folder).evaluate(split="validation")
    expected = run.metrics["validation"]
    found = {name: metric["value"] for name, metric in document["metrics"].items() if name in expected}
    assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-5)
    assert {"loss", *run.recipe.task.headline} & found.keys() > {"loss"}, "people see more than the loss"
    assert set(run.recipe.task.best_metrics) & found.keys(), "one of them can select the best model"
    assert all(METRICS[name].greater is not None for name in run.recipe.task.best_metrics), "whose direction is known"


@every_task
def test_rows_without_targets_are_predicted(kind: str, trained: Callable[[str], Run]) -> None:
    run = trained(kind)
    task = run.recipe.task
    examples = [task.example(State(names=("first",)), size) for size in (5, 30, 9)]
    rows = [{name: row[name] for name in task.asked_columns()} for row in examples]
    found = load_run(run.folder).predict(rows, max_new_tokens=3 if task.generates else None)
    assert len(found) == 3
    if not task.generates:
        state = State(names=("first", "second"))
        assert all(list(row) == list(task.outputs(state)) for row in found)
        (alone,) = load_run(run.folder).predict(rows[:1])
        scores = [{name: value for name, value in row.items() if isinstance(value, float)} for row in (found[0], alone)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-4), "whatever else is in the batch"


@every_task
def test_the_merged_model_is_the_run(kind: str, trained: Callable[[str], Run], tmp_path: Path) -> None:
    report = load_run(trained(kind).folder).merge(tmp_path / "merged", dtype="fp32")
    assert report.metrics["merged"]["loss"] == pytest.approx(trained(kind).metrics["validation"]["loss"], rel=1e-3)


@every_task
def test_masked_rows_and_the_cut_into_batches_change_nothing(kind: str, trained: Callable[[str], Run]) -> None:
    import torch

    from hf_finetune.inference.load import open_run
    from hf_finetune.training.pool import pooled

    run = open_run(str(trained(kind).folder), [])
    task, network = run.recipe.task, run.model()
    examples = [task.example(run.targets, size) for size in (4, 9, 6)]
    columns = {name: [row[name] for row in examples] for name in examples[0]}
    rows = task.features(columns, run.tokenizer, run.targets, 40)
    assert all(row["weight"] > 0 and row["size"] <= row["whole"] for row in rows)

    def total(*parts: list[Any]) -> tuple[float, float]:
        batches = [task.collate(part, run.tokenizer, run.targets) for part in parts]
        if task.contrasts:
            batches = [
                batch | pool for batch, pool in zip(batches, pooled(task, network, batches, run.targets), strict=True)
            ]
        with torch.no_grad():
            losses = [float(task.loss(network, batch, run.targets).sum) for batch in batches]
        return sum(losses), sum(float(task.count(batch, run.targets)) for batch in batches)

    whole = total(rows)
    assert whole == pytest.approx(total(rows[:1], rows[1:]), rel=1e-5)
    assert whole == pytest.approx(total([*rows, *map(task.masked, rows)]), rel=1e-5)
    assert total([task.masked(rows[0])]) == (0.0, 0.0)


@every_task
def test_what_a_task_learned_survives_json(kind: str, trained: Callable[[str], Run]) -> None:
    from hf_finetune.inference.load import open_run

    state = open_run(str(trained(kind).folder), []).targets
    assert State.from_json(json.loads(json.dumps(state.to_json()))) == state


@pytest.mark.slow
def test_the_code_on_the_card_runs_without_this_project(trained: Callable[[str], Run]) -> None:
    folders = [str(trained(kind).adapter) for kind in KINDS]
    done = subprocess.run([sys.executable, "-c", SNIPPETS, *folders], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(recipe: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    script = str(Path(__file__).with_name("first_steps.py"))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    found = []
    for name, command in {
        "one": [sys.executable, script],
        "two": [*launcher, "--main_process_port", "0", script],
    }.items():
        jobs = {}
        for kind in KINDS:
            made = Recipe.model_validate(recipe(kind, tmp_path / name / kind, micro_batch=4, eval_every=4))
            plain = made.model_copy(update={"model": made.model.model_copy(update={"dropout": 0.0})})
            jobs[kind] = plain.model_dump(mode="json")
        (tmp_path / f"{name}.json").write_text(json.dumps(jobs))
        words = [*command, str(tmp_path / f"{name}.json"), str(tmp_path / f"{name} steps.json")]
        environment = os.environ | {"ACCELERATE_USE_CPU": "1"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        found.append(json.loads((tmp_path / f"{name} steps.json").read_text()))
    for kind in KINDS:
        one, two = ([value for step in steps[kind] for value in step] for steps in found)
        assert two == pytest.approx(one, rel=1e-5), kind
