"""Token classification: one tag a word, as for names in a text; evaluated word by word and entity by entity."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from hf_finetune.config.blocks import Name, Share
from hf_finetune.config.section import TEXT, Key, refuse_repeated
from hf_finetune.errors import BadRows
from hf_finetune.tasks import _labels, _losses, _proposals, _shown, _texts
from hf_finetune.tasks._proposals import Cells, Proposal
from hf_finetune.tasks.base import (
    IGNORE,
    Batch,
    Column,
    Features,
    Judged,
    Loss,
    OutputKind,
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

# Tag of a word that belongs to no entity.
OUTSIDE = "O"
# Names that columns mostly have, the likeliest first.
WORDS, TAGS = ("words", "tokens"), ("tags", "ner_tags", "labels", "pos_tags")


class TokenClassification(Task):
    """Assigns a tag to each word of a row."""

    auto_model: ClassVar[str] = "AutoModelForTokenClassification"
    # RoBERTa's tokenizers and their like read single words only so; others ignore it.
    processor_options: ClassVar[Mapping[str, Any]] = {"add_prefix_space": True}
    peft_task: ClassVar[str | None] = "TOKEN_CLS"
    pipeline: ClassVar[str] = "token-classification"
    support_is: ClassVar[str] = "entities"
    headline: ClassVar[tuple[str, ...]] = ("loss", "f1", "precision", "recall", "accuracy")
    best_metrics: ClassVar[tuple[str, ...]] = headline

    words: Annotated[Name, TEXT]
    """Column of the words of a row: a list, or the same as JSON text."""
    tags: Annotated[Name, TEXT, Key(finished="name")]
    """Column of their tags: a list as long as that of the words, e.g. of `B-city`, `I-city` and `O`."""
    labels: Annotated[Annotated[list[Name], Field(min_length=2)] | None, TEXT, Key(finished="never")] = None
    """Names of the tags in the order of their ids; null reads them off the training data, in sorted order."""
    train_on: Literal["first", "all"] = "first"
    """Token of a word that is trained: its first one, or all of them. Its first one always tells the word's tag."""
    label_smoothing: Share = 0.0
    """Share of each target that is spread over all tags."""

    @classmethod
    def propose(cls, columns: Mapping[str, Cells]) -> Proposal | None:
        """Take words and tags by their names, where both are lists of the same length."""
        words, tags = _proposals.first(WORDS, columns), _proposals.first(TAGS, columns)
        if words is None or tags is None or not (words.lists and tags.lists):
            return None
        if any(len(one) != len(two) for one, two in zip(words.lists, tags.lists, strict=True)):
            return None
        texts = [" ".join(map(str, row)) for row in words.lists]
        return Proposal(
            {"words": words.name, "tags": tags.name},
            f"{tags.name} holds one tag for each word of {words.name}",
            confidence=0.9,
            used=[words.name, tags.name],
            model=_proposals.encoder(texts, cased=True),
            texts=texts,
            best_metric="f1",
        )

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        refuse_repeated(words=self.words, tags=self.tags)
        return self

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        if self.labels is not None and len(set(self.labels)) < len(self.labels):
            raise ValueError("labels holds a name twice; name each tag once")
        return self

    def columns(self) -> dict[str, Column]:
        """Return words and tags."""
        return {self.words: Column("words"), self.tags: Column("label", is_target=True)}

    def declares_labels(self) -> bool:
        """With `labels`."""
        return self.labels is not None

    def blank(self, rows: Rows) -> list[bool]:
        """Tell which rows have no word."""
        return [all(map(is_blank, value)) if isinstance(value, list) else is_blank(value) for value in rows[self.words]]

    def fit(self, rows: Dataset | IterableDataset, processor: Any) -> State:
        """Read the tags off the training rows.

        Raises:
            DataError: A tag is missing or unfit, there is only one, or streaming leaves the names unknown.
        """
        return _labels.read_lists(rows, self.tags, self.labels, repeated=True)

    def model_options(self, state: State) -> dict[str, Any]:
        """Return `num_labels`, `id2label` and `label2id`."""
        return _labels.model_options(state)

    def features(self, rows: Rows, processor: Any, state: State, limit: int) -> list[Features]:
        """Tokenise words; `starts` tells which word begins at a token, from 1, else 0.

        Raises:
            RowsError: Words or tags are missing or unfit, or not equally many; all rows of which that is so.
        """
        bad = BadRows()
        words = _texts.lists(rows[self.words], self.words, "words", bad)
        for index, some in enumerate(words):
            if any(map(is_blank, some)):
                bad.add(index, f"column {self.words!r} holds an empty word; remove it, and its tag")
        tags: list[list[int]] | None = None
        if self.tags in rows:
            with bad.collect():
                tags = _labels.id_lists(rows[self.tags], self.tags, state)
            for index, (some, others) in enumerate(zip(words, rows[self.tags], strict=True)):
                if isinstance(others, list) and some and len(some) != len(others):
                    bad.add(
                        index, f"column {self.tags!r} is not as long as column {self.words!r}; give each word a tag"
                    )
        bad.raise_any()
        options = {"is_split_into_words": True, "return_attention_mask": False, "verbose": False}
        # Twice, as a tokenizer that cuts does not tell how long a row was.
        whole = [len(ids) for ids in processor(words, **options)["input_ids"]]
        encoding = processor(words, truncation=True, max_length=limit, **options)
        continued = [_inside(name, state) for name in state.names]
        found = []
        for index, ids in enumerate(encoding["input_ids"]):
            word_ids = encoding.word_ids(index)
            # Special tokens belong to no word; later tokens of a word to the same one as the token before.
            starts = [
                0 if w is None or w == before else w + 1 for before, w in zip([None, *word_ids], word_ids, strict=False)
            ]
            row: Features = {"input_ids": ids, "starts": starts, "words": len(words[index])}
            if "token_type_ids" in encoding:
                row["token_type_ids"] = encoding["token_type_ids"][index]
            if tags is not None:
                row["labels"] = [tags[index][start - 1] if start else IGNORE for start in starts]
                if self.train_on == "all":
                    row["labels"] = [
                        label if start or w is None else continued[tags[index][w]]
                        for label, start, w in zip(row["labels"], starts, word_ids, strict=True)
                    ]
            labels = row.get("labels", ())
            found.append({**row, "size": len(ids), "whole": whole[index], "weight": sum(x != IGNORE for x in labels)})
        return found

    def collate(self, features: list[Any], processor: Any, state: State) -> Batch:
        """Pad to the longest row of the batch, on the right."""
        import torch

        batch = _texts.padded(features, processor)
        width = batch["input_ids"].shape[1]
        for name, fill in (("starts", 0), ("labels", IGNORE)):
            if name in features[0]:
                batch[name] = torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in features])
        return {**batch, "words": torch.tensor([row["words"] for row in features])}

    def inputs(self, batch: Batch) -> Batch:
        """Return token ids and their mask."""
        return {name: value for name, value in batch.items() if name not in ("labels", "starts", "words")}

    def count(self, batch: Batch, state: State) -> torch.Tensor:
        """Return the number of tokens with a label."""
        return (batch["labels"] != IGNORE).sum()

    def loss(self, model: Callable[..., Any], batch: Batch, state: State) -> Loss:
        """Return the cross-entropy of the tokens with a label, summed."""
        logits = model(**self.inputs(batch)).logits
        return Loss(
            _losses.cross_entropy_sum(logits.flatten(0, 1), batch["labels"].flatten(), (), self.label_smoothing)
        )

    def predict(
        self, model: Callable[..., Any], batch: Batch, state: State, totals: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Of each token that begins a word: the `word`, from 0, its `tag` with its `confidence`, and its true one.

        All (B, T), `IGNORE` at other tokens; `truth` and the `nats` of it only with labels. `words` (B,) are all words
        of the row, those that were cut off included.
        """
        log_shares = model(**self.inputs(batch)).logits.float().log_softmax(-1)
        begins = batch["starts"] > 0
        confidence, tag = log_shares.max(-1)
        found = {"word": batch["starts"] - 1, "tag": tag, "confidence": confidence.exp()}
        if "labels" in batch:
            labels = batch["labels"]
            nats = -log_shares.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
            found |= {"truth": labels, "nats": nats}
            # A word without a true tag is not scored.
            begins = begins & (labels != IGNORE)
        return {**{name: value.where(begins, IGNORE) for name, value in found.items()}, "words": batch["words"]}

    def metrics(self, predictions: Predictions, state: State) -> dict[str, float]:
        """Return `loss` and `accuracy` of words; `precision`, `recall` and `f1` of entities, together and of each type.

        An entity is right where its words and its type are; see `spans`.
        """
        counted = predictions["truth"] != IGNORE
        if not counted.any():
            return {}
        found = self.sums(predictions, state).whole()
        truth, given = (_all_spans(predictions, name, state) for name in ("truth", "tag"))
        for kind in sorted({span[-1] for span in truth | given}):
            hits, those_given, those_true = (
                sum(span[-1] == kind for span in some) for some in (truth & given, given, truth)
            )
            if those_given:
                found[f"precision.{kind}"] = hits / those_given
            if those_true:
                found[f"recall.{kind}"] = hits / those_true
            found[f"f1.{kind}"] = 2 * hits / (those_given + those_true)
            found[f"support.{kind}"] = float(those_true)
        return found

    def sums(self, predictions: Predictions, state: State) -> Sums:
        """Return the sums of which the metrics of words and of all entities together are made."""
        import numpy as np

        from hf_finetune.tasks._sums import Sums

        counted = predictions["truth"] != IGNORE
        rows = np.zeros((6, len(counted)))
        rows[0] = np.where(counted, predictions["nats"], 0).sum(axis=1, dtype=np.float64)
        rows[1] = (counted & (predictions["tag"] == predictions["truth"])).sum(axis=1)
        rows[2] = counted.sum(axis=1)
        truth, given = (_all_spans(predictions, name, state) for name in ("truth", "tag"))
        for place, spans in zip((3, 4, 5), (truth & given, given, truth), strict=True):
            np.add.at(rows[place], [span[0] for span in spans], 1)

        def metrics(added: Any) -> dict[str, Any]:
            nats, right, words, hits, given, truth = added
            with np.errstate(divide="ignore", invalid="ignore"):
                return {
                    "loss": nats / words,
                    "accuracy": right / words,
                    "precision": hits / given,
                    "recall": hits / truth,
                    "f1": 2 * hits / (given + truth),
                }

        return Sums(rows, metrics)

    def judge(self, predictions: Predictions, state: State) -> Judged:
        """Return predicted beside true tags of each row, with the confidence of the surest wrong tag."""
        import numpy as np

        counted = predictions["truth"] != IGNORE
        places = np.flatnonzero(counted.any(axis=1))
        wrong = counted & (predictions["tag"] != predictions["truth"])
        sure = np.where(wrong, predictions["confidence"], 0.0).max(axis=1, initial=0.0)
        truth, given = (
            [" ".join(state.names[tag] for tag in predictions[name][row][counted[row]]) for row in places]
            for name in ("truth", "tag")
        )
        return Judged(places, truth, given, sure[places], wrong.any(axis=1)[places])

    def outputs(self, state: State) -> dict[str, OutputKind]:
        """Return `tags` of all words, and `score`, the lowest confidence among them."""
        return {"tags": "texts", "score": "number"}

    def decode(self, predictions: Predictions, state: State) -> list[dict[str, Any]]:
        """Return a tag for each word; words that were cut off are outside of entities."""
        rows = zip(*(predictions[name] for name in ("word", "tag", "confidence", "words")), strict=True)
        found = []
        for words, tags, confidence, count in rows:
            read = words != IGNORE
            row = [OUTSIDE] * int(count)
            for word, tag in zip(words[read].tolist(), tags[read].tolist(), strict=True):
                row[word] = state.names[tag]
            # A row that is cut down to nothing is surely outside.
            found.append({"tags": row, "score": _shown.short(confidence[read].min(initial=1.0))})
        return found

    def example(self, state: State, size: int) -> dict[str, Any]:
        """Return words, as many as the tokens that are wanted."""
        return {self.words: ["the"] * size, self.tags: [next(iter(state.id_of), OUTSIDE)] * size}

    def describe(self, row: Mapping[str, Any]) -> str:
        """Return the words as a line."""
        words = row[self.words]
        return " ".join(words) if isinstance(words, list) else str(words)

    def usage(self, state: State, processor: Any) -> str:
        """Tag the words of a sentence."""
        return (
            'words = "A few words".split()\n'
            'inputs = tokenizer(words, is_split_into_words=True, return_tensors="pt")\n'
            "tags = model(**inputs).logits[0].argmax(-1).tolist()\n"
            "first = {word: place for place, word in reversed(list(enumerate(inputs.word_ids())))}\n"
            "print([model.config.id2label[tags[first[word]]] for word in range(len(words))])\n"
        )


def spans(tags: Iterable[str]) -> Iterable[tuple[int, int, str]]:
    """Return the entities of a row: first word, last word, type.

    Tags are read as conlleval does, and seqeval by default: `B-city` begins an entity, and `I-city` does where no
    entity of its type goes on. Tags without such a prefix are types themselves, and words in a row with one
    type are one entity.
    """
    start, open_kind, last = 0, "", -1
    # One word more ends the entity that a row ends with.
    for index, tag in enumerate(itertools.chain(tags, [OUTSIDE])):
        prefix, _, kind = tag.partition("-") if tag[:2] in ("B-", "I-") else ("", "", "" if tag == OUTSIDE else tag)
        if open_kind and (kind != open_kind or prefix == "B"):
            yield start, last, open_kind
            open_kind = ""
        if kind and not open_kind:
            start, open_kind = index, kind
        last = index


def _all_spans(predictions: Predictions, name: str, state: State) -> set[tuple[int, int, int, str]]:
    """Return the entities of all rows, each with its row; words without a true tag are not there."""
    counted = predictions["truth"] != IGNORE
    return {
        (row, *span)
        for row, mask in enumerate(counted)
        for span in spans(state.names[tag] for tag in predictions[name][row][mask])
    }


def _inside(name: str, state: State) -> int:
    """Return the id of the tag of a word's later tokens: `I-city` for `B-city`, where there is one."""
    inside = f"I-{name[2:]}" if name.startswith("B-") else name
    return state.names.index(inside if inside in state.names else name)
