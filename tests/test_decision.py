"""`decision`: prompts and answers are those of transformers' own pipeline, at a fitted temperature."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WORDS

from hf_finetune import load_run, train
from hf_finetune.errors import FinetuneError
from hf_finetune.tasks.base import IGNORE, State
from hf_finetune.tasks.decision import Decision

pytest.importorskip("transformers.decision")

BLOCK: dict[str, Any] = {
    "text": "message",
    "decisions": {
        "tone": {"type": "choice", "text": "what is the tone ?", "options": ["good", "bad", "fine"], "answer": "tone"},
        "level": {"type": "score", "text": "how good ?", "options": ["one", "two", "three"], "answer": "level"},
        "film": {"type": "noul", "text": "is it a film ?", "answer": "film"},
    },
}


@pytest.fixture
def task() -> Decision:
    return Decision.model_validate(BLOCK)


@pytest.fixture(scope="module")
def recipe(tiny_jev: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("decisions")
    # A model that reads yes before no, as transformers' own default is.
    shutil.copytree(tiny_jev, folder / "model")
    settings = json.loads((folder / "model" / "decision.json").read_text())
    (folder / "model" / "decision.json").write_text(json.dumps({**settings, "noul_options": ["true", "false"]}))
    tones = ["good", "bad", "fine"]
    rows = [
        {
            "message": f"the {WORDS[20 + i]} is {tones[i % 3]} .",
            "tone": tones[(i + i // 10) % 3],
            "level": i % 3,
            "film": i % 2,
        }
        for i in range(48)
    ]
    rows[5]["tone"] = None
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {
        "task": {"kind": "decision", **BLOCK},
        "model": {"name": str(folder / "model")},
        "data": {"train": str(folder / "rows.jsonl"), "validation_share": 0.4, "max_length": 64}
        | {"checks": {"unknown_tokens": "off"}},
        "adapter": {"kind": "lora", "r": 4, "alpha": 8},
        "training": {"steps": 6, "batch_size": 8, "learning_rate": 1e-2, "precision": "fp32"},
        "tracking": {"images": False, "tensorboard": False},
        "output": str(folder / "run"),
    }


def test_predictions_are_the_answers_of_the_pipeline_at_the_fitted_temperature(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import pipeline

    run = train(recipe)
    found = run.metrics["validation"]
    assert found["loss"] < found["loss_before"], "the likeliest temperature is no worse than 1"
    opened = load_run(run.folder)
    opened.merge(tmp_path / "merged", dtype="fp32")
    stored = json.loads((tmp_path / "merged" / "decision.json").read_text())["temperature"]
    assert stored == {kind: found[f"temperature.{kind}"] for kind in ("choice", "score", "noul")}
    (row,) = opened.predict([{"message": "the film is good ."}])
    task: Any = run.recipe.task
    questions = {name: asked.request() for name, asked in task.decisions.items()}
    make: Any = pipeline
    decide = make("decision", model=str(tmp_path / "merged"))
    answers = decide({"state": "the film is good .", "questions": questions})
    shares = answers["tone"]["probabilities"]
    assert {option: row[f"tone.probability.{option}"] for option in shares} == pytest.approx(shares, rel=1e-4)
    assert row["level.score"] == pytest.approx(answers["level"]["score"], rel=1e-4)
    assert row["film.probability.true"] == pytest.approx(answers["film"]["noul"], rel=1e-4)


def test_the_temperature_is_the_one_that_made_the_scores(task: Decision) -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(4000, 8)) * 2
    spans = [(0, 3), (3, 6), (6, 8)]
    labels = np.stack([(true[:, a:b] + rng.gumbel(size=(4000, b - a))).argmax(1) for a, b in spans], axis=1)
    state = task.calibrated({"scores": true * 2.5, "labels": labels}, State())
    assert list(state.more["temperature"].values()) == pytest.approx([2.5] * 3, rel=0.1)
    metrics = task.metrics({"scores": true * 2.5, "labels": labels}, state)
    assert metrics["ece"] < 0.02 < metrics["ece_before"]
    assert metrics["loss"] < metrics["loss_before"]


def test_the_loss_counts_known_answers_alone(task: Decision) -> None:
    scores = np.log(np.array([[0.5, 0.25, 0.25, 0.2, 0.3, 0.5, 0.9, 0.1]]))
    predictions = {"scores": scores, "labels": np.array([[0, IGNORE, 1]])}
    assert task.metrics(predictions, State())["loss"] == pytest.approx(-(np.log(0.5) + np.log(0.1)) / 2)
    assert task.metrics(predictions, State())["accuracy"] == 0.5


def test_an_answer_that_is_no_option_is_told_with_its_row(recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"message": "a film", "tone": "angry", "level": 0, "film": true}\n' * 2)
    data = {"train": str(tmp_path / "rows.jsonl"), "max_length": 64}
    with pytest.raises(FinetuneError, match=r"(?s)'tone' holds 'angry', which is no option; write one of good, bad"):
        train({**recipe, "data": data, "output": str(tmp_path / "run")})


def test_more_options_than_the_head_scores_are_refused(recipe: dict[str, Any], tmp_path: Path) -> None:
    options = [f"option {number}" for number in range(7)]
    decisions = {"level": {**BLOCK["decisions"]["level"], "options": options}}
    made = {**recipe, "task": {**recipe["task"], "decisions": decisions}, "output": str(tmp_path / "run")}
    with pytest.raises(FinetuneError, match="7 options are more than the 6 that"):
        train(made)


def test_the_text_is_cut_and_never_the_question(task: Decision, tiny_jev: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_jev)
    rows = {"message": ["the film is good . " * 30]}
    (row,) = task.features(rows, tokenizer, State(), 24)
    (short,) = task.features({"message": ["the"]}, tokenizer, State(), 24)
    bounds = [0, *row["ends"], len(row["input_ids"])]
    assert max(b - a for a, b in itertools.pairwise(bounds)) <= 24 < row["whole"]
    assert row["input_ids"][bounds[1] - 8 : bounds[1]] == short["input_ids"][short["ends"][0] - 8 : short["ends"][0]]
