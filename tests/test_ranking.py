"""Ranking: measures, losses, rows of one document, findings, BM25, and the saved model in sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import QUICK

from hf_finetune import check, load_run, train
from hf_finetune.errors import RowsError
from hf_finetune.tasks import _retrieval
from hf_finetune.tasks.base import State
from hf_finetune.tasks.ranking import Ranking

FILMS = ("funny", "warm", "boring", "dull", "great", "weak", "cold", "fine")
STATE = State(more={"largest": 1.0})


def task_of(**fields: Any) -> Ranking:
    return Ranking(kind="ranking", query="query", documents="documents", labels="labels", **fields)


def rows_of_films(count: int, documents: int = 4) -> list[dict[str, Any]]:
    """Queries for a film of one kind, each with one film of it."""
    rows = []
    for index in range(count):
        wanted = FILMS[index % len(FILMS)]
        others = [word for word in FILMS if word != wanted][index % 4 :][: documents - 1]
        found = [f"the film is {word} ." for word in others]
        place = index // 3 % documents
        found.insert(place, f"the film is very {wanted} .")
        labels = [float(number == place) for number in range(documents)]
        rows.append(
            {"query": f"what film is {wanted} {WORDS[index // len(FILMS)]} ?", "documents": found, "labels": labels}
        )
    return rows


WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def recipe_of(folder: Path, model: str, films: list[dict[str, Any]], **task: Any) -> dict[str, Any]:
    (folder / "train.jsonl").write_text(lines(films[: len(films) * 3 // 4]))
    (folder / "validation.jsonl").write_text(lines(films[len(films) * 3 // 4 :]))
    return {
        "task": {"kind": "ranking", "query": "query", "documents": "documents", "labels": "labels", **task},
        "model": {"name": model},
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "max_length": 32,
        },
        "adapter": {"kind": "lora", "r": 8, "alpha": 16, "target_modules": "all-linear"},
        "training": {"epochs": 6, "batch_size": 8, "learning_rate": 1e-2, "precision": "fp32", "eval_at_start": True},
        "output": str(folder / "run"),
    }


def test_measures_are_those_of_scikit_learn() -> None:
    from sklearn.metrics import label_ranking_average_precision_score, ndcg_score

    draw = np.random.default_rng(0)
    scores, gains = draw.normal(size=(50, 20)), draw.integers(0, 4, (50, 20)) * draw.integers(0, 2, (50, 20))
    gains[:, 3] = 2
    found = _retrieval.measures(_retrieval.ranks(scores, gains), gains, 20)
    assert found["ndcg_10"].mean() == pytest.approx(ndcg_score(gains, scores, k=10))
    assert found["map"].mean() == pytest.approx(label_ranking_average_precision_score(gains > 0, scores))
    order = np.argsort(-scores, axis=1)
    relevant = np.take_along_axis(gains > 0, order, 1)
    assert found["first"].tolist() == (relevant.argmax(axis=1) + 1).tolist()
    assert found["recall_5"].tolist() == pytest.approx((relevant[:, :5].sum(1) / relevant.sum(1)).tolist())
    assert found["mrr_10"].tolist() == [1 / rank if rank <= 10 else 0 for rank in found["first"]]
    # A model that scores all alike earns nothing, wherever the relevant document stands.
    assert _retrieval.ranks(np.zeros((1, 4)), np.array([[1, 0, 0, 0]])).tolist() == [[4, np.inf, np.inf, np.inf]]


@pytest.mark.parametrize("method", ["pointwise", "pairwise", "listwise"])
def test_a_loss_is_that_of_sentence_transformers_and_lists_of_unequal_length_change_nothing(
    method: Any, tiny_bert: str
) -> None:
    from sentence_transformers import CrossEncoder
    from sentence_transformers.cross_encoder import losses

    peer = CrossEncoder(tiny_bert, num_labels=1)
    peer.eval()
    network, task = peer.model, task_of(method=method)
    rows = [
        row | {"labels": [label * (1 + index) / 4 for index, label in enumerate(row["labels"])]}
        for row in rows_of_films(2)
    ]
    rows += [{"query": "what is dull ?", "documents": ["it is dull .", "a film"], "labels": [1.0, 0.5]}]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    features = task.features(columns, peer.tokenizer, STATE, 40)

    def total(*parts: list[Any]) -> tuple[float, float]:
        batches = [task.collate(part, peer.tokenizer, STATE) for part in parts]
        with torch.no_grad():
            sums = [(task.loss(network, batch, STATE).sum, task.count(batch, STATE)) for batch in batches]
        return float(sum(loss for loss, _ in sums)), float(sum(count for _, count in sums))

    loss, count = total(features)
    assert (loss, count) == pytest.approx(total(features[:2], features[2:]), rel=1e-5)
    assert sum(row["weight"] for row in features) == count
    labels = [torch.tensor(row["labels"]) for row in rows]
    texts = [[row["query"] for row in rows], [row["documents"] for row in rows]]
    with torch.no_grad():
        if method == "pointwise":
            pairs = [(row["query"], text) for row in rows for text in row["documents"]]
            columns_of_pairs = [list(column) for column in zip(*pairs, strict=True)]
            other = losses.BinaryCrossEntropyLoss(peer)(columns_of_pairs, torch.cat(labels))
        elif method == "pairwise":
            other = losses.RankNetLoss(peer, reduction_log="natural")(texts, labels)
        else:
            scores = [
                peer.model(
                    **peer.tokenizer(
                        [row["query"]] * len(row["documents"]), row["documents"], padding=True, return_tensors="pt"
                    )
                ).logits[:, 0]
                for row in rows
            ]
            shares = [-(one / one.sum() * of.log_softmax(0)).sum() for one, of in zip(labels, scores, strict=True)]
            other = torch.stack(shares).mean()
    assert loss / count == pytest.approx(float(other), rel=1e-4)


def test_rows_of_one_document_make_one_query(tmp_path: Path, tiny_bert: str) -> None:
    whole = rows_of_films(16)
    flat = [
        {"query": row["query"], "documents": text, "labels": label}
        for place in range(4)  # a query's documents do not stand together
        for row in whole
        for text, label in [(row["documents"][place], row["labels"][place])]
    ]
    (tmp_path / "flat.csv").write_text(
        "query,documents,labels\n"
        + "".join(f"{row['query']},{row['documents']},{int(row['labels'])}\n" for row in flat)
    )
    made = recipe_of(tmp_path, tiny_bert, whole, rows="document")
    made["data"] = {"train": str(tmp_path / "flat.csv"), "validation_share": 0.25, "max_length": 32}
    run = train(made | {"training": {**made["training"], "epochs": 1}}, list(QUICK))
    counts = json.loads((run.folder / "status.json").read_text())
    assert counts["state"] == "done"
    found = load_run(run.folder)
    assert found.evaluate(split="validation")["data"]["evaluated"] == 4, "queries, none of them in both splits"
    alone = found.predict([{"query": whole[0]["query"], "documents": text} for text in whole[0]["documents"]])
    assert [set(row) for row in alone] == [{"score"}] * 4
    streamed = check(
        made, ["data.streaming=true", "data.validation_share=null", "training.epochs=null", "training.steps=2"]
    )
    assert any("make one row" in str(problem) for problem in streamed.problems)


def test_bad_rows_are_told_and_findings_counted(tmp_path: Path, tiny_bert: str) -> None:
    task = task_of()
    from transformers import AutoTokenizer

    rows: dict[str, Any] = {
        "query": ["what", "what", "what"],
        "documents": [["a", "b"], ["a"], "the film"],
        "labels": [[1, 0], [1, 0], [1]],
    }
    with pytest.raises(RowsError) as error:
        task.features(rows, AutoTokenizer.from_pretrained(tiny_bert), STATE, 20)
    assert {what.partition(";")[0]: numbers for what, numbers in error.value.found.items()} == {
        "column 'labels' is not as long as column 'documents'": [1, 2],
        "column 'documents' holds no list of documents": [2],
    }
    films = rows_of_films(16)
    films[1]["labels"] = [0.0] * 4
    # The same query but for its case, with a positive of the other as a negative.
    right = films[2]["documents"][films[2]["labels"].index(1.0)]
    films[3] = {"query": films[2]["query"].upper(), "documents": ["the film is poor .", right], "labels": [1.0, 0.0]}
    found = "\n".join(map(str, check(recipe_of(tmp_path, tiny_bert, films)).warnings))
    assert "1 of 12 train rows has no relevant document, and so no place in the metrics (row 2)" in found
    assert "nearly the same words" in found
    assert "(row 4)" in found


def test_queries_with_a_single_document_teach_no_order(tmp_path: Path, tiny_bert: str) -> None:
    rows = [{"query": f"what is {word} ?", "documents": [f"the {word}"], "labels": [1]} for word in WORDS[:4]]
    found = "\n".join(map(str, check(recipe_of(tmp_path, tiny_bert, rows)).problems))
    assert "none of the 3 train rows can be used: 3 have no relevant document beside another" in found


def test_a_run_is_compared_with_bm25_and_its_base_and_loads_in_sentence_transformers(
    tmp_path: Path, tiny_bert: str
) -> None:
    from sentence_transformers import CrossEncoder

    made = recipe_of(tmp_path, tiny_bert, rows_of_films(64), method="pairwise")
    run = train(made)
    document = load_run(run.folder).evaluate(split="validation", against=["bm25", "base"])
    bm25, base = document["against"]
    # The relevant film is the only one with the word that is asked for.
    assert bm25["metrics"]["accuracy"] == 1.0
    assert "loss" not in bm25["metrics"]
    assert {"value", "low", "high"} <= base["differences"]["ndcg_10"].keys()
    assert base["mcnemar"]["metric"] == "accuracy"
    report = (run.folder / "report.html").read_text()
    assert "bm25, validation" in report
    assert "First relevant document" in report
    merged = load_run(run.folder).merge(tmp_path / "merged", dtype="fp32")
    assert merged.metrics["merged"]["ndcg_10"] == pytest.approx(run.metrics["validation"]["ndcg_10"])
    row = rows_of_films(1)[0]
    (predicted,) = load_run(run.folder).predict([{name: row[name] for name in ("query", "documents")}])
    scores = CrossEncoder(str(tmp_path / "merged")).predict(
        [(row["query"], text) for text in row["documents"]], activation_fn=torch.nn.Identity()
    )
    assert predicted["scores"] == pytest.approx(scores.tolist(), rel=1e-3)
    assert predicted["order"][0] == int(np.argmax(scores)) + 1
