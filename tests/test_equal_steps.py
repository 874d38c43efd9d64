"""The same recipe is the same optimisation, however the global batch is cut into ranks and micro-batches."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Steps = dict[str, list[tuple[float, float]]]

TASKS = ("multi_label", "regression", "causal_lm", "weighted", "uneven")
SLOW = ("single_label", "eva", "streamed")
STREAMED = {"streamed": 16, "uneven": 5}
"""Rows of a global batch of the streams; of 5 in micro-batches of 1, two processes get 3 and 2."""
WORLDS = {"one process": 1, "two processes": 2}


@pytest.fixture(scope="module")
def jobs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, tiny_llama: str
) -> Callable[[str], dict[str, Any]]:
    """Recipes for the tasks of all tests, accumulation 1 and 4, fp32, no dropout, 18 rows: the second batch has 2."""
    folder = tmp_path_factory.mktemp("equal_steps")
    words = ("film", "plot", "cast", "scene")
    rows = [
        {
            "text": f"the {words[i % 4]} is" + " very" * (i * 7 % 11) + (" good" if i % 3 else " bad"),
            "label": ("pos" if i % 3 else "neg"),
            "one": i % 2,
            "two": i // 2 % 2,
            "score": i / 7 - 1,
            "question": "what is" + " one plus" * (i % 4) + " two ?",
            "answer": " ".join(["three", "four", "five", "six", "seven"][: 1 + i % 5]),
        }
        for i in range(18)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    classify = {"kind": "text_classification", "text": "text"}
    tasks: dict[str, dict[str, Any]] = {
        "single_label": classify | {"label": "label"},
        "weighted": classify | {"label": "label", "class_weights": "balanced", "label_smoothing": 0.1},
        "eva": classify | {"label": "label"},
        "multi_label": classify | {"label": ["one", "two"], "problem": "multi_label"},
        "regression": classify | {"label": "score", "problem": "regression"},
        "causal_lm": {"kind": "causal_lm", "prompt": "question", "completion": "answer"},
        "streamed": {"kind": "causal_lm", "prompt": "question", "completion": "answer"},
        "uneven": {"kind": "causal_lm", "prompt": "question", "completion": "answer"},
    }

    items: list[Any] = [item for item in request.session.items if item.path == request.path]
    asked = {item.callspec.params["task"] for item in items}

    def make(world: str) -> dict[str, Any]:
        found = {}
        for name, task in ((name, tasks[name]) for name in sorted(asked)):
            for accumulation in (1, 4):
                batch_size = STREAMED.get(name, 16)
                micro_batch = max(1, batch_size // WORLDS[world] // accumulation)
                init = "eva" if name == "eva" else "default"
                lora = {"kind": "lora", "r": 4, "alpha": 8, "target_modules": "all-linear", "init": init}
                key = f"{name}, accumulation {accumulation}"
                found[key] = {
                    "task": task,
                    "model": {"name": tiny_llama if task["kind"] == "causal_lm" else tiny_bert, "dropout": 0.0},
                    "data": {"train": str(data), "max_length": 64}
                    # Some rows are too long, and another one takes their place.
                    | ({"streaming": True, "max_length": 24, "overlong": "drop"} if name in STREAMED else {}),
                    "adapter": lora | {"dropout": 0.0},
                    "training": {
                        "steps": 2,
                        "batch_size": batch_size,
                        "micro_batch": micro_batch,
                        "learning_rate": 1e-3,
                        "precision": "fp32",
                        "log_every": 1,
                        "max_grad_norm": None,
                    },
                    "tracking": {"images": False, "report": False},
                    "output": str(folder / world / key),
                }
        return found

    return make


@pytest.fixture(scope="module")
def steps(jobs: Callable[[str], dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Steps]:
    """Loss and gradient norm of each step of every recipe, with one or with two processes."""
    folder = tmp_path_factory.mktemp("steps")
    script = str(Path(__file__).with_name("first_steps.py"))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    commands = {
        "one process": [sys.executable, script],
        "two processes": [*launcher, "--main_process_port", "0", script],
    }

    @functools.cache
    def first(world: str) -> Steps:
        recipes, result = folder / f"{world}.json", folder / f"{world} result.json"
        recipes.write_text(json.dumps(jobs(world)))
        environment = os.environ | {"ACCELERATE_USE_CPU": "1"}
        words = [*commands[world], str(recipes), str(result)]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        found: Steps = json.loads(result.read_text())
        return found

    return first


@pytest.mark.parametrize("task", [*TASKS, *(pytest.param(task, marks=pytest.mark.slow) for task in SLOW)])
@pytest.mark.parametrize("world", ["one process", pytest.param("two processes", marks=pytest.mark.slow)])
def test_loss_and_gradient_norm_do_not_depend_on_the_division(
    steps: Callable[[str], Steps], task: str, world: str
) -> None:
    plain = steps("one process")[f"{task}, accumulation 1"]
    assert len(plain) == 2
    for accumulation in (1, 4):
        divided = steps(world)[f"{task}, accumulation {accumulation}"]
        for (loss, norm), (other_loss, other_norm) in zip(plain, divided, strict=True):
            assert other_loss == pytest.approx(loss, rel=1e-5)
            assert other_norm == pytest.approx(norm, rel=1e-5)
