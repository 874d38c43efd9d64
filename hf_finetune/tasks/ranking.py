"""Ranking: a cross-encoder reads a query with a document and gives a score; documents are put in the order of these."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import model_validator

from hf_finetune.config.blocks import Name
from hf_finetune.config.section import TEXT, Key, refuse_repeated
from hf_finetune.errors import BadRows
from hf_finetune.tasks import _labels, _proposals, _retrieval, _shown, _texts
from hf_finetune.tasks._proposals import Cells, Proposal
from hf_finetune.tasks.base import (
    IGNORE,
    Batch,
    Column,
    Features,
    Judged,
    Loss,
    OutputKind,
    Plot,
    Predictions,
    Rows,
    State,
    Task,
    is_blank,
)

if TYPE_CHECKING:
    import torch
    from datasets import Dataset, IterableDataset

    from hf_finetune.tasks._sums import Sums

# Names that columns mostly have, the likeliest first.
QUERIES = ("query", "question", "user", "search", "anchor")
DOCUMENTS = ("documents", "document", "passages", "passage", "candidates", "items", "item", "docs", "doc", "context")
LABELS = ("labels", "label", "relevance", "relevances", "score", "scores", "rating", "ratings")
# Tokens of a pair of an example.
EXAMPLE_TOKENS = 64


class Ranking(Task):
    """Puts the documents of a query in order."""

    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task: ClassVar[str | None] = "SEQ_CLS"
    pipeline: ClassVar[str] = "text-ranking"
    rows_are: ClassVar[str] = "queries"
    headline: ClassVar[tuple[str, ...]] = _retrieval.HEADLINE
    best_metrics: ClassVar[tuple[str, ...]] = ("loss", "ndcg_10", "mrr_10", "map", "accuracy")
    teaches_nothing: ClassVar[str] = (
        "have no relevant document beside another; give each query one with a greater label than others"
    )
    yardsticks: ClassVar[tuple[str, ...]] = ("bm25",)

    query: Annotated[Name, TEXT]
    """Column of the query: a question, or what is known of a user."""
    documents: Annotated[Name, TEXT]
    """Column of its documents: a list of texts, or one text where `rows` is `document`."""
    labels: Annotated[Name, TEXT, Key(finished="name")]
    """Column of their labels: numbers from 0, which is not relevant; as many as there are documents."""
    rows: Literal["query", "document"] = "query"
    """What a row holds: a query with all of its documents, or one document, and then all rows of a query are one."""
    method: Literal["pointwise", "pairwise", "listwise"] = "listwise"
    """Loss: each score's binary cross-entropy against its label's share of the largest label; RankNet's of each pair of
    documents with unequal labels; or the cross-entropy between a query's labels, as shares of their sum, and the
    softmax of its scores."""

    @classmethod
    def propose(cls, columns: Mapping[str, Cells]) -> Proposal | None:
        """Take a query, documents and labels by their names, as lists of equal length or one a row."""
        named = [_proposals.first(names, columns) for names in (QUERIES, DOCUMENTS, LABELS)]
        if any(column is None for column in named):
            return None
        query, documents, labels = (column for column in named if column is not None)
        pairs = list(zip(documents.lists, labels.lists, strict=False))
        if pairs and all(len(one) == len(two) and all(map(_is_label, two)) for one, two in pairs):
            rows, says = "query", f"{labels.name} holds a number for each of {documents.name}"
        elif documents.is_text and not documents.lists and all(map(_is_label, labels.values)):
            # A query that stands in several rows, or it is no ranking.
            if len(query.counts) > len(query.texts) / 2 or len(query.counts) < 2:
                return None
            rows, says = "document", f"{query.name} repeats, with a {documents.name} and a {labels.name} each time"
        else:
            return None
        block: dict[str, Any] = {"query": query.name, "documents": documents.name, "labels": labels.name}
        used = list(block.values())
        texts = [f"{row} {' '.join(map(str, some))}" for row, some in zip(query.texts, documents.lists, strict=False)]
        return Proposal(
            block if rows == "query" else {**block, "rows": rows},
            says,
            confidence=0.95,
            used=used,
            model=("cross-encoder/ms-marco-MiniLM-L6-v2", "22M parameters, trained to rank passages"),
            texts=texts if rows == "query" else _proposals.joined(columns, used[:2]),
            best_metric="ndcg_10",
        )

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        refuse_repeated(query=self.query, documents=self.documents, labels=self.labels)
        return self

    def columns(self) -> dict[str, Column]:
        """Return query, documents and labels."""
        is_list = self.rows == "query"
        return {
            self.query: Column("text"),
            self.documents: Column("words" if is_list else "text"),
            self.labels: Column("number", is_target=True),
        }

    @property
    def one_row_by(self) -> str | None:  # type: ignore[override]
        """The query, where a row of the data holds one document."""
        return self.query if self.rows == "document" else None

    def findings(self, rows: Dataset) -> dict[str, list[int]]:
        """Find queries without a relevant document, and documents that are relevant and not."""
        if self.labels not in rows.column_names:
            return {}
        lonely, queries, judged = list[int](), list[str](), list[tuple[list[str], list[str]]]()
        for number, row in enumerate(rows):
            texts, labels = _listed(row[self.documents]), _listed(row[self.labels])
            # What is unfit is told elsewhere.
            pairs = [(str(text), label) for text, label in zip(texts, labels, strict=False) if _is_label(label)]
            positives, negatives = (
                [text for text, label in pairs if (label > 0) == wanted] for wanted in (True, False)
            )
            queries.append(str(row[self.query]))
            judged.append((positives, negatives))
            lonely += [number] if not positives else []
        return {"no_positive": lonely, "false_negatives": _retrieval.false_negatives(queries, judged)}

    def remedy(self, check: str) -> str | None:
        """A query that teaches nothing has no relevant document, or no other: the former is told as `no_positive`."""
        return None if check == "no_trained_token" else ""

    def blank(self, rows: Rows) -> list[bool]:
        """Tell which rows have no query, or no document."""
        pairs = zip(rows[self.query], rows[self.documents], strict=True)
        return [is_blank(query) or all(map(is_blank, _listed(texts))) for query, texts in pairs]

    def fit(self, rows: Dataset | IterableDataset, processor: Any) -> State:
        """Find the largest label, of which the others are shares.

        Raises:
            RowsError: Labels are missing or unfit; all rows of which that is so.
        """
        most, bad = 0.0, BadRows()
        if self.method == "pointwise" and hasattr(rows, "__len__"):
            for number, row in enumerate(rows):
                labels = self._labels(row[self.labels], None, number, bad)
                most = max([most, *labels])
        bad.raise_any()
        return State(more={"largest": most or 1.0})

    def model_options(self, state: State) -> dict[str, Any]:
        """Return options of a head with one output."""
        return {**_labels.model_options(State((self.labels,))), "problem_type": "regression"}

    def features(self, rows: Rows, processor: Any, state: State, limit: int) -> list[Features]:
        """Tokenise each document with its query; `limit` bounds the tokens of such a pair.

        Raises:
            RowsError: A query, a document or a label is missing or unfit; all rows of which that is so.
            RecipeError: `limit` leaves no room for text.
        """
        bad = BadRows()
        with bad.collect():
            _texts.checked(rows[self.query], self.query)
        listed = [
            [cell] if isinstance(cell, str) and self.rows == "document" else cell for cell in rows[self.documents]
        ]
        documents = _texts.lists(listed, self.documents, "documents", bad)
        labels: list[list[float]] = []
        for number, some in enumerate(documents):
            if any(map(is_blank, some)):
                bad.add(number, f"column {self.documents!r} holds an empty document; remove it, and its label")
            if self.labels in rows:
                labels.append(self._labels(rows[self.labels][number], len(some), number, bad))
        bad.raise_any()
        repeated = [query for query, some in zip(rows[self.query], documents, strict=True) for _ in some]
        flat = list(itertools.chain.from_iterable(documents))
        pairs = iter(_texts.tokenize([repeated, flat], processor, limit) if flat else [])
        found = []
        for number, some in enumerate(documents):
            own = list(itertools.islice(pairs, len(some)))
            row: Features = {
                "input_ids": list(itertools.chain.from_iterable(pair["input_ids"] for pair in own)),
                "lengths": [pair["size"] for pair in own],
            }
            if own and "token_type_ids" in own[0]:
                row["token_type_ids"] = list(itertools.chain.from_iterable(pair["token_type_ids"] for pair in own))
            size, whole = (sum(pair[name] for pair in own) for name in ("size", "whole"))
            row |= {"size": size, "whole": whole, "weight": 0}
            if labels:
                row |= {"labels": labels[number], "weight": self._items(labels[number])}
            found.append(row)
        return found

    def collate(self, features: list[Any], processor: Any, state: State) -> Batch:
        """Pad pairs to the longest, (B, D, T), and rows to the most documents, `filled` (B, D) if some have fewer."""
        import torch

        counts = [len(row["lengths"]) for row in features]
        slots, empty = max(counts), {"input_ids": [processor.pad_token_id]}
        pairs: list[dict[str, Any]] = []
        for row in features:
            ends = list(itertools.accumulate(row["lengths"], initial=0))
            names = [name for name in ("input_ids", "token_type_ids") if name in row]
            pairs += [{name: row[name][start:end] for name in names} for start, end in itertools.pairwise(ends)]
            # Empty places are left out of the forward pass, so what they hold does not matter.
            pairs += [{name: empty.get(name, [0]) for name in names}] * (slots - len(row["lengths"]))
        batch = {name: value.view(-1, slots, value.shape[1]) for name, value in _texts.padded(pairs, processor).items()}
        if min(counts) < slots:
            batch["filled"] = torch.arange(slots) < torch.tensor(counts)[:, None]
        if "labels" in features[0]:
            batch["labels"] = torch.tensor(
                [row["labels"] + [float(IGNORE)] * (slots - len(row["labels"])) for row in features]
            )
        return batch

    def inputs(self, batch: Batch) -> Batch:
        """Return the pairs, (P, T) each."""
        filled = batch.get("filled")
        return {
            name: value.flatten(0, 1) if filled is None else value[filled]
            for name, value in batch.items()
            if name not in ("labels", "filled")
        }

    def count(self, batch: Batch, state: State) -> torch.Tensor:
        """Return the number of documents, of pairs with unequal labels, or queries with a relevant one of several."""
        labels = batch["labels"]
        known = labels != IGNORE
        if self.method == "pointwise":
            return known.sum()
        if self.method == "pairwise":
            return _better(labels).sum()
        return _taught(labels).sum()

    def loss(self, model: Callable[..., Any], batch: Batch, state: State) -> Loss:
        """Return the loss of the method, summed over its items; its pairs are those of Burges et al. 2005 (RankNet)."""
        from torch.nn import functional

        scores, labels = self._scores(model, batch), batch["labels"]
        known = labels != IGNORE
        if self.method == "pointwise":
            shares = (labels / state.more["largest"]).clamp(0, 1)
            each = functional.binary_cross_entropy_with_logits(scores, shares, reduction="none")
            return Loss(each.where(known, 0.0).sum())
        if self.method == "pairwise":
            gaps = scores[:, :, None] - scores[:, None, :]
            return Loss(functional.softplus(-gaps).where(_better(labels), 0.0).sum())
        return Loss(_listwise(scores, labels).sum())

    def predict(
        self, model: Callable[..., Any], batch: Batch, state: State, totals: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the `scores` of each row's documents, (B, D) float32, `IGNORE` in empty places, and their `labels`."""
        scores = self._scores(model, batch)
        if "filled" in batch:
            scores = scores.where(batch["filled"], float(IGNORE))
        # The trainer pads what it gathers: how many there are is the only sure sign.
        filled = batch.get("filled")
        counts = scores.new_full((len(scores),), scores.shape[1]) if filled is None else filled.sum(1)
        found = {"scores": scores, "documents": counts.long()}
        return {**found, "labels": batch["labels"]} if "labels" in batch else found

    def metrics(self, predictions: Predictions, state: State) -> dict[str, float]:
        """Return `loss` and the measures of `_retrieval`, over the queries that have a relevant document."""
        return self.sums(predictions, state).whole() if len(self._measured(predictions, state)["first"]) else {}

    def sums(self, predictions: Predictions, state: State) -> Sums:
        """Return sums over queries with a relevant document: all metrics are means over these."""
        from hf_finetune.tasks._sums import of_means

        made = self._measured(predictions, state)
        return of_means({name: values for name, values in made.items() if name != "first"})

    def judge(self, predictions: Predictions, state: State) -> Judged | None:
        """Return numbers of relevant documents beside that of the first; sure is a score far above the best of them."""
        import numpy as np

        scores, labels = _told(predictions)
        places = np.flatnonzero((labels > 0).any(axis=1))
        scores, relevant = scores[places], labels[places] > 0
        truth = [f"document {', '.join(str(number + 1) for number in np.flatnonzero(row))}" for row in relevant]
        above = scores.max(axis=1) - np.where(relevant, scores, -np.inf).max(axis=1)
        # As the metric has it, which lets of equal scores the irrelevant one be the first.
        wrong = self._measured(predictions, state)["accuracy"] < 1
        found = [f"document {number + 1}" for number in scores.argmax(axis=1)]
        return Judged(places, truth, found, above, wrong, "accuracy")

    def plots(self, predictions: Predictions, state: State) -> Plot:
        """Return the measures of each query."""
        return Plot("ranking", _retrieval.rows_of_plot(self._measured(predictions, state)))

    def yardstick(self, name: str, rows: Dataset) -> Predictions:
        """Score by BM25, whose word counts are those of all documents of the split."""
        import numpy as np

        queries = [str(query) for query in rows[self.query]]
        listed = [[str(text) for text in _listed(cell)] for cell in rows[self.documents]]
        number_of = {text: number for number, text in enumerate(dict.fromkeys(itertools.chain.from_iterable(listed)))}
        model = _retrieval.BM25(list(number_of), len(queries))
        width = max(map(len, listed))
        found = {name: np.full((len(queries), width), float(IGNORE)) for name in ("scores", "labels")}
        for row, (query, texts, cell) in enumerate(zip(queries, listed, rows[self.labels], strict=True)):
            found["scores"][row, : len(texts)] = model.scores(query)[[number_of[text] for text in texts]]
            found["labels"][row, : len(texts)] = [float(label) for label in _listed(cell)][: len(texts)]
        return {**found, "documents": np.array(list(map(len, listed))), "yardstick": np.ones(len(queries), dtype=bool)}

    def outputs(self, state: State) -> dict[str, OutputKind]:
        """Return `score`; of rows that hold a list `scores`, and `order`, the numbers of the documents, best first."""
        return {"score": "number"} if self.rows == "document" else {"scores": "numbers", "order": "numbers"}

    def decode(self, predictions: Predictions, state: State) -> list[dict[str, Any]]:
        """Return scores, and the order of the documents, from 1."""
        import numpy as np

        found = []
        for scores, count in zip(predictions["scores"], predictions["documents"].tolist(), strict=True):
            own = scores[:count].astype(np.float64)
            _shown.check_finite(own)
            short = [_shown.short(score) for score in own.tolist()]
            order = [int(place) + 1 for place in np.argsort(-own, kind="stable")]
            found.append({"score": short[0]} if self.rows == "document" else {"scores": short, "order": order})
        return found

    def example(self, state: State, size: int) -> dict[str, Any]:
        """Return a query with two documents or more, as many tokens as are wanted together."""
        count = max(2, size // EXAMPLE_TOKENS)
        words, labels = ["the"] * max(1, size // count - 4), [1.0] + [0.0] * (count - 1)
        # Unlike texts: a document that is relevant and not would be a finding.
        texts = [" ".join([*words, "is"] if number else words) for number in range(count)]
        row: dict[str, Any] = {self.query: "a film" + " very" * (size % 7), self.documents: texts, self.labels: labels}
        if self.rows == "document":
            row |= {self.documents: texts[0], self.labels: 1.0}
        return row

    def laid_out(self, row: Features) -> Features:
        """Return the pairs one after the other; tokens of the relevant ones count."""
        pairs = zip(row["lengths"], row["labels"], strict=True)
        marks = [[0 if label > 0 else IGNORE] * length for length, label in pairs]
        return {**row, "labels": list(itertools.chain.from_iterable(marks))}

    def describe(self, row: Mapping[str, Any]) -> str:
        """Return the query, and the documents with their numbers."""
        texts = _listed(row[self.documents])
        return "\n".join([str(row[self.query]), *(f"{number}. {text}" for number, text in enumerate(texts, 1))])

    def usage(self, state: State, processor: Any) -> str:
        """Score two documents for a query."""
        return (
            'query, documents = "a query", ["A document.", "Another one."]\n'
            'pairs = {"text": [query] * len(documents), "text_pair": documents}\n'
            'inputs = tokenizer(**pairs, padding=True, truncation=True, return_tensors="pt")\n'
            "scores = model(**inputs).logits[:, 0].tolist()\n"
            "print(sorted(zip(scores, documents), reverse=True))\n"
        )

    def _labels(self, cell: Any, count: int | None, row: int, bad: BadRows) -> list[float]:
        """Return the labels of a row; what is unfit is added to `bad`. `count` tells how many there must be."""
        labels = [cell] if self.rows == "document" and not isinstance(cell, list) else _proposals.as_list(cell)
        if labels is None or not all(map(_is_label, labels)):
            bad.add(row, f"column {self.labels!r} holds no list of numbers from 0; give each document such a label")
            return []
        if count is not None and count != len(labels):
            what = f"column {self.labels!r} is not as long as column {self.documents!r}; give each document a label"
            bad.add(row, what)
            return []
        return [float(label) for label in labels]

    def _items(self, labels: list[float]) -> int:
        """Count the items of a row, as `count` does."""
        if self.method == "pointwise":
            return len(labels)
        if self.method == "pairwise":
            return sum(one > two for one in labels for two in labels)
        return int(len(labels) > 1 and any(label > 0 for label in labels))

    def _scores(self, model: Callable[..., Any], batch: Batch) -> torch.Tensor:
        """Score all documents of a batch, (B, D) float32; what stands in empty places says nothing."""
        logits: torch.Tensor = model(**self.inputs(batch)).logits[:, 0].float()
        shape, filled = batch["input_ids"].shape[:2], batch.get("filled")
        return logits.view(shape) if filled is None else logits.new_zeros(shape).masked_scatter(filled, logits)

    def _measured(self, predictions: Predictions, state: State) -> dict[str, Any]:
        """Return the measures of each query that has a relevant document, and its loss, (N,) each."""
        import numpy as np
        import torch

        scores, labels = _told(predictions)
        kept = (labels > 0).any(axis=1)
        scores, labels = scores[kept], labels[kept]
        gains = np.where(labels > 0, labels, 0.0)
        made = _retrieval.measures(_retrieval.ranks(scores, gains), gains, scores.shape[1])
        if "yardstick" not in predictions:
            # Whatever is trained: so recipes can be compared.
            made["loss"] = _listwise(*map(torch.from_numpy, (np.where(labels == IGNORE, 0.0, scores), labels))).numpy()
        return made


def _listed(cell: Any) -> list[Any]:
    """Return the texts or labels of a cell, which may be a single one, or JSON text."""
    found = _proposals.as_list(cell) if not isinstance(cell, str) or cell.lstrip().startswith("[") else None
    return [cell] if found is None else found


def _is_label(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _better(labels: torch.Tensor) -> torch.Tensor:
    """Tell for each pair of documents (B, D, D) that the first has a greater label, and both have one."""
    known = labels != IGNORE
    return (labels[:, :, None] > labels[:, None, :]) & known[:, :, None] & known[:, None, :]


def _taught(labels: torch.Tensor) -> torch.Tensor:
    """Tell which queries have a relevant document and another, (B,): the softmax of a single score is 1, always."""
    return (labels.clamp(min=0).sum(-1) > 0) & ((labels != IGNORE).sum(-1) > 1)


def _listwise(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the cross-entropy between labels and scores of each query, (B,) from (B, D); 0 without a relevant one."""
    known = labels != IGNORE
    # Not -inf, whose gradient is NaN where a row is masked as a whole.
    logs = scores.masked_fill(~known, -1e9).log_softmax(-1)
    gains = labels.clamp(min=0)
    return -(gains * logs).sum(-1) / gains.sum(-1).clamp(min=1e-9)


def _told(predictions: Predictions) -> tuple[Any, Any]:
    """Return scores and labels (N, D) float64; in empty places -inf and `IGNORE`."""
    import numpy as np

    scores, labels = (predictions[name].astype(np.float64) for name in ("scores", "labels"))
    return np.where(np.arange(scores.shape[1]) < predictions["documents"][:, None], scores, -np.inf), labels
