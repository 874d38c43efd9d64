"""Embedding: the loss of the global batch, retrieval metrics, and the saved model in sentence-transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hf_finetune import check, load_run, train
from hf_finetune.tasks.base import State
from hf_finetune.tasks.embedding import Embedding
from hf_finetune.training.pool import pooled

WORDS = ("film", "movie", "story", "plot", "acting", "cast", "scene", "music", "good", "great", "fine", "lovely")
ROWS: list[dict[str, Any]] = [
    {"anchor": f"what {word} is {other} ?", "positive": f"the {word} is very {other} .", "negatives": [f"a {word} ."]}
    for word in WORDS[:8]
    for other in WORDS[8:]
]


def task_of(**fields: Any) -> Embedding:
    return Embedding(kind="embedding", anchor="anchor", positive="positive", **fields)


def encoded(task: Embedding, rows: list[dict[str, Any]], tokenizer: Any) -> list[Any]:
    columns = {name: [row[name] for row in rows] for name in task.columns()}
    return task.features(columns, tokenizer, State(), 40)


@pytest.fixture(scope="module")
def peer(tiny_bert: str) -> Any:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    body = Transformer(tiny_bert)
    made = SentenceTransformer(modules=[body, Pooling(32), Normalize()], device="cpu")
    return made.eval()


@pytest.mark.parametrize("dimensions", [[], [8, 16]])
def test_the_loss_is_that_of_sentence_transformers(dimensions: list[int], peer: Any) -> None:
    from sentence_transformers.sentence_transformer import losses

    task = task_of(negatives="negatives", dimensions=dimensions)
    network, tokenizer, rows = peer[0].auto_model, peer.tokenizer, ROWS[:: len(WORDS) // 2]
    batch = task.collate(encoded(task, rows, tokenizer), tokenizer, State())
    columns = [
        [row["anchor"] for row in rows],
        [row["positive"] for row in rows],
        [row["negatives"][0] for row in rows],
    ]
    other: Any = losses.MultipleNegativesRankingLoss(peer, scale=1 / task.temperature)
    if dimensions:
        sizes = [32, *dimensions]
        other = losses.MatryoshkaLoss(peer, other, sizes, matryoshka_weights=[1 / len(sizes)] * len(sizes))
    with torch.no_grad():
        found = task.loss(network, batch, State()).sum / task.count(batch, State())
        expected = other([peer.preprocess(column) for column in columns], None)
    assert float(found) == pytest.approx(float(expected), rel=1e-4)


def test_micro_batches_make_the_gradient_of_the_whole_batch_dropout_included(tiny_bert: str) -> None:
    from transformers import AutoModel, AutoTokenizer

    task, tokenizer = task_of(negatives="negatives"), AutoTokenizer.from_pretrained(tiny_bert)
    rows = encoded(
        task,
        [{**row, "negatives": row["negatives"] * (1 + number % 2)} for number, row in enumerate(ROWS[:7])],
        tokenizer,
    )
    network = AutoModel.from_pretrained(tiny_bert)

    def gradients(batches: list[Any], pools: list[Any]) -> tuple[float, torch.Tensor]:
        network.zero_grad()
        total = 0.0
        for batch, pool in zip(batches, pools, strict=True):
            loss = task.loss(network, batch | pool, State()).sum
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total, torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    cut = [task.collate(part, tokenizer, State()) for part in (rows[:3], rows[3:4], [*rows[4:], task.masked(rows[0])])]
    whole = [task.collate(rows, tokenizer, State())]
    network.eval()
    expected, slope = gradients(whole, [{}])
    found, parts = gradients(cut, pooled(task, network, cut, State()))
    assert found == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(parts, slope, rtol=1e-4, atol=1e-5 * float(slope.abs().max()))
    # With dropout the embeddings that were gathered are those of the passes with gradients, bit by bit.
    network.train()
    torch.manual_seed(1)
    pools = pooled(task, network, cut, State())
    torch.manual_seed(1)
    again = [task.embed(network, batch, State())["vectors"] for batch in cut]
    held = [pool["pool.vectors"][pool["own"]][:, : own.shape[1]] for pool, own in zip(pools, again, strict=True)]
    assert all(torch.equal(one, two) for one, two in zip(held, again, strict=True))


@pytest.mark.parametrize("fields", [{}, {"negatives": "negatives"}])
def test_the_texts_of_a_long_example_are_no_longer_than_a_model_reads(fields: dict[str, Any], peer: Any) -> None:
    batch = task_of(**fields).probe([128], peer.tokenizer, State())  # two texts of the most that the model reads
    lengths = [*batch["attention_mask"].sum(-1).flatten(), *batch["document_mask"].sum(-1).flatten()]
    assert max(lengths) <= peer.tokenizer.model_max_length
    assert 120 <= sum(lengths) <= 128


def test_what_can_not_teach_an_embedding_is_refused(tmp_path: Path, tiny_bert: str, tiny_t5: str) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe: dict[str, Any] = {
        "task": {"kind": "embedding", "anchor": "anchor", "positive": "positive"},
        "model": {"name": tiny_t5},
        "data": {"train": str(tmp_path / "rows.jsonl"), "max_length": 64},
        "training": {"batch_size": 2, "precision": "fp32"},
    }
    assert "is an encoder with a decoder" in str(check(recipe).problems[0])
    alone = recipe | {"model": {"name": tiny_bert}, "training": {"batch_size": 1, "precision": "fp32"}}
    assert "compares a row with others of its global batch; write 2 or more" in str(check(alone).problems[0])
    assert check(alone | {"task": {**recipe["task"], "negatives": "negatives"}}).ok


def test_a_text_that_is_right_for_another_row_is_no_negative(peer: Any) -> None:
    task, network = task_of(), peer[0].auto_model
    alike = [ROWS[0], {**ROWS[1], "positive": ROWS[0]["positive"]}, {**ROWS[2], "anchor": ROWS[0]["anchor"]}]
    batch = task.collate(encoded(task, alike, peer.tokenizer), peer.tokenizer, State())
    vectors, ids = (task.embed(network, batch, State())[name] for name in ("vectors", "ids"))
    losses = task._contrast(vectors, ids)
    alone = task._contrast(vectors[:1], ids[:1])
    # The first row has two equal positives, and one more of its own anchor: nothing is left to be away from.
    assert losses[0].item() == pytest.approx(alone[0].item(), abs=1e-6) == pytest.approx(0.0, abs=1e-6)
    assert losses[1].item() > 0.01


def test_metrics_are_those_of_sentence_transformers(peer: Any) -> None:
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    task, network = task_of(), peer[0].auto_model
    rows = [{**row, "positive": ROWS[number // 2]["positive"]} for number, row in enumerate(ROWS)]
    rows += [{**ROWS[3], "positive": "a film was fine ."}]
    batch = task.collate(encoded(task, rows, peer.tokenizer), peer.tokenizer, State())
    with torch.no_grad():
        predicted = {name: value.numpy() for name, value in task.predict(network, batch, State()).items()}
    found = task.metrics(predicted, State())
    queries = {str(number): row["anchor"] for number, row in enumerate(rows)}
    corpus = {text: text for text in dict.fromkeys(row["positive"] for row in rows)}
    relevant = {
        number: {row["positive"] for row in rows if row["anchor"] == anchor} for number, anchor in queries.items()
    }
    other = InformationRetrievalEvaluator(queries, corpus, relevant, map_at_k=[len(corpus)])(peer)
    assert found["mrr_10"] == pytest.approx(other["cosine_mrr@10"], abs=1e-6)
    assert found["ndcg_10"] == pytest.approx(other["cosine_ndcg@10"], abs=1e-6)
    assert found["map"] == pytest.approx(other[f"cosine_map@{len(corpus)}"], abs=1e-6)
    assert found["recall_10"] == pytest.approx(other["cosine_recall@10"], abs=1e-6)
    assert found["accuracy"] == pytest.approx(other["cosine_accuracy@1"], abs=1e-6)


def test_a_run_loads_in_sentence_transformers_as_adapter_and_merged(tmp_path: Path, tiny_bert: str) -> None:
    from sentence_transformers import SentenceTransformer

    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    made = {
        "task": {"kind": "embedding", "anchor": "anchor", "positive": "positive", "negatives": "negatives"}
        | {"dimensions": [16], "query_prefix": "user : "},
        "model": {"name": tiny_bert},
        "data": {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "train.jsonl")}
        | {"max_length": 32, "checks": {"leakage": "off"}},
        "adapter": {"kind": "lora", "r": 8, "alpha": 16, "target_modules": "all-linear"},
        "training": {"epochs": 20, "batch_size": 8, "micro_batch": 3, "learning_rate": 2e-3, "precision": "fp32"}
        | {"eval_at_start": True, "eval_every": 40, "best_metric": "ndcg_10"},
        "output": str(tmp_path / "run"),
    }
    run = train(made)
    scores = run.metrics["validation"]
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    before = next(line for line in lines if line["phase"] == "eval")
    assert scores["ndcg_10"] > before["ndcg_10"] + 0.1, "it learns"
    assert 0 < scores["ndcg_10_dim_16"] <= 1
    assert "First relevant document" in (run.folder / "report.html").read_text()
    opened = load_run(run.folder)
    document = opened.evaluate(split="validation", against=["bm25", "base"])
    assert document["against"][0]["metrics"]["ndcg_10"] > 0.5
    assert document["against"][1]["differences"]["ndcg_10"]["low"] > 0
    opened.merge(tmp_path / "merged", dtype="fp32")
    texts = [row["anchor"] for row in ROWS[:3]]
    predicted = np.array([row["embedding"] for row in opened.predict([{"anchor": text} for text in texts])])
    for folder in (run.adapter, tmp_path / "merged"):
        peer = SentenceTransformer(str(folder), device="cpu")
        assert np.allclose(peer.encode_query(texts), predicted, atol=1e-4), folder
        assert peer.max_seq_length == 32
    (tmp_path / "train.jsonl").write_text(
        "".join(json.dumps({**row, "negatives": [row["positive"]]}) + "\n" for row in ROWS)
    )
    problems = "\n".join(map(str, check({**made, "output": str(tmp_path / "other")}).warnings))
    assert "a negative that is a positive of the same query" in problems
    too_long = check(made, ["task.dimensions=[64]", f"output={tmp_path / 'third'}"]).problems
    assert any("task.dimensions" in str(problem) for problem in too_long)
