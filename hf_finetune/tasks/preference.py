"""`preference`: teach a language model which of two answers is the better one, or which answers are good."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from hf_finetune.config.blocks import changed
from hf_finetune.config.section import TEXT, Key
from hf_finetune.errors import DataError
from hf_finetune.tasks import _examples as examples
from hf_finetune.tasks import _losses, _proposals, _tokens
from hf_finetune.tasks import _preferences as preferences
from hf_finetune.tasks._catalogue import REMARKS
from hf_finetune.tasks._decoder import PROMPTS, SMALL, Decoder
from hf_finetune.tasks._proposals import Cells, Proposal
from hf_finetune.tasks._templated import Text
from hf_finetune.tasks.base import (
    IGNORE,
    Batch,
    Column,
    Features,
    Judged,
    Loss,
    Plot,
    Predictions,
    Rows,
    State,
)

if TYPE_CHECKING:
    import torch

    from hf_finetune.tasks._sums import Sums

Weight = Annotated[float, Field(ge=0.0, le=1e6)]
# The strength of the reference where the recipe gives none, as in the papers or TRL.
BETAS = {"dpo": 0.1, "ipo": 0.1, "orpo": 0.1, "simpo": 2.0, "kto": 0.1, "apo": 0.1}
# Fields that one method alone has.
OWN = {
    "label_smoothing": "dpo",
    "gamma": "simpo",
    "apo": "apo",
    "completion": "kto",
    "label": "kto",
    "desirable_weight": "kto",
    "undesirable_weight": "kto",
}
TRUTHS = {True: True, False: False, "true": True, "false": False, "1": True, "0": False}  # 1 is True in Python
PARTS = ("input_ids", "labels")
"""Features of single answers."""
# Tokens of the rows of one pass that makes all logits of an evaluation twice.
TOGETHER = 2_048


class Preference(preferences.Answered, Decoder):
    """Preferred answers. Give `chosen` and `rejected`, or of `method: kto` also `completion` and `label`."""

    group: ClassVar[str | None] = "asked"
    headline: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "roc_auc", "margin", "kl")

    method: Literal["dpo", "ipo", "orpo", "simpo", "kto", "apo"] = "dpo"
    """Loss: `dpo` (arXiv 2305.18290), `ipo` (2310.12036, of a mean token), `apo` (2408.06266) and `kto` (2402.01306)
    compare the model with what it was when training began; `orpo` (2403.07691) and `simpo` (2405.14734) do not."""
    prompt: Annotated[Text | None, TEXT] = None
    """Column of prompts: texts, chats, or objects with `messages` as OpenAI's `input`; null takes the begin that both
    answers share, also of dialogues as one text (`\\n\\nHuman: ...\\n\\nAssistant: ...`)."""
    chosen: Annotated[Text | None, TEXT, Key(replaces=("completion", "label"))] = None
    """Column of the better answers: texts, or lists of turns, which may repeat the prompt."""
    rejected: Annotated[Text | None, TEXT, Key(replaces=("completion", "label"))] = None
    """Column of the worse answers."""
    completion: Annotated[Text | None, TEXT, Key(replaces=("chosen", "rejected"))] = None
    """Column of single answers, for `kto`."""
    label: Annotated[Text | None, TEXT, Key(replaces=("chosen", "rejected"))] = None
    """Column that tells whether `completion` is good: true or false, or 1 or 0."""
    beta: Annotated[float, Field(gt=0.0, le=1e4)] | None = None
    """How much a change of the model counts; of `orpo` the weight of the odds. Null is 0.1, of `simpo` 2."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0
    """Share of the pairs whose answers may be exchanged (`dpo`; conservative DPO)."""
    gamma: Weight = 1.0
    """Margin that `simpo` wants between the rewards of both answers."""
    apo: Literal["zero", "down"] = "zero"
    """`zero`: chosen answers are better than the model's own; `down`: they are worse."""
    desirable_weight: Weight = 1.0
    """Weight of good answers in the loss of `kto`."""
    undesirable_weight: Weight = 1.0
    """Weight of bad answers in the loss of `kto`."""

    @classmethod
    def propose(cls, columns: Mapping[str, Cells]) -> Proposal | None:
        """Take chosen and rejected, also as OpenAI calls them; or a prompt, an answer and whether it is good."""
        prompt = _proposals.first(PROMPTS, columns)
        pair = [_proposals.first(names, columns) for names in (("chosen", "preferred_output"), REJECTED)]
        if all(pair):
            block = {"chosen": pair[0].name, "rejected": pair[1].name}  # type: ignore[union-attr]
            says, confidence = f"{block['chosen']} and {block['rejected']} are preference pairs", 0.95
        else:
            answer, label = _proposals.first(("completion",), columns), _proposals.first(("label",), columns)
            if prompt is None or answer is None or label is None or not all(v in TRUTHS for v in label.values):
                return None
            block = {"method": "kto", "completion": answer.name, "label": label.name}
            says, confidence = f"{label.name} tells which answers in {answer.name} are good", 0.92
        block |= {} if prompt is None else {"prompt": prompt.name}
        used = [name for key, name in block.items() if key != "method"]
        texts = [" ".join(map(str, row)) for row in zip(*(columns[name].values for name in used), strict=True)]
        return Proposal(block, says, confidence=confidence, used=used, model=SMALL, texts=texts)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        single = self.completion is not None or self.label is not None
        if single == (self.chosen is not None or self.rejected is not None):
            raise ValueError("give chosen and rejected, or completion and label")
        pair = (self.completion, self.label) if single else (self.chosen, self.rejected)
        if None in pair:
            names = "completion and label" if single else "chosen and rejected"
            raise ValueError(f"{names} belong together; give both")
        if single and self.prompt is None:
            raise ValueError("prompt is needed for single answers; set it")
        return self

    @model_validator(mode="after")
    def _fields_fit_method(self) -> Self:
        for name, method in OWN.items():
            if self.method != method and changed(self, name):
                raise ValueError(f"{name} is for method {method}; set method: {method}, or remove {name}")
        return self

    @property
    def title(self) -> str:
        """Losses and rewards of two methods can't be compared."""
        return f"preferences by {self.method}"

    @property
    def strength(self) -> float:
        """`beta`, or what the method has where there is none."""
        return BETAS[self.method] if self.beta is None else self.beta

    @property
    def best_metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        """Single answers have no pairs to be right about."""
        return ("loss", "margin", "accuracy" if self.sequences == 2 else "roc_auc")

    @property
    def reader(self) -> preferences.Reader:
        """Read the rows as this recipe names their columns."""
        return preferences.Reader(self.prompt, self.answers, self.system)

    def columns(self) -> dict[str, Column]:
        """Return prompt, answers, and the label; without a column of prompts they are read off the first answer."""
        names = [*self.answers, *([] if self.label is None else [self.label])]
        asked = names[:1] if self.prompt is None else [self.prompt]
        return {name: Column("chat", is_target=name not in asked) for name in dict.fromkeys([*asked, *names])}

    def features(self, rows: Rows, processor: Any, state: State, limit: int) -> list[Features]:
        """Tokenise each answer behind its prompt, and cut it to `limit` tokens at the right.

        The answers of a row stand one after the other; `ends` tells where all but the last end. `asked` is a hash of
        the prompt's tokens, `desired` has 1 for a good answer and 0 for a bad one.

        Raises:
            RowsError: Rows can't be rendered; all of them, by their number within the batch.
        """
        reader, renderer, is_chat = self.reader, self.renderer(processor), self._is_chat(processor)
        rendered = examples.each(rows, lambda row: reader.rendered(row, renderer, is_chat=is_chat))
        desired = [[1, 0]] * len(rendered) if self.label is None else examples.each(rows, self._desired)
        flat = preferences.marked(renderer, [answer for row in rendered for answer in row], is_chat=is_chat)
        found: list[Features] = []
        for number, answers in enumerate(rendered):
            texts = flat[number * self.sequences : (number + 1) * self.sequences]
            ids, labels = [text.ids[:limit] for text in texts], [text.labels[:limit] for text in texts]
            struck = {one.check for _, lost in answers for one in lost if one.check is not None}
            struck |= {"split_token"} if any(text.splits for text in texts) else set()
            if self.sequences == 2:
                struck |= _struck(texts, ids)
            trained = [sum(label != IGNORE for label in row[1:]) for row in labels]
            start = next((at for at, label in enumerate(texts[0].labels) if label != IGNORE), len(texts[0].ids))
            found.append(
                {
                    "input_ids": list(chain.from_iterable(ids)),
                    "labels": list(chain.from_iterable(labels)),
                    "ends": [len(row) for row in ids[:-1]],
                    "desired": desired[number],
                    "asked": preferences.digest(repr(texts[0].ids[:start])),
                    "size": sum(map(len, ids)),
                    "whole": sum(len(text.ids) for text in texts),
                    # A pair of which one answer is gone teaches nothing.
                    "weight": (self.sequences if self.method == "kto" else 1) if all(trained) else 0,
                    "remarks": sum(REMARKS[check] for check in struck),
                }
            )
        return found

    def _desired(self, row: Mapping[str, Any]) -> list[int]:
        value = row[str(self.label)]
        value = value.strip().lower() if isinstance(value, str) else value
        if value is None or isinstance(value, list | dict) or value not in TRUTHS:
            raise DataError(f"column {self.label!r} is neither true nor false; write one of both")
        return [int(TRUTHS[value])]

    def collate(self, features: list[Any], processor: Any, state: State) -> Batch:
        """Pad to `input_ids`, `attention_mask` and `labels`, (B, S, T), and what belongs to each answer, (B, S)."""
        import torch

        batch = _stacked([preferences.parts(row, *PARTS) for row in features], processor)
        batch["desired"] = torch.tensor([row["desired"] for row in features])
        for name in ("start", "partner_start"):
            if name in features[0]:
                batch[name] = torch.tensor([row[name] for row in features], dtype=torch.float32)
        if "partner" in features[0]:
            pairs = [(preferences.parts(row, *PARTS), preferences.parts(row["partner"], *PARTS)) for row in features]
            others = _stacked([[_exchanged(*both) for both in zip(*pair, strict=True)] for pair in pairs], processor)
            batch |= {f"partner_{name}": value for name, value in others.items()}
        return batch

    def inputs(self, batch: Batch) -> Batch:
        """Return token ids and their mask, (B x S, T)."""
        return {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}

    def count(self, batch: Batch, state: State) -> torch.Tensor:
        """Return the number of pairs, or of answers that are judged one by one."""
        return self._counted(batch).sum()

    def _counted(self, batch: Batch) -> torch.Tensor:
        """(B,) or, of `kto`, (B, S) bool."""
        counted = (batch["labels"][..., 1:] != IGNORE).any(-1)
        return counted if self.method == "kto" else counted.all(-1)

    @property
    def needs_start(self) -> bool:
        """All but those methods that have no reference."""
        return self.method not in ("orpo", "simpo")

    def start(self, model: Callable[..., Any], batch: Batch, state: State) -> Batch:
        """Return `start`, the log-probability of each answer, (B, S), and `partner_start` that of the partner's."""
        found = {"start": _logps(model, batch)}
        return found | ({"partner_start": _logps(model, _of_partner(batch))} if self.contrasts else {})

    def partner(self, rows: int) -> int:
        """Return half of the rows: the rows about one prompt often stand beside each other."""
        return max(1, rows // 2) if self.contrasts else 0

    @property
    def contrasts(self) -> bool:  # type: ignore[override]
        """The reference point of `kto` is that of the global batch."""
        return self.method == "kto"

    def embed(self, model: Callable[..., Any], batch: Batch, state: State) -> dict[str, torch.Tensor]:
        """Return the log-ratios of the answers of other rows behind these prompts, (B, S), and which of them count."""
        counted = self._counted(batch).long()
        if "partner_start" not in batch:  # a model that has not begun to train
            return {"ratio": 0.0 * counted, "counted": counted}
        return {"ratio": _logps(model, _of_partner(batch)) - batch["partner_start"], "counted": counted}

    def _point(self, model: Callable[..., Any], batch: Batch, state: State) -> torch.Tensor:
        """Return the mean of these ratios over the global batch, and 0 at least: the reference point, a scalar."""
        found = {name.removeprefix("pool."): value for name, value in batch.items() if name.startswith("pool.")}
        found = found or self.embed(model, batch, state)
        counted = found["counted"] == 1
        return (found["ratio"].where(counted, 0.0).sum() / counted.sum().clamp(min=1)).clamp(min=0)

    def loss(self, model: Callable[..., Any], batch: Batch, state: State) -> Loss:
        """Return the loss of pairs, or of single answers, summed; with accuracy, margin and log-probabilities."""
        labels = batch["labels"].flatten(0, 1)
        kept = _losses.kept_logits(model, self.inputs(batch), labels)
        logps = _losses.log_probabilities(kept, labels).view_as(batch["desired"])
        # As training begins, the model is its own reference.
        start, lengths = batch.get("start", logps.detach()), _lengths(batch)
        counted = self._counted(batch)
        kl = self._point(model, batch, state) if self.contrasts else logps.new_zeros(())
        losses = self._losses(logps, start, lengths, batch["desired"].bool(), kl)
        total = losses.where(counted, 0.0).sum()
        if self.method == "kto":
            return Loss(total)
        rewards = self._rewards(logps.detach(), start, lengths)
        logs = {"margin": rewards[:, 0] - rewards[:, 1], "chosen_logp": logps[:, 0], "rejected_logp": logps[:, 1]}
        logs["accuracy"] = preferences.right(logs["margin"])
        return Loss(total, {name: value.detach().where(counted, 0.0).sum() for name, value in logs.items()})

    def _losses(
        self,
        logps: torch.Tensor,
        start: torch.Tensor,
        lengths: torch.Tensor,
        desired: torch.Tensor,
        kl: torch.Tensor,
    ) -> torch.Tensor:
        """(B,) of pairs, (B, S) of `kto`; all arguments but `kl`, the reference point of `kto`, are (B, S)."""
        import torch

        beta, ratio, mean = self.strength, logps - start, logps / lengths.clamp(min=1)
        match self.method:
            case "dpo":
                return preferences.dpo(ratio, beta, self.label_smoothing)
            case "ipo":
                return preferences.ipo(ratio, lengths, beta)
            case "apo":
                return preferences.apo(ratio, beta, down=self.apo == "down")
            case "orpo":
                return preferences.orpo(mean, beta)
            case "simpo":
                return preferences.simpo(mean, beta, self.gamma)
        weights = torch.where(desired, self.desirable_weight, self.undesirable_weight)
        return weights * preferences.kto(ratio, desired, kl, beta)

    def _rewards(self, logps: torch.Tensor, start: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return the rewards that the model implies: beta times log-ratios, or log-probabilities of a mean token."""
        if not self.needs_start:
            return self.strength * logps / lengths.clamp(min=1)
        return self.strength * (logps - start)

    def predict(
        self, model: Callable[..., Any], batch: Batch, state: State, totals: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """Of each answer `logp`, that at the `start`, and its `length` in tokens; (B, S) each.

        `kl` (B, S) is the divergence from the start summed over its tokens, where the start can be had; `partner` of
        `kto` the log-ratio of the other row's answer.
        """
        logps, kl = _logps(model, batch), None
        if (without := getattr(model, "without_adapter", None)) is not None:
            kl = self._divergence(model, batch, without)
        found = {"logp": logps, "start": batch.get("start", logps), "length": _lengths(batch)}
        found["desired"] = batch["desired"]
        if kl is not None:
            found["kl"] = kl
        if "partner_start" in batch:
            found["partner"] = _logps(model, _of_partner(batch)) - batch["partner_start"]
        return found

    def _divergence(self, model: Any, batch: Batch, without: Callable[[], Any]) -> torch.Tensor:
        import torch

        labels = batch["labels"].flatten(0, 1)
        inputs, found = self.inputs(batch), list[torch.Tensor]()
        for rows in torch.split(torch.arange(len(labels)), max(1, TOGETHER // labels.shape[1])):
            part, some = {name: value[rows] for name, value in inputs.items()}, labels[rows]
            own = _losses.kept_logits(model, part, some)
            with without():
                before = _losses.kept_logits(model, part, some)
            found.append(_losses.row_sums(preferences.divergences(own, before).expand(2, -1), some)[:, 0])
        return torch.cat(found).view_as(batch["desired"])

    def metrics(self, predictions: Predictions, state: State) -> dict[str, float]:
        """Return `loss`, `margin` of rewards, log-probabilities, `accuracy` of pairs or `roc_auc` of single answers.

        `kl` (nats a token of the answers) is the divergence of the model from what training began with.
        """
        if not len(predictions["logp"]):
            return {}
        found = self.sums(predictions, state).whole()
        desired = predictions["desired"].ravel() == 1
        if self.sequences == 1 and 0 < desired.sum() < len(desired):
            from scipy import stats

            rewards = self._judged(predictions)[0].ravel()
            ranks, good = stats.rankdata(rewards), int(desired.sum())
            found["roc_auc"] = float((ranks[desired].sum() - good * (good + 1) / 2) / (good * (len(desired) - good)))
        return found

    def _judged(self, predictions: Predictions) -> tuple[Any, Any]:
        """Return rewards (N, S), and losses (N,): of single answers their mean over those of a row."""
        import torch

        logps, start, lengths = (torch.from_numpy(predictions[name]) for name in ("logp", "start", "length"))
        desired, kl = torch.from_numpy(predictions["desired"]).bool(), torch.zeros(())
        if "partner" in predictions:
            kl = torch.from_numpy(predictions["partner"]).mean().clamp(min=0)
        losses = self._losses(logps, start, lengths, desired, kl)
        losses = losses.mean(-1) if losses.dim() > 1 else losses
        return self._rewards(logps, start, lengths).numpy(), losses.numpy()

    def sums(self, predictions: Predictions, state: State) -> Sums:
        """Return the sums of rows; the reference point of `kto` is that of the whole split."""
        from hf_finetune.tasks import _sums

        rewards, losses = self._judged(predictions)
        if self.sequences == 2:
            logps, lengths = predictions["logp"], predictions["length"]
            return _sums.of_pairs(rewards, losses, lengths, logps, predictions.get("kl"))
        desired: Any = predictions["desired"] == 1
        return _sums.of_judged(rewards[:, 0], losses, desired, predictions["length"], predictions.get("kl"))

    def judge(self, predictions: Predictions, state: State) -> Judged | None:
        """Return the pairs whose worse answer has the greater reward, with how much greater it is."""
        return preferences.judged(self._judged(predictions)[0]) if self.sequences == 2 else None

    def plots(self, predictions: Predictions, state: State) -> Plot | None:
        """Return rewards, loss and lengths of each pair."""
        import numpy as np

        if self.sequences == 1:
            return None
        rewards, losses = self._judged(predictions)
        return Plot("pairs", np.column_stack([rewards, losses, predictions["length"]]).astype(np.float32))

    def example(self, state: State, size: int) -> dict[str, Any]:
        """Return words, as many in both answers together as tokens are wanted."""
        spoken = self._spoken(size)
        if self.prompt is None:  # it is what both answers begin with
            spoken = {name: f"\n\nHuman: the\n\nAssistant: {text}" for name, text in spoken.items()}
        row = dict.fromkeys(self.columns(), "the") | spoken
        return row if self.label is None else row | {self.label: True}


# Names of the columns of worse answers, the likeliest first.
REJECTED = ("rejected", "non_preferred_output")


def _struck(texts: list[_tokens.Marked], ids: list[list[int]]) -> set[str]:
    """Return the checks that a pair strikes, of whole answers and of these as they are cut."""
    lengths = [sum(label != IGNORE for label in text.labels) for text in texts]
    found = {"longer_chosen"} if lengths[0] > lengths[1] else set()
    if texts[0].ids == texts[1].ids:
        found |= {"equal_answers"}
    elif ids[0] == ids[1]:
        found |= {"cut_difference"}
    return found


def _exchanged(own: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Return the answer of another row behind the prompt of this one; of a masked row nothing counts."""
    starts = [next((at for at, x in enumerate(row["labels"]) if x != IGNORE), 0) for row in (own, other)]
    is_masked = all(label == IGNORE for label in own["labels"])
    answer = other["labels"][starts[1] :]
    return {
        "input_ids": own["input_ids"][: starts[0]] + other["input_ids"][starts[1] :],
        "labels": [IGNORE] * starts[0] + ([IGNORE] * len(answer) if is_masked else answer),
    }


def _stacked(rows: list[list[dict[str, Any]]], tokenizer: Any) -> Batch:
    """Pad the answers of all rows, (B, S, T)."""
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    batch = _tokens.padded([answer for row in rows for answer in row], pad)
    return {name: value.view(len(rows), -1, value.shape[-1]) for name, value in batch.items()}


def _of_partner(batch: Batch) -> Batch:
    """Return the answers of other rows as a batch of their own."""
    return {name: batch[f"partner_{name}"] for name in ("input_ids", "attention_mask", "labels")}


def _logps(model: Callable[..., Any], batch: Batch) -> torch.Tensor:
    """Return the log-probability of each answer, (B, S), without a gradient."""
    import torch

    labels = batch["labels"].flatten(0, 1)
    inputs = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        nats = _losses.row_sums(_losses.each_next_token(model, inputs, labels), labels)[:, 0]
    return -nats.view(batch["labels"].shape[:2])


def _lengths(batch: Batch) -> torch.Tensor:
    """Return the tokens of each answer, (B, S)."""
    return (batch["labels"][..., 1:] != IGNORE).sum(-1)
