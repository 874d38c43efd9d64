"""`reward`: give a text a score, learned from pairs of which one answer is preferred, or from numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from hf_finetune.config.blocks import Name
from hf_finetune.config.section import TEXT, Key
from hf_finetune.errors import DataError
from hf_finetune.tasks import _examples as examples
from hf_finetune.tasks import _labels, _losses, _proposals, _shown, _texts, _tokens
from hf_finetune.tasks import _preferences as preferences
from hf_finetune.tasks._catalogue import REMARKS
from hf_finetune.tasks._chat import Renderer
from hf_finetune.tasks._decoder import PROMPTS
from hf_finetune.tasks._proposals import Cells, Proposal
from hf_finetune.tasks._templated import Templated
from hf_finetune.tasks.base import (
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
    literal,
)

if TYPE_CHECKING:
    import torch

    from hf_finetune.tasks._sums import Sums

REWARD = "reward"


class Reward(preferences.Answered, Templated):
    """Scores of texts. Give `chosen` and `rejected`, or `completion` and `score`."""

    auto_model: ClassVar[str] = "AutoModelForSequenceClassification"
    peft_task: ClassVar[str | None] = "SEQ_CLS"
    pipeline: ClassVar[str] = "text-classification"
    group: ClassVar[str | None] = "asked"
    headline: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin", "pearson", "length_correlation")

    prompt: Annotated[Name | None, TEXT] = None
    """Column of prompts: texts or chats; null where the other columns hold whole texts or chats."""
    chosen: Annotated[Name | None, TEXT, Key(replaces=("completion", "score"))] = None
    """Column of the better answers: texts, or lists of turns."""
    rejected: Annotated[Name | None, TEXT, Key(replaces=("completion", "score"))] = None
    """Column of the worse answers."""
    margin: Annotated[Name | None, TEXT] = None
    """Column of numbers: how much better the chosen answer is. The loss wants the rewards to be as far apart."""
    center: Annotated[float, Field(ge=0.0, le=1e4)] = 0.0
    """Weight of the squared sum of both rewards, which keeps them near 0 (arXiv 2312.09244 takes 0.01)."""
    completion: Annotated[Name | None, TEXT, Key(replaces=("chosen", "rejected"))] = None
    """Column of texts, chats or answers that have a score."""
    score: Annotated[Name | None, TEXT, Key(replaces=("chosen", "rejected"))] = None
    """Column of their scores, numbers; the loss is the squared error."""

    @classmethod
    def propose(cls, columns: Mapping[str, Cells]) -> Proposal | None:
        """Take preference pairs with a column of margins; without one, only where somebody asks for this task."""
        pair = [_proposals.first((name,), columns) for name in ("chosen", "rejected")]
        prompt, margin = _proposals.first(PROMPTS, columns), _proposals.first(("margin",), columns)
        if pair[0] is None or pair[1] is None:
            return None
        block = {"chosen": pair[0].name, "rejected": pair[1].name}
        block |= {} if prompt is None else {"prompt": prompt.name}
        block |= {} if margin is None else {"margin": margin.name}
        texts = _proposals.joined(columns, list(block.values()))
        return Proposal(
            block,
            "chosen and rejected are preference pairs"
            + ("" if margin is None else ", and margin how far apart they are"),
            confidence=0.5 if margin is None else 0.97,
            used=list(block.values()),
            model=_proposals.encoder(texts),
            texts=texts,
            best_metric="accuracy",
        )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        single = self.completion is not None or self.score is not None
        if single == (self.chosen is not None or self.rejected is not None):
            raise ValueError("give chosen and rejected, or completion and score")
        if None in ((self.completion, self.score) if single else (self.chosen, self.rejected)):
            names = "completion and score" if single else "chosen and rejected"
            raise ValueError(f"{names} belong together; give both")
        for name in ("margin", "center"):
            if single and getattr(self, name):
                raise ValueError(f"{name} is for pairs; give chosen and rejected, or remove it")
        return self

    @property
    def title(self) -> str:
        """Rewards of pairs and of numbers have other losses."""
        return "rewards of pairs" if self.sequences == 2 else "rewards by numbers"

    @property
    def best_metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        """Only pairs have an answer to be right about."""
        return ("loss", "accuracy", "margin") if self.sequences == 2 else ("loss", "mse", "pearson", "spearman")

    def columns(self) -> dict[str, Column]:
        """Return prompt, answers and numbers; what has a score is enough to predict one."""
        asked = [name for name in (self.prompt, self.answers[0]) if name is not None]
        numbers = [name for name in (self.margin, self.score) if name is not None]
        targets = {name: Column("chat", is_target=True) for name in self.answers[1:]}
        found = {name: Column("chat") for name in asked} | targets
        return found | {name: Column("number", is_target=True) for name in numbers}

    def model_options(self, state: State) -> dict[str, Any]:
        """Return one output, a number."""
        return {**_labels.model_options(State((REWARD,))), "problem_type": "regression"}

    def features(self, rows: Rows, processor: Any, state: State, limit: int) -> list[Features]:
        """Tokenise each answer with its prompt, cut to `limit` tokens; they stand one after the other, see `ends`.

        A chat is rendered by the chat template where there is one. `labels` is the margin of a pair, or the score.

        Raises:
            RowsError: Rows can't be read; all of them, by their number within the batch.
            RecipeError: `limit` leaves no room for text.
        """
        names = tuple(name for name in self.answers if name in rows)
        renderer = None if processor.chat_template is None else self.renderer(processor)
        made = examples.each(rows, lambda row: self._sequences(row, names, renderer))
        flat = _tokenised([text for texts, _ in made for text in texts], processor, limit)
        number = self.margin if self.sequences == 2 else self.score
        labels: Any = [0.0] * len(made)
        if number is not None and number in rows:
            labels = _labels.numbers(rows[number], number)
        is_known = self.answers[-1] in rows and (self.sequences == 2 or number in rows)
        found: list[Features] = []
        for place, ((_, asked), label) in enumerate(zip(made, labels, strict=True)):
            parts = flat[place * len(names) : (place + 1) * len(names)]
            row: Features = {
                name: list(chain.from_iterable(part[name] for part in parts))
                for name in ("input_ids", "token_type_ids")
                if name in parts[0]
            }
            row |= {"ends": [part["size"] for part in parts[:-1]], "asked": asked}
            row |= {"labels": float(label)} if is_known else {}
            row |= {name: sum(part[name] for part in parts) for name in ("size", "whole")}
            struck = _struck(parts) if len(parts) == 2 else set()
            found.append({**row, "weight": int(is_known), "remarks": sum(REMARKS[check] for check in struck)})
        return found

    def _sequences(
        self, row: Mapping[str, Any], names: tuple[str, ...], renderer: Renderer | None
    ) -> tuple[list[str | tuple[str, str]], int]:
        """Return the text of each answer, or prompt and answer as a pair of texts, and a hash of the prompt."""
        reader = preferences.Reader(self.prompt, names, None)
        texts: list[str | tuple[str, str]]
        try:
            if renderer is not None:
                asked, chats = reader.chats(row)
                texts, prompt = [renderer.text(chat) for chat in chats], str(asked.messages)
            else:
                prompt, answers = reader.texts(row)
                # Dialogues as one text stay as they are.
                texts = [(prompt, answer) for answer in answers] if self.prompt else [row[name] for name in names]
        except DataError:
            whole = [row[name] for name in names]
            if self.prompt is not None or not all(isinstance(text, str) and text.strip() for text in whole):
                raise
            texts, prompt = list(whole), whole[0]  # texts without a prompt
        return texts, preferences.digest(prompt)

    def collate(self, features: list[Any], processor: Any, state: State) -> Batch:
        """Pad to `input_ids` and the like, (B, S, T), and `labels` (B, 1) where the rows have them."""
        import torch

        rows = [part for row in features for part in preferences.parts(row, "input_ids", "token_type_ids")]
        batch = {
            name: value.view(len(features), -1, value.shape[-1])
            for name, value in _texts.padded(rows, processor).items()
        }
        if "labels" in features[0]:
            batch["labels"] = torch.tensor([[row["labels"]] for row in features], dtype=torch.float32)
        return batch

    def inputs(self, batch: Batch) -> Batch:
        """Return what the model takes, (B x S, T)."""
        return {name: value.flatten(0, 1) for name, value in batch.items() if name != "labels"}

    def count(self, batch: Batch, state: State) -> torch.Tensor:
        """Return the number of pairs or of scores."""
        return _losses.squared_error_items(batch["labels"])

    def loss(self, model: Callable[..., Any], batch: Batch, state: State) -> Loss:
        """Return the loss of pairs (Bradley and Terry 1952) or the squared error, summed."""
        rewards, labels = self._rewards(model, batch), batch["labels"][:, 0]
        if self.sequences == 1:
            return Loss(_losses.squared_error_sum(rewards, labels[:, None]))
        counted = ~labels.isnan()
        margin = (rewards[:, 0] - rewards[:, 1]).detach()
        logs = {"margin": margin, "accuracy": preferences.right(margin)}
        total = self._losses(rewards, labels.where(counted, 0.0)).where(counted, 0.0).sum()
        return Loss(total, {name: value.where(counted, 0.0).sum() for name, value in logs.items()})

    def _losses(self, rewards: torch.Tensor, margins: torch.Tensor) -> torch.Tensor:
        """(B,), of rewards (B, 2) and margins (B,)."""
        from torch.nn.functional import logsigmoid

        return -logsigmoid(rewards[:, 0] - rewards[:, 1] - margins) + self.center * rewards.sum(1).square()

    def _rewards(self, model: Callable[..., Any], batch: Batch) -> torch.Tensor:
        """Score each answer, (B, S)."""
        scores: torch.Tensor = model(**self.inputs(batch)).logits.float()
        return scores.view(batch["input_ids"].shape[:2])

    def predict(
        self, model: Callable[..., Any], batch: Batch, state: State, totals: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the `reward` of each answer and its `length` in tokens, (B, S), and the `labels`, if known, (B, 1)."""
        found = {"reward": self._rewards(model, batch), "length": batch["attention_mask"].sum(-1)}
        return {**found, "labels": batch["labels"]} if "labels" in batch else found

    def metrics(self, predictions: Predictions, state: State) -> dict[str, float]:
        """Return `loss`, and of pairs `accuracy`, `margin` and `ece`, how far margins are from log-odds.

        Of scores the metrics of a regression. `length_correlation` is that of rewards and lengths (Pearson).
        """
        import numpy as np

        from hf_finetune.tasks import _metrics

        rewards, lengths = predictions["reward"].astype(np.float64), predictions["length"].ravel()
        if not len(rewards):
            return {}
        if self.sequences == 2:
            found = self.sums(predictions, state).whole()
            found["ece"] = _metrics.calibration(np.column_stack([rewards, np.zeros(len(rewards))])).error
        else:
            found = _metrics.regression(rewards[:, 0], predictions["labels"][:, 0])
        if lengths.std() > 0 and rewards.std() > 0:
            found["length_correlation"] = float(np.corrcoef(rewards.ravel(), lengths)[0, 1])
        return found

    def sums(self, predictions: Predictions, state: State) -> Sums:
        """Return the sums of pairs, or those of a regression."""
        import torch

        from hf_finetune.tasks import _sums

        rewards, labels = predictions["reward"], predictions["labels"][:, 0]
        if self.sequences == 1:
            return _sums.of_numbers(rewards[:, 0], labels)
        losses = self._losses(torch.from_numpy(rewards), torch.from_numpy(labels))
        return _sums.of_pairs(rewards, losses.numpy(), predictions["length"])

    def judge(self, predictions: Predictions, state: State) -> Judged | None:
        """Return the pairs whose worse answer has the greater reward, with how much greater it is."""
        return preferences.judged(predictions["reward"]) if self.sequences == 2 else None

    def plots(self, predictions: Predictions, state: State) -> Plot:
        """Return rewards, loss and lengths of each pair, or reward and score."""
        import numpy as np

        rewards = predictions["reward"]
        if self.sequences == 1:
            return Plot("regression", np.column_stack([rewards, predictions["labels"]]).astype(np.float32))
        losses = self.sums(predictions, state).of_rows[0]
        return Plot("pairs", np.column_stack([rewards, losses, predictions["length"]]).astype(np.float32))

    def outputs(self, state: State) -> dict[str, OutputKind]:
        """Return `reward`, of pairs that of the better answer."""
        return {REWARD: "number"}

    def decode(self, predictions: Predictions, state: State) -> list[dict[str, Any]]:
        """Return the reward of each row."""
        import numpy as np

        rewards = predictions["reward"].astype(np.float64)[:, 0]
        _shown.check_finite(rewards)
        return [{REWARD: _shown.short(reward)} for reward in rewards.tolist()]

    def example(self, state: State, size: int) -> dict[str, Any]:
        """Return words, as many in both answers together as tokens are wanted."""
        row: dict[str, Any] = {} if self.prompt is None else {self.prompt: "the"}
        return row | self._spoken(size) | {name: 0.5 for name in (self.margin, self.score) if name is not None}

    def usage(self, state: State, processor: Any) -> str:
        """Score an answer."""
        if processor.chat_template:
            turns = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": "An answer"}]
            given = f'tokenizer.apply_chat_template({literal(turns)}, return_dict=True, return_tensors="pt")'
        else:
            texts = '"A prompt", "An answer"' if self.prompt else '"A text"'
            given = f'tokenizer({texts}, return_tensors="pt")'
        return f"inputs = {given}\nprint(float(model(**inputs).logits))\n"


def _tokenised(texts: list[Any], processor: Any, limit: int) -> list[Features]:
    """Tokenise rendered chats, which write their special tokens themselves, texts, or pairs of texts."""
    if processor.chat_template is not None and all(isinstance(text, str) for text in texts):
        rows = _tokens.prompt_ids(processor, texts, plain=False)
        return [{"input_ids": ids[:limit], "size": len(ids[:limit]), "whole": len(ids)} for ids in rows]
    columns = [
        list(column) for column in zip(*(text if isinstance(text, tuple) else (text,) for text in texts), strict=True)
    ]
    return _texts.tokenize(columns, processor, limit)


def _struck(parts: list[Features]) -> set[str]:
    """Return the checks that a pair strikes."""
    is_longer = {"longer_chosen"} if parts[0]["whole"] > parts[1]["whole"] else set()
    if parts[0]["input_ids"] != parts[1]["input_ids"]:
        return is_longer
    is_cut = any(part["whole"] > part["size"] for part in parts)
    return is_longer | ({"cut_difference"} if is_cut else {"equal_answers"})
