"""A run folder as a run leaves it, written by hand: the material of the report tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from hf_finetune.recipe import Recipe
from hf_finetune.reports import html
from hf_finetune.reports.run import RunData
from hf_finetune.run.folder import RunFolder
from hf_finetune.tracking.records import Record

EVIL = "</script><script>window.pwned=1</script><img src=x onerror=pwned=1>{{ 7*7 }}|`\u202e\x1b[2J"
CLASSES = {"kind": "text_classification", "text": "text", "label": "label"}
CHAT = {"kind": "causal_lm", "prompt": "question", "completion": "answer"}


def recipe(folder: Path, task: dict[str, Any]) -> Recipe:
    """A recipe whose run folder is `folder/run`."""
    data = {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
    return Recipe.model_validate(
        {
            "task": task,
            "model": {"name": "tiny"},
            "data": data,
            "adapter": {"kind": "lora", "target_modules": "all-linear"},
            "training": {"epochs": 1, "batch_size": 8, "learning_rate": 1e-3},
            "output": str(folder / "run"),
        }
    )


def predictions(count: int = 80, phase: str = "eval", step: int = 20) -> Record:
    """Of three labels, one of them with a hostile name."""
    draw = np.random.default_rng(step)
    labels = draw.integers(0, 3, count)
    logits = draw.normal(size=(count, 3))
    logits[np.arange(count), labels] += 1.5
    rows = np.column_stack([logits, labels]).astype(np.float32)
    facts = {"task": "text_classification", "problem": "single_label", "names": ["good", "bad", EVIL]}
    arrays: dict[str, np.ndarray[Any, Any]] = {"ids": np.arange(count), "rows": rows}
    return Record("predictions", phase, step, arrays, facts | {"threshold": None, "split": "validation"})


def write(folder: Path, task: dict[str, Any], records: list[Record], lines: list[dict[str, Any]]) -> RunFolder:
    """Write metrics.jsonl and records of a run."""
    made = RunFolder(str(folder / "run"))
    made.path.mkdir(parents=True, exist_ok=True)
    made.recipe.write_text(recipe(folder, task).dump())
    made.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for record in records:
        record.write(made.observations)
    return made


def page(folder: RunFolder, recipe: Recipe) -> str:
    """report.html, from the folder."""
    run = RunData.read(folder, recipe)
    return html.html(run, [(plot, html.drawn(plot)[0]) for plot in run.charts])


def lines(scores: dict[str, Any], steps: int = 20) -> list[dict[str, Any]]:
    """Of metrics.jsonl: training, two evaluations, a test, the summary."""
    train = [
        {
            "step": step,
            "phase": "train",
            "loss": 2 / step,
            "learning_rate": 1e-3,
            "grad_norm": 2.0,
            "matmul_share": 0.25,
        }
        | {"seconds_data": 0.1, "seconds_forward": 0.2, "seconds_backward": 0.5, "seconds_optimizer": 0.2}
        for step in range(1, steps + 1)
    ]
    found = [{"step": step, "phase": "eval", "time": 5.0, **scores} for step in (steps // 2, steps)]
    tested = {"step": steps, "phase": "test", **scores}
    summary = {"step": steps, "phase": "summary", "seconds": 1800.0, "world_size": 4, "device": "cuda"}
    speed = {"samples_per_second": 10.0, "tokens_per_second": 100.0, "padding_share": 0.1}
    return [*train, *found, tested, summary | speed | {"trained_parameters": 10, "parameters": 100, "peak_memory": 2e9}]


def classifier(folder: Path, count: int = 80) -> RunFolder:
    """A classifier's run with every kind of record."""
    made = predictions(count)
    examples = [{"row": 3, "text": f"a {EVIL} film", "label": "good", "predicted": EVIL, "confidence": 0.97}]
    weights = {"tags": [], "scalars": {"update_to_weight/layer.1": 0.002, "update_to_weight/layer.0": 0.001}}
    scores = {"loss": 0.5, "accuracy": 0.8, "support.good": 30.0, "f1.good": 0.8}
    return write(
        folder,
        CLASSES,
        [
            made,
            predictions(count, "test"),
            predictions(count, "eval", 10),
            Record("examples", "eval", 20, facts={"rows": examples}),
            Record("weights", "eval", 20, facts=weights),
            Record("environment", "train", 0, facts={"table": {"torch": "2.13.0", "machine": EVIL}}),
        ],
        lines(scores),
    )


def speaker(folder: Path) -> RunFolder:
    """A language model's run with every kind of record."""
    rows = np.column_stack([np.linspace(4, 8, 30), np.full(30, 4.0), np.arange(30) % 5])
    tokens = {
        "tokens": ["<s>", " the", "\n", EVIL],
        "losses": [None, 6.0, 0.5, 2.0],
        "entropies": [None, 1.0, 1.0, 1.0],
    }
    edges = {"edges": np.arange(5), "loss": np.ones(4), "tokens": np.full(4, 30)}
    scores = {"loss": 1.5, "perplexity": 4.5, "token_accuracy": 0.5}
    facts: dict[str, Any] = {
        "task": "causal_lm",
        "problem": None,
        "names": [],
        "threshold": None,
        "split": "validation",
    }
    made = write(
        folder,
        CHAT,
        [
            Record("predictions", "eval", 20, {"ids": np.arange(30), "rows": rows.astype(np.float32)}, facts),
            Record("tokens", "eval", 20, facts={"rows": [tokens | {"trained": [False, True, True, True]}]}),
            Record("positions", "eval", 20, edges),
        ],
        lines(scores),
    )
    samples = [
        {"step": step, "prompt": f"who?\n{EVIL}", "answer": f"{step} \u2028 me", "ended": True} for step in (10, 20)
    ]
    made.samples.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))
    return made
