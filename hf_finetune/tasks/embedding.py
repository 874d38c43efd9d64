"""Embedding: a bi-encoder gives a vector to each text, and the texts nearest to a query are what it finds."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from hf_finetune.config.blocks import Name
from hf_finetune.config.section import TEXT, refuse_repeated
from hf_finetune.errors import BadRows, ModelError, Problem
from hf_finetune.tasks import _proposals, _retrieval, _shown, _texts
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
    literal,
)

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

    from hf_finetune.tasks._sums import Sums

# Names that columns mostly have, the likeliest first.
ANCHORS = ("anchor", "query", "question")
POSITIVES = ("positive", "positives", "positive_passage", "pos")
NEGATIVES = ("negatives", "negative", "hard_negatives", "negative_passages", "neg")
# Queries whose similarity to all documents is computed at a time.
CHUNK = 1024
# Tokens of a text of an example with negatives, and of any text at least.
EXAMPLE_TOKENS = 64
EXAMPLE_LEAST = 8
# Names of poolings in the configuration of sentence-transformers.
POOLINGS = {"mean": "mean_tokens", "cls": "cls_token", "last": "lasttoken"}


class Embedding(Task):
    """Brings queries near to their documents, and away from the other documents of the global batch."""

    auto_model: ClassVar[str] = "AutoModel"
    peft_task: ClassVar[str | None] = "FEATURE_EXTRACTION"
    pipeline: ClassVar[str] = "sentence-similarity"
    output: ClassVar[str] = "last_hidden_state"
    contrasts: ClassVar[bool] = True
    apart: ClassVar[str | None] = "target"
    headline: ClassVar[tuple[str, ...]] = _retrieval.HEADLINE
    best_metrics: ClassVar[tuple[str, ...]] = ("loss", "ndcg_10", "mrr_10", "map", "accuracy")
    yardsticks: ClassVar[tuple[str, ...]] = ("bm25",)

    anchor: Annotated[Name, TEXT]
    """Column of the text that is asked with: a query, or one of two texts that belong together."""
    positive: Annotated[Name, TEXT]
    """Column of the text that it should find."""
    negatives: Annotated[Name | None, TEXT] = None
    """Column of hard negatives, a text or a list of texts: texts that are alike and yet wrong. All texts of the other
    rows of the global batch are negatives anyway, but those that are equal to a positive of the same anchor."""
    pooling: Literal["mean", "cls", "last"] = "mean"
    """Vector of a text: the mean of its tokens', or that of its first or its last one."""
    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = 0.05
    """Divides cosines in the loss: the lower, the more the nearest negatives count."""
    dimensions: list[Annotated[int, Field(ge=1)]] = Field([], max_length=16)
    """Lengths to which vectors may be cut (Matryoshka, Kusupati et al. 2022): the loss is the mean of those of whole
    vectors and of vectors of each of these lengths."""
    query_prefix: Annotated[str, Field(max_length=1024), TEXT] = ""
    """Put before each anchor, e.g. `"query: "`."""
    document_prefix: Annotated[str, Field(max_length=1024), TEXT] = ""
    """Put before each other text, e.g. `"passage: "`."""

    @classmethod
    def propose(cls, columns: Mapping[str, Cells]) -> Proposal | None:
        """Take an anchor and a positive by their names, and negatives where there are some."""
        anchor, positive, negatives = (_proposals.first(names, columns) for names in (ANCHORS, POSITIVES, NEGATIVES))
        if anchor is None or positive is None or not (anchor.texts and positive.texts):
            return None
        block = {"anchor": anchor.name, "positive": positive.name}
        used = list(block.values())
        texts = _proposals.joined(columns, used)
        if negatives is not None:
            block["negatives"], used = negatives.name, [*used, negatives.name]
        return Proposal(
            block,
            f"{positive.name} is what {anchor.name} should find",
            confidence=0.95,
            used=used,
            model=("sentence-transformers/all-MiniLM-L6-v2", "22M parameters, made for sentences"),
            texts=texts,
            best_metric="ndcg_10",
        )

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        refuse_repeated(anchor=self.anchor, positive=self.positive, negatives=self.negatives)
        return self

    @model_validator(mode="after")
    def _dimensions_are_distinct(self) -> Self:
        if len(set(self.dimensions)) < len(self.dimensions):
            raise ValueError("dimensions holds a length twice; name each once")
        return self

    def columns(self) -> dict[str, Column]:
        """Return anchor, positive and negatives."""
        found = {self.anchor: Column("text"), self.positive: Column("text", is_target=True)}
        return found | ({} if self.negatives is None else {self.negatives: Column("text", True, is_optional=True)})

    def findings(self, rows: Dataset) -> dict[str, list[int]]:
        """Find hard negatives that are positives."""
        if self.negatives is None or not {self.positive, self.negatives} <= set(rows.column_names):
            return {}
        columns: Any = (rows[name][:] for name in (self.anchor, self.positive, self.negatives))
        anchors, positives, negatives = columns
        judged = [([str(one)], list(map(str, _listed(some)))) for one, some in zip(positives, negatives, strict=True)]
        return {"false_negatives": _retrieval.false_negatives(list(map(str, anchors)), judged)}

    @property
    def least_batch(self) -> int:  # type: ignore[override]
        """Without negatives of its own a row needs those of another."""
        return 2 if self.negatives is None else 1

    def check_config(self, name: str, config: Any) -> None:
        """Refuse a model with a decoder behind its encoder, or with vectors too short to be cut as wanted.

        Raises:
            ModelError: It is such a model.
        """
        if getattr(config, "is_encoder_decoder", False):
            reason = f"{name} ({config.model_type}) is an encoder with a decoder; {self.kind} needs one of both alone"
            raise ModelError(Problem(f"{reason}, e.g. a BERT or a Llama", key="model.name"))
        size = getattr(config.get_text_config(), "hidden_size", None)
        if size is not None and self.dimensions and max(self.dimensions) >= size:
            reason = f"{max(self.dimensions)} is no shorter than the {size} numbers of a vector of {name}; remove it"
            raise ModelError(Problem(reason, key="task.dimensions"))

    def features(self, rows: Rows, processor: Any, state: State, limit: int) -> list[Features]:
        """Tokenise the texts of each row, each cut to `limit`: anchor, positive, negatives.

        Raises:
            RowsError: A text is missing or unfit; all rows of which that is so.
            RecipeError: `limit` leaves no room for text.
        """
        bad, columns = BadRows(), [self.anchor]
        columns += [self.positive] if self.positive in rows else []
        for column in columns:
            with bad.collect():
                _texts.checked(rows[column], column)
        texts = [[[cell] for cell in rows[column]] for column in columns]
        if self.negatives is not None and self.negatives in rows and len(columns) > 1:
            texts.append(_texts.lists(list(map(_listed, rows[self.negatives])), self.negatives, "texts", bad))
            for number, some in enumerate(texts[-1]):
                if any(map(is_blank, some)):
                    bad.add(number, f"column {self.negatives!r} holds an empty text; remove it")
        bad.raise_any()
        listed = [list(itertools.chain.from_iterable(some)) for some in zip(*texts, strict=True)]
        prefixed = [
            (self.document_prefix if place else self.query_prefix) + text
            for some in listed
            for place, text in enumerate(some)
        ]
        encoded = iter(_texts.tokenize([prefixed], processor, limit))
        found = []
        for some in listed:
            own = list(itertools.islice(encoded, len(some)))
            row: Features = {
                "input_ids": list(itertools.chain.from_iterable(text["input_ids"] for text in own)),
                "lengths": [text["size"] for text in own],
            }
            row |= {name: sum(text[name] for text in own) for name in ("size", "whole")}
            row["target"] = _digest(own[min(1, len(own) - 1)]["input_ids"])
            if len(columns) > 1:
                row["labels"] = [0] * len(own)  # or `IGNORE`
            found.append({**row, "weight": int(len(columns) > 1)})
        return found

    def collate(self, features: list[Any], processor: Any, state: State) -> Batch:
        """Pad anchors to the longest, `input_ids` (B, T), and other texts, `document_ids` (B, D, T).

        `filled` (B, D) tells where there is one, if some rows have fewer. Equal texts have equal `labels` (B, 1 + D).
        """
        import torch

        counts = [len(row["lengths"]) for row in features]
        slots = max(counts)
        texts: list[dict[str, Any]] = []
        for row in features:
            ends = itertools.pairwise(itertools.accumulate(row["lengths"], initial=0))
            own = [{"input_ids": row["input_ids"][start:end]} for start, end in ends]
            # Empty places are left out of the forward pass, so what they hold does not matter.
            texts += own + [{"input_ids": [processor.pad_token_id]}] * (slots - len(own))
        batch = _texts.padded(texts[::slots], processor)
        if slots > 1:
            others = [text for number, text in enumerate(texts) if number % slots]
            documents = _texts.padded(others, processor)
            batch["document_ids"] = documents["input_ids"].view(len(features), slots - 1, -1)
            batch["document_mask"] = documents["attention_mask"].view(len(features), slots - 1, -1)
            if min(counts) < slots:
                batch["filled"] = torch.arange(1, slots) < torch.tensor(counts)[:, None]
        if "labels" in features[0]:
            marks = [mark for row in features for mark in row["labels"] + [IGNORE] * (slots - len(row["labels"]))]
            ids = [mark or _digest(text["input_ids"]) for mark, text in zip(marks, texts, strict=True)]
            batch["labels"] = torch.tensor(ids).view(-1, slots)
        return batch

    def inputs(self, batch: Batch) -> Batch:
        """Return token ids and mask of the anchors."""
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def count(self, batch: Batch, state: State) -> torch.Tensor:
        """Return the number of rows."""
        return (batch["labels"][:, 0] != IGNORE).sum()

    def embed(self, model: Callable[..., Any], batch: Batch, state: State) -> dict[str, torch.Tensor]:
        """Return the `vectors` of a row's texts, (B, 1 + D, H), and what tells equal texts, `ids` (B, 1 + D)."""
        return {"vectors": self._vectors(model, batch), "ids": batch["labels"]}

    def loss(self, model: Callable[..., Any], batch: Batch, state: State) -> Loss:
        """Return the cross-entropy of each anchor's positive among the documents of the global batch, summed over rows.

        It is InfoNCE (van den Oord et al. 2018) with the cosine over the temperature. The gradient is that of the loss
        of all rows, by the vectors of these; the value is of these rows alone.
        """
        from torch.nn import functional

        own = self.embed(model, batch, state)
        if "own" not in batch:
            return Loss(self._contrast(own["vectors"], own["ids"]).sum())
        vectors, ids, places = batch["pool.vectors"], batch["pool.ids"], batch["own"]
        mine = functional.pad(own["vectors"], (0, 0, 0, vectors.shape[1] - own["vectors"].shape[1]), value=IGNORE)
        each = self._contrast(vectors.index_copy(0, places, mine.to(vectors.dtype)), ids)
        others = each.sum() - each[places].sum()
        return Loss(each[places].sum() + (others - others.detach()))

    def predict(
        self, model: Callable[..., Any], batch: Batch, state: State, totals: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the `vectors` of a row's texts, (B, 1 + D, H) float32, and, if it has more than one, their `ids`."""
        found = {"vectors": self._vectors(model, batch)}
        return {**found, "ids": batch["labels"]} if "labels" in batch else found

    def metrics(self, predictions: Predictions, state: State) -> dict[str, float]:
        """Return `loss` and the measures of `_retrieval`: each row looks for its positives among all texts of a split.

        The loss is the cross-entropy among these. Of `dimensions` there is nDCG besides.
        """
        return self.sums(predictions, state).whole() if len(self._measured(predictions)["first"]) else {}

    def sums(self, predictions: Predictions, state: State) -> Sums:
        """Return sums over rows: all metrics are means over these."""
        from hf_finetune.tasks._sums import of_means

        return of_means({name: values for name, values in self._measured(predictions).items() if name != "first"})

    def judge(self, predictions: Predictions, state: State) -> Judged:
        """Return the rank at which each row finds its positive."""
        import numpy as np

        first = self._measured(predictions)["first"]
        places = np.flatnonzero(predictions["ids"][:, 0] >= 0 if "ids" in predictions else np.ones(len(first), bool))
        found = [f"rank {rank:,.0f}" for rank in first]
        return Judged(places, ["rank 1"] * len(first), found, np.log(first), first > 1, "accuracy")

    def plots(self, predictions: Predictions, state: State) -> Plot:
        """Return the measures of each row."""
        return Plot("ranking", _retrieval.rows_of_plot(self._measured(predictions)))

    def yardstick(self, name: str, rows: Dataset) -> Predictions:
        """Rank all texts of the split by BM25; of each row the ranks of its positives."""
        import numpy as np

        columns: Any = [rows[name][:] for name in (self.anchor, self.positive)]
        anchors, positives = ([str(text) for text in column] for column in columns)
        more: Any = rows[self.negatives][:] if self.negatives in rows.column_names else []
        texts = dict.fromkeys(itertools.chain(positives, *(map(str, _listed(some)) for some in more)))
        number_of = {text: number for number, text in enumerate(texts)}
        relevant = _together(anchors, [number_of[text] for text in positives])
        model = _retrieval.BM25(list(number_of), len(anchors))
        scored = {anchor: model.scores(anchor) for anchor in dict.fromkeys(anchors)}
        found = [_ranks(scored[anchor][None], row[None])[0] for anchor, row in zip(anchors, relevant, strict=True)]
        return {"ranks": np.array(found), "corpus": np.full(len(anchors), len(number_of))}

    def outputs(self, state: State) -> dict[str, OutputKind]:
        """Return `embedding`, the vector of the anchor, of length 1."""
        return {"embedding": "numbers"}

    def decode(self, predictions: Predictions, state: State) -> list[dict[str, Any]]:
        """Return vectors."""
        import numpy as np

        vectors = predictions["vectors"][:, 0].astype(np.float64)
        _shown.check_finite(vectors)
        return [{"embedding": [_shown.short(value) for value in vector]} for vector in vectors.tolist()]

    def example(self, state: State, size: int) -> dict[str, Any]:
        """Return two texts, of as many tokens as are wanted together, and negatives where the recipe has some."""
        count = self._texts_of(size)
        share = size // count
        asked = " ".join(["a film", str(size % 97), *["the"] * (share - 5)])
        # What the others leave, so that no two sizes make the same row.
        found = " ".join(["the"] * max(1, size - share * (count - 1) - 2))
        row: dict[str, Any] = {self.anchor: asked, self.positive: found}
        negative = " ".join(["it is", *["the"] * (share - 4)])
        return row if self.negatives is None else {**row, self.negatives: [negative] * (count - 2)}

    def probe(self, sizes: Sequence[int], processor: Any, state: State, *, packed: bool = False) -> Batch:
        """Cut each text of an example to its share of the size: a model reads no row, but single texts."""
        rows: list[Any] = []
        for size in sizes:
            columns = {name: [value] for name, value in self.example(state, size).items()}
            rows += self.features(columns, processor, state, max(EXAMPLE_LEAST, math.ceil(size / self._texts_of(size))))
        return self.collate(rows, processor, state)

    def _texts_of(self, size: int) -> int:
        """Return how many texts an example of so many tokens has; none may be longer than those of the data are cut to.

        A row of two texts has none longer than half of twice the limit. How many negatives rows have is not known.
        """
        return 2 if self.negatives is None else max(3, math.ceil(size / EXAMPLE_TOKENS))

    def laid_out(self, row: Features) -> Features:
        """Return the texts one after the other."""
        return {**row, "labels": [0] * len(row["input_ids"])}

    def usage(self, state: State, processor: Any) -> str:
        """Embed a query and two texts, and print their cosines."""
        pooled = {
            "mean": "(hidden * mask).sum(1) / mask.sum(1)",
            "cls": "hidden[:, 0]",
            "last": "hidden[range(len(hidden)), inputs.attention_mask.sum(1) - 1]",
        }[self.pooling]
        query, document = (
            (literal(prefix) + " + " if prefix else "") for prefix in (self.query_prefix, self.document_prefix)
        )
        return (
            f'texts = [{query}"a query", {document}"A document.", {document}"Another one."]\n'
            'inputs = tokenizer(texts, padding=True, truncation=True, padding_side="right", return_tensors="pt")\n'
            "hidden, mask = model(**inputs).last_hidden_state, inputs.attention_mask[..., None]\n"
            f"vectors = {pooled}\n"
            "vectors = vectors / vectors.norm(dim=-1, keepdim=True)\n"
            "print((vectors[0] @ vectors[1:].T).tolist())\n"
            "# Or: from sentence_transformers import SentenceTransformer; SentenceTransformer(folder)\n"
        )

    def write_beside(self, folder: Path, config: Any, limit: int, state: State, processor: Any) -> None:
        """Write the modules of sentence-transformers, which loads the folder by them."""
        names = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
        modules = [
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{name}"}
            for number, (path, name) in enumerate(names.items())
        ]
        modes = {f"pooling_mode_{mode}": mode == POOLINGS[self.pooling] for mode in POOLINGS.values()}
        prompts = {"query": self.query_prefix, "document": self.document_prefix}
        for file, content in {
            "modules.json": modules,
            "1_Pooling/config.json": {"word_embedding_dimension": config.get_text_config().hidden_size, **modes},
            "2_Normalize/config.json": {},
            "sentence_bert_config.json": {"max_seq_length": limit, "do_lower_case": False},
            "config_sentence_transformers.json": {"prompts": prompts, "similarity_fn_name": "cosine"},
        }.items():
            (folder / file).parent.mkdir(exist_ok=True)
            (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _vectors(self, model: Callable[..., Any], batch: Batch) -> torch.Tensor:
        """Return vectors of length 1, (B, 1 + D, H) float32; `IGNORE` in empty places."""
        import torch

        anchors = self._pooled(model, batch["input_ids"], batch["attention_mask"])[:, None]
        if "document_ids" not in batch:
            return anchors
        ids, mask, filled = batch["document_ids"], batch["document_mask"], batch.get("filled")
        if filled is None:
            documents = self._pooled(model, ids.flatten(0, 1), mask.flatten(0, 1)).view(*ids.shape[:2], -1)
        else:
            found = self._pooled(model, ids[filled], mask[filled])
            empty = found.new_full((*ids.shape[:2], found.shape[-1]), float(IGNORE))
            documents = empty.masked_scatter(filled[..., None], found)
        return torch.cat([anchors, documents], dim=1)

    def _pooled(self, model: Callable[..., Any], ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        import torch
        from torch.nn import functional

        hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        if self.pooling == "cls":
            found = hidden[:, 0]
        elif self.pooling == "last":
            found = hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        else:
            found = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return functional.normalize(found, dim=-1)

    def _contrast(self, vectors: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return the loss of each row of a global batch, (G,), from (G, 1 + D, H); masked rows are nothing."""
        import torch
        from torch.nn import functional

        documents, known = ids[:, 1:].flatten(), ids[:, 0] != IGNORE
        rows, slots = len(ids), ids.shape[1] - 1
        own = torch.arange(rows, device=ids.device) * slots
        # A text that is a positive of the same anchor, in whatever row, is none of its negatives.
        firsts = torch.arange(rows * slots, device=ids.device) % slots == 0
        anchors = ids[:, :1].expand(-1, slots).flatten()
        same = (documents == ids[:, 1:2]) | ((anchors == ids[:, :1]) & firsts)
        left_out = (same | (documents == IGNORE)).scatter(1, own[:, None], False)
        total = vectors.new_zeros(rows)
        # In float32: cosines are divided by a small number.
        with torch.autocast(vectors.device.type, enabled=False):
            for size in (vectors.shape[-1], *self.dimensions):
                cut = functional.normalize(vectors[..., :size].float(), dim=-1)
                cosines = cut[:, 0] @ cut[:, 1:].flatten(0, 1).T
                # Not -inf: its gradient is NaN in a masked row.
                logs = (cosines / self.temperature).masked_fill(left_out, -1e9).log_softmax(-1)
                total = total - logs.gather(1, own[:, None])[:, 0]
        return (total / (1 + len(self.dimensions))).where(known, 0.0)

    def _measured(self, predictions: Predictions) -> dict[str, Any]:
        """Return the measures of each row, and its loss, (N,) each."""
        import numpy as np

        if "ranks" in predictions:
            gains = np.isfinite(predictions["ranks"]).astype(np.float64)
            return _retrieval.measures(predictions["ranks"], gains, int(predictions["corpus"].max(initial=0)))
        known = predictions["ids"][:, 0] >= 0
        ids, vectors = predictions["ids"][known], predictions["vectors"][known]
        flat, firsts = np.unique(ids[:, 1:], return_index=True)
        corpus = vectors[:, 1:].reshape(-1, vectors.shape[-1])[firsts][flat >= 0]
        relevant = _together(ids[:, 0].tolist(), np.searchsorted(flat[flat >= 0], ids[:, 1]).tolist())
        found, losses, cut = list[Any](), list[Any](), dict[str, list[Any]]()
        for start in range(0, len(ids), CHUNK):
            anchors, part = vectors[start : start + CHUNK, 0], relevant[start : start + CHUNK]
            cosines = anchors @ corpus.T
            found.append(_ranks(cosines, part))
            losses.append(_nats(cosines.astype(np.float64) / self.temperature, part))
            for size in self.dimensions:
                one, other = anchors[:, :size], corpus[:, :size]
                lengths = np.linalg.norm(other, axis=1)
                cut.setdefault(f"ndcg_10_dim_{size}", []).append(_ranks(one @ (other / lengths[:, None]).T, part))
        gains = (relevant >= 0).astype(np.float64)
        joined = np.concatenate(found) if found else np.empty(relevant.shape)
        made = _retrieval.measures(joined, gains, len(corpus))
        for name, parts in cut.items():
            made[name] = _retrieval.measures(np.concatenate(parts), gains, len(corpus))["ndcg_10"]
        return made | {"loss": np.concatenate(losses) if losses else np.empty(0)}


def _listed(cell: Any) -> list[Any]:
    """Return the texts of a cell: a list, JSON text of one, a single text, or none."""
    found = _proposals.as_list(cell) if not isinstance(cell, str) or cell.lstrip().startswith("[") else None
    return ([] if is_blank(cell) else [cell]) if found is None else found


def _digest(ids: Sequence[int]) -> int:
    """Return 63 bits of a hash of token ids: two of 10 million texts share one with a probability of 5e-6."""
    return int.from_bytes(hashlib.blake2b(repr(ids).encode(), digest_size=8).digest(), "little") >> 1


def _together(anchors: Sequence[Any], positives: Sequence[int]) -> Any:
    """Return the numbers of all positives of each row's anchor, (N, R), -1 where there are fewer."""
    import numpy as np

    of: dict[Any, dict[int, None]] = {}
    for anchor, positive in zip(anchors, positives, strict=True):
        of.setdefault(anchor, {})[positive] = None
    found = np.full((len(anchors), max(map(len, of.values()), default=1)), -1)
    for row, anchor in enumerate(anchors):
        found[row, : len(of[anchor])] = list(of[anchor])
    return found


def _ranks(scores: Any, relevant: Any) -> Any:
    """Return the ranks of the relevant documents, (N, R) from (N, M), from 1; of equal scores theirs is the last."""
    import numpy as np

    own = np.take_along_axis(scores, np.maximum(relevant, 0), axis=1)
    found = np.stack([(scores >= own[:, place, None]).sum(axis=1) for place in range(own.shape[1])], axis=1)
    return np.where(relevant >= 0, found, np.inf)


def _nats(scores: Any, relevant: Any) -> Any:
    """Return each row's mean cross-entropy of its relevant documents, each among itself and the irrelevant ones."""
    import numpy as np

    own = np.take_along_axis(scores, np.maximum(relevant, 0), axis=1)
    others = scores.copy()
    for place in range(relevant.shape[1]):
        some = np.flatnonzero(relevant[:, place] >= 0)
        others[some, relevant[some, place]] = -np.inf
    rest = np.logaddexp.reduce(others, axis=1)
    counted = relevant >= 0
    each = np.where(counted, np.logaddexp(own, rest[:, None]) - own, 0.0)
    return each.sum(axis=1) / counted.sum(axis=1)
