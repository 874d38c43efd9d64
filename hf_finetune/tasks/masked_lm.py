"""`masked_lm`: continue the pretraining of an encoder on plain text, which tells words that are masked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from hf_finetune.config.blocks import Name
from hf_finetune.config.section import ASK, TEXT
from hf_finetune.errors import ModelError, Problem
from hf_finetune.tasks import _losses, _proposals, _texts
from hf_finetune.tasks._proposals import Cells, Proposal
from hf_finetune.tasks._token_scores import SUMS, TokenScores
from hf_finetune.tasks.base import (
    IGNORE,
    Batch,
    Column,
    Features,
    Loss,
    OutputKind,
    Predictions,
    Rows,
    State,
    tokenizer_of,
)

if TYPE_CHECKING:
    import torch

# Of the tokens that are to be told, the share that is masked, and the share up to which a random one stands there; the
# rest stays as it is (Devlin et al. 2019, section 3.1).
MASKED, RANDOM = 0.8, 0.9
# Seed and number of the pass of rows that are not trained on: they are masked alike in every run.
HELD_OUT = (0, 0)


class MaskedLM(TokenScores):
    """Tells masked words of a text. The masks of a pass follow from the seed, its number and the text alone."""

    auto_model: ClassVar[str] = "AutoModelForMaskedLM"
    peft_task: ClassVar[str | None] = None
    pipeline: ClassVar[str] = "fill-mask"
    made_for: ClassVar[tuple[str, ...]] = ("ForMaskedLM", "ForPreTraining")
    draws: ClassVar[bool] = True

    text: Annotated[Name, TEXT]
    """Column of plain text."""
    mask_share: Annotated[Annotated[float, Field(gt=0.0, lt=1.0)], ASK] = 0.15
    """Share of a row's tokens that are to be found, at least one word: 80 % of these are masked, a random token stands
    for 10 %, and 10 % stay as they are. The evaluated rows are masked alike at every evaluation, in every run."""
    whole_words: Annotated[bool, ASK] = True
    """Mask all tokens of a word or none; the parts of a word tell too much of one another."""

    @classmethod
    def propose(cls, columns: Mapping[str, Cells]) -> Proposal | None:
        """Take the longest texts."""
        column = _proposals.main_text(columns)
        if column is None:
            return None
        says = f"{column.name} is text, with no column of labels or answers"
        texts = _proposals.joined(columns, [column.name])
        block = {"text": column.name}
        used, model = [column.name], _proposals.encoder(texts)
        return Proposal(block, says, confidence=0.05, used=used, model=model, texts=texts)

    def columns(self) -> dict[str, Column]:
        """Return that of the text."""
        return {self.text: Column("text")}

    def settle(self, processor: Any, config: Callable[[], Any]) -> Any:
        """Refuse a tokenizer that masks nothing, and return any other.

        Raises:
            ModelError: It has no mask token.
        """
        if processor.mask_token_id is None:
            reason = f"the tokenizer has no mask token; {self.kind} needs one, e.g. BERT's"
            raise ModelError(Problem(reason, key="model.name"))
        return processor

    def features(self, rows: Rows, processor: Any, state: State, limit: int) -> list[Features]:
        """Tokenise texts, and mask them as rows that are evaluated; `words` tells the word of each token, from 0.

        Raises:
            RowsError: A cell is no text; all rows of which that is so.
        """
        texts, special = _texts.checked(rows[self.text], self.text), set(processor.all_special_ids)
        found = _texts.tokenize([texts], processor, limit)
        cut = processor(texts, truncation=True, max_length=limit, return_attention_mask=False, verbose=False)
        for index, row in enumerate(found):
            words, ids = cut.word_ids(index), row["input_ids"]
            # Special tokens belong to no word, wherever they stand.
            row["words"] = [
                IGNORE if word is None or token in special else word if self.whole_words else place
                for place, (word, token) in enumerate(zip(words, ids, strict=True))
            ]
            row |= self.drawn(row, *HELD_OUT)
            row["weight"] = sum(label != IGNORE for label in row["labels"])
        return found

    @property
    def is_running_text(self) -> bool:
        """Always."""
        return True

    def split(self, row: Features, processor: Any, limit: int) -> list[Features]:
        """Cut a text into parts between words, each with the special tokens of a text, and mask each."""
        if row["size"] <= limit:
            return [row]
        special: list[int] = processor("")["input_ids"]
        head = next((at for at, token in enumerate(special) if row["input_ids"][at] != token), len(special))
        tail = len(special) - head
        names = [name for name in ("input_ids", "words", "token_type_ids") if name in row]
        whole = {name: row[name][head : len(row[name]) - tail] for name in names}
        found, start, end = list[Features](), 0, 0
        while start < len(whole["words"]):
            end = min(start + limit - len(special), len(whole["words"]))
            # Back to where the word begins that goes on behind, if the part does not begin with it.
            words = whole["words"]
            while start < end < len(words) and words[end] == words[end - 1] >= 0 and words[start] != words[end]:
                end -= 1
            part: Features = {name: [*row[name][:head], *whole[name][start:end], *row[name][-tail:]] for name in names}
            size = len(part["words"])
            made = self.drawn({**row, **part, "size": size, "whole": size}, *HELD_OUT)
            found.append({**made, "weight": sum(label != IGNORE for label in made["labels"])})
            start = end
        return found

    def drawn(self, row: Features, seed: int, epoch: int) -> Features:
        """Return a row with the tokens to be told as `labels`, and a number in [0, 1) for each token, `fates`."""
        import numpy as np

        ids, words = np.asarray(row["input_ids"]), np.asarray(row["words"])
        digest = hashlib.blake2b(f"{seed} {epoch} ".encode() + ids.astype("<i4").tobytes(), digest_size=8).digest()
        random = np.random.default_rng(int.from_bytes(digest, "little"))
        kinds, sizes = np.unique(words[words >= 0], return_counts=True)
        order = random.permutation(len(kinds))
        wanted = max(1, round(self.mask_share * int(sizes.sum())))
        # As many words as it takes.
        count = int(np.searchsorted(sizes[order].cumsum(), wanted)) + 1
        labels = np.where(np.isin(words, kinds[order[:count]]), ids, IGNORE)
        return {**row, "labels": labels.tolist(), "fates": random.random(len(ids), dtype=np.float32).tolist()}

    def collate(self, features: list[Any], processor: Any, state: State) -> Batch:
        """Pad to the longest row of the batch, on the right, and put masks and random tokens in their places."""
        import torch

        batch = _texts.padded(features, processor)
        width = batch["input_ids"].shape[1]
        labels, fates = (
            torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in features])
            for name, fill in (("labels", IGNORE), ("fates", 1.0))
        )
        told, words = labels != IGNORE, len(tokenizer_of(processor) or ())
        ids = batch["input_ids"].masked_fill(told & (fates < MASKED), processor.mask_token_id)
        others = ((fates - MASKED) / (RANDOM - MASKED) * words).long().clamp(0, words - 1)
        return {**batch, "input_ids": others.where(told & (fates >= MASKED) & (fates < RANDOM), ids), "labels": labels}

    def count(self, batch: Batch, state: State) -> torch.Tensor:
        """Return the number of tokens to be told."""
        return (batch["labels"] != IGNORE).sum()

    def loss(self, model: Callable[..., Any], batch: Batch, state: State) -> Loss:
        """Return cross entropy summed over the tokens to be told."""
        logits = model(**self.inputs(batch)).logits
        return Loss(_losses.loss_sum_of(*_losses.at_labels(logits, batch["labels"])))

    def predict(
        self, model: Callable[..., Any], batch: Batch, state: State, totals: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return `nats`, `tokens` and `right` tokens of each row, (B,)."""
        logits, labels = model(**self.inputs(batch)).logits, batch["labels"]
        return self.scored(_losses.each(*_losses.at_labels(logits, labels)), _losses.behind(labels), totals)

    def outputs(self, state: State) -> dict[str, OutputKind]:
        """Return `perplexity`, `token_accuracy` and `masked`, the number of tokens that they are of."""
        return {"perplexity": "number", "token_accuracy": "number", "masked": "number"}

    def decode(self, predictions: Predictions, state: State) -> list[dict[str, Any]]:
        """Return how well masked words of each text are told, which says how much the model knows of such texts."""
        import numpy as np

        nats, tokens, right = (predictions[name].astype(np.float64) for name in SUMS)
        with np.errstate(over="ignore"):
            shares = zip(np.exp(nats / tokens), right / tokens, tokens, strict=True)
        return [dict(zip(self.outputs(state), map(float, row), strict=True)) for row in shares]

    def example(self, state: State, size: int) -> dict[str, Any]:
        """Return words, as many as the tokens that are wanted."""
        return {self.text: " ".join(["the"] * size)}

    def usage(self, state: State, processor: Any) -> str:
        """Tell a masked word."""
        return (
            'inputs = tokenizer(f"A text with a {tokenizer.mask_token} word", return_tensors="pt")\n'
            'place = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)\n'
            "print(tokenizer.decode(model(**inputs).logits[0, place].topk(5).indices))\n"
        )
