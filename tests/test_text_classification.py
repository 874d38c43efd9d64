"""The text classification task: from raw rows to batches, losses and metrics, for all three problems."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from pydantic import ValidationError
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase

from hf_finetune.errors import DataError
from hf_finetune.tasks.base import State
from hf_finetune.tasks.text_classification import TextClassification

TEXTS = ["the film is good .", "bad plot", "a very very good story , great cast and lovely music !", "dull"]
RAW: dict[str, dict[str, list[Any]]] = {
    "single_label": {"label": ["good", "bad", "good", "bad"]},
    "multi_label": {"label": [["plot"], [], ["plot", "cast"], ["cast"]]},
    "regression": {"label": [1.0, -0.5, 2, 0.25]},
}


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: str) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_bert)


def make(problem: str = "single_label", **fields: Any) -> TextClassification:
    return TextClassification.model_validate({"text": "text", "label": "label", "problem": problem, **fields})


def loss_of(task: TextClassification, logits: torch.Tensor, labels: torch.Tensor, targets: State) -> torch.Tensor:
    return task.loss(lambda **inputs: SimpleNamespace(logits=logits), {"labels": labels}, targets).sum


def predictions(task: TextClassification, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    found = task.predict(lambda **inputs: SimpleNamespace(logits=logits), {"labels": labels}, State())
    return {name: values.detach().numpy() for name, values in found.items()}


def encoded(task: TextClassification, tokenizer: PreTrainedTokenizerBase) -> tuple[list[dict[str, Any]], State]:
    rows = {"text": TEXTS, **RAW[task.problem]}
    targets = task.fit(Dataset.from_dict(rows), None)
    return [dict(row) for row in task.features(rows, tokenizer, targets, 64)], targets


def test_settings_that_do_not_fit_are_refused() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"label": ["a", "b"]}, "set problem: multi_label, or name one column"),
        ({"label": ["a", "b"], "problem": "regression"}, "regression learns one number"),
        ({"label": "text"}, "name column 'text' twice"),
        ({"text": ["a", "a"]}, "name column 'a' twice"),
        ({"text": ["a", "b", "c"]}, "at most 2 items"),
        ({"labels": ["a", "a"]}, "labels holds a name twice"),
        ({"labels": ["a", "b"], "problem": "regression"}, "labels has no meaning for regression"),
        ({"labels": ["a", "b"], "label": ["a", "b"], "problem": "multi_label"}, "labels would be ignored"),
        ({"class_weights": "balanced", "problem": "regression"}, "class_weights has no meaning for regression"),
        ({"class_weights": {"a": 0.0}}, "greater than 0"),
        ({"label_smoothing": 0.1, "problem": "multi_label"}, "label_smoothing has no meaning for multi_label"),
        ({"label_smoothing": 1.0}, "less than 1"),
        ({"threshold": 0.4}, "threshold has no meaning for single_label"),
        ({"smoothing": 0.1}, "Extra inputs are not permitted"),
    ]
    for fields, message in cases:
        with pytest.raises(ValidationError, match=message):
            make(**fields)


def test_metrics_that_select_belong_to_the_problem() -> None:
    assert make("regression").best_metrics == ("loss", "mse", "rmse", "mae", "pearson", "spearman", "r2")
    assert "matthews" in make().best_metrics
    assert "hamming_loss" in make("multi_label").best_metrics
    assert {make(problem).best_metrics[0] for problem in RAW} == {"loss"}


def test_every_metric_that_selects_exists() -> None:
    for problem in RAW:
        task = make(problem)
        targets = State(("x",) if problem == "regression" else ("x", "y"))
        logits = torch.randn(20, len(targets.names), generator=torch.Generator().manual_seed(0))
        labels = {
            "single_label": torch.arange(20) % 2,
            "multi_label": (torch.arange(40).reshape(20, 2) % 3 == 0).float(),
            "regression": torch.linspace(-1, 1, 20),
        }[problem]
        found = task.metrics(predictions(task, logits, labels), targets)
        assert set(task.best_metrics) <= set(found)


def test_columns() -> None:
    task = make("multi_label", text=["a", "b"], label=["x", "y"])
    assert list(task.columns()) == ["a", "b", "x", "y"]
    assert list(make().columns()) == ["text", "label"]


def test_the_model_learns_the_names(tiny_bert: str, tokenizer: PreTrainedTokenizerBase) -> None:
    for problem in RAW:
        task = make(problem)
        _, targets = encoded(task, tokenizer)
        config = AutoConfig.from_pretrained(tiny_bert, **task.model_options(targets))
        names = {"single_label": ["bad", "good"], "multi_label": ["cast", "plot"], "regression": ["label"]}[problem]
        assert config.id2label == dict(enumerate(names))
        assert config.label2id == {name: index for index, name in enumerate(names)}
        assert config.num_labels == len(names)
        assert config.problem_type == problem + ("" if problem == "regression" else "_classification")


def test_class_weights_reach_the_targets() -> None:
    train = Dataset.from_dict({"text": TEXTS, "label": ["a", "a", "a", "b"]})
    assert make(class_weights="balanced").fit(train, None).weights == pytest.approx((4 / 6, 2.0))
    assert make(class_weights={"b": 3.0, "a": 1}).fit(train, None).weights == (1.0, 3.0)
    cells = Dataset.from_dict({"text": TEXTS, "x": [1, 0, 0, 0], "y": [1, 1, 0, 0]})
    assert make("multi_label", label=["x", "y"], class_weights="balanced").fit(cells, None).weights == (3.0, 1.0)
    with pytest.raises(DataError, match="streaming has none"):
        make(class_weights="balanced", labels=["a", "b"]).fit(train.to_iterable_dataset(), None)


def test_pairs_are_encoded_with_their_labels(tokenizer: PreTrainedTokenizerBase) -> None:
    rows: dict[str, list[Any]] = {"a": ["good", "bad"], "b": ["plot", "film"], "label": [0, 1]}
    task = make(text=["a", "b"])
    targets = task.fit(Dataset.from_dict(rows), None)
    words = [tokenizer.convert_ids_to_tokens(row["input_ids"]) for row in task.features(rows, tokenizer, targets, 8)]
    assert words[0] == ["[CLS]", "good", "[SEP]", "plot", "[SEP]"]
    with pytest.raises(DataError, match=r"^row 1: column 'b' is empty"):
        task.features({**rows, "b": ["plot", ""]}, tokenizer, targets, 8)


def test_rows_to_predict_need_no_label(tokenizer: PreTrainedTokenizerBase) -> None:
    rows = make().features({"text": TEXTS}, tokenizer, State(("a", "b")), 8)
    assert all("labels" not in row and row["weight"] == 0 for row in rows)
    assert set(make().collate([dict(row) for row in rows], tokenizer, State())) == {"input_ids", "attention_mask"}


def test_secret_labels_of_a_test_split_say_what_to_remove(tokenizer: PreTrainedTokenizerBase) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    train = Dataset.from_dict({"text": TEXTS, "label": [0, 1, 0, 1]}, features=features)
    targets = make().fit(train, None)
    with pytest.raises(DataError, match=r"^row 0, 1, 2, 3: column 'label' is -1: .*remove data\.test"):
        make().features({"text": TEXTS, "label": [-1] * 4}, tokenizer, targets, 8)


def test_batches_are_padded_on_the_right(tokenizer: PreTrainedTokenizerBase) -> None:
    for problem in RAW:
        task = make(problem)
        rows, _ = encoded(task, tokenizer)
        batch = task.collate([{**row, "row": 3, "text": "x"} for row in rows], tokenizer, State())
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert batch["attention_mask"].tolist() == [[1] * n + [0] * (14 - n) for n in (7, 4, 14, 3)]
        assert batch["input_ids"][3, 3:].eq(tokenizer.pad_token_id).all()
        assert batch["labels"].dtype == (torch.int64 if problem == "single_label" else torch.float32)
        assert batch["labels"].shape == ((4, 2) if problem == "multi_label" else (4,))


def test_rows_of_a_classifier_are_never_packed() -> None:
    assert not make().packable


def test_masked_rows_change_neither_loss_nor_metrics(tokenizer: PreTrainedTokenizerBase) -> None:
    for problem in RAW:
        task = make(problem)
        rows, targets = encoded(task, tokenizer)
        labels = task.collate(rows, tokenizer, targets)["labels"]
        filled = task.collate([*rows, *map(task.masked, rows)], tokenizer, targets)["labels"]
        logits = torch.randn(8, len(targets.names), generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(loss_of(task, logits, filled, targets), loss_of(task, logits[:4], labels, targets))
        assert task.count({"labels": filled}, targets) == task.count({"labels": labels}, targets)
        whole = task.metrics(predictions(task, logits, filled), targets)
        assert whole == task.metrics(predictions(task, logits[:4], labels), targets)
        assert rows[0]["weight"] == 1


def test_the_loss_is_the_models_own(tiny_bert: str, tokenizer: PreTrainedTokenizerBase) -> None:
    for problem in RAW:
        task = make(problem)
        rows, targets = encoded(task, tokenizer)
        model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, **task.model_options(targets)).eval()
        batch = task.collate(rows, tokenizer, targets)
        out = model(**batch)
        loss = loss_of(task, out.logits, batch["labels"], targets) / task.count(batch, targets)
        torch.testing.assert_close(loss, out.loss)
        found = task.metrics(predictions(task, out.logits, batch["labels"]), targets)
        assert found["loss"] == pytest.approx(out.loss.item(), rel=1e-5)


def test_weights_and_smoothing_reach_the_loss_but_not_the_metric() -> None:
    task, targets = make(label_smoothing=0.1), State(("a", "b"), weights=(1.0, 3.0))
    logits, labels = torch.tensor([[1.0, 0.0], [0.5, 0.0]]), torch.tensor([0, 1])
    expected = torch.nn.functional.cross_entropy(logits, labels, torch.tensor([1.0, 3.0]), label_smoothing=0.1)
    torch.testing.assert_close(
        loss_of(task, logits, labels, targets) / task.count({"labels": labels}, targets), expected
    )
    plain = torch.nn.functional.cross_entropy(logits, labels).item()
    assert task.metrics(predictions(task, logits, labels), targets)["loss"] == pytest.approx(plain)


def test_the_threshold_decides_what_is_predicted() -> None:
    targets, logits, labels = State(("a", "b")), torch.zeros(2, 2), torch.eye(2)
    rows = predictions(make("multi_label"), logits, labels)
    assert make("multi_label", threshold=0.5).metrics(rows, targets)["recall.a"] == 1.0
    assert make("multi_label", threshold=0.6).metrics(rows, targets)["recall.a"] == 0.0


def test_plots_are_drawn_from_logits_and_labels() -> None:
    found = predictions(make(), torch.ones(2, 3, dtype=torch.bfloat16), torch.tensor([2, -100]))
    plot = make().plots(found, State())
    assert (plot.kind, plot.rows.dtype) == ("single_label", np.float32)
    assert plot.rows.tolist() == [[1, 1, 1, 2], [1, 1, 1, -100]]


def test_a_linear_layer_learns() -> None:
    for problem in RAW:
        generator = torch.Generator().manual_seed(0)
        inputs, truth = torch.randn(96, 6, generator=generator), torch.randn(6, 3, generator=generator)
        scores = inputs @ truth
        labels, names = {
            "single_label": (scores.argmax(1), ("a", "b", "c")),
            "multi_label": ((scores > 0).float(), ("a", "b", "c")),
            "regression": (scores[:, 0], ("a",)),
        }[problem]
        task, targets = make(problem), State(names, weights=() if problem == "regression" else (1.0, 2.0, 0.5))
        layer = torch.nn.Linear(6, len(names))
        optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
        for _ in range(150):
            loss = loss_of(task, layer(inputs), labels, targets) / task.count({"labels": labels}, targets)
            gradients = torch.autograd.grad(loss, list(layer.parameters()))
            for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
        found = task.metrics(predictions(task, layer(inputs), labels), targets)
        reached = found["r2"] if problem == "regression" else min(found[f"f1.{name}"] for name in names)
        assert reached > 0.95
        assert math.isfinite(found["loss"])


def test_sst2_reads_as_it_is(shared: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    lines = (shared / "data" / "sst2" / "dev.tsv").read_text().splitlines()[1:]
    texts, labels = zip(*(line.split("\t") for line in lines), strict=True)
    rows = {"text": list(texts), "label": [int(label) for label in labels]}
    task = make(labels=["negative", "positive"])
    targets = task.fit(Dataset.from_dict(rows), None)
    assert targets.counts == (428, 444)
    assert len(task.features(rows, tokenizer, targets, 128)) == 872
