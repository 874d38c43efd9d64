"""Answers to several prompts at once, each with settings of its own, told piece by piece as they are written.

Without settings an answer is that of `hf-finetune predict`: the same prompt, the same batches, the likeliest tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from hf_finetune.inference.load import Serving
from hf_finetune.tasks import _generation as generation
from hf_finetune.tasks._generation import Ends
from hf_finetune.tasks.base import Task

Reason = Literal["stop", "length", "unwanted"]
REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are no whole character (yet)."""


@dataclass(frozen=True)
class Wish:
    """Settings of one answer."""

    max_tokens: int
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    seed: int | None = None
    """Of the draws: the same seed draws the same tokens, whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    """The answer ends before the first of these texts."""
    logprobs: int | None = None
    """Likeliest tokens that are told at each position; 0 tells the token itself alone, None no log-probability."""


class Scored(NamedTuple):
    """A token with its log-probability, before temperature and top_p, and the likeliest tokens there."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass
class Answer:
    """One answer in the making."""

    wish: Wish
    room: int
    """Most tokens, by the wish and by the positions of the model."""
    tokens: list[int] = field(default_factory=list)
    """The end token included."""
    scored: list[Scored] = field(default_factory=list)
    """Of all tokens but the end token, where log-probabilities are wished for."""
    text: str = ""
    told: int = 0
    """Characters of the text that were told; the rest may yet change."""
    reason: Reason | None = None
    """How it ended; None while it is written."""
    ended: bool = False
    """The model ended it with the token that ends a turn."""

    def add(self, token: int, scored: Scored | None, tokenizer: Any, ends: Ends) -> str:
        """Take the next token; returns the characters that are certain by now, and were not told yet."""
        self.tokens.append(token)
        is_end = token in ends.all
        if is_end:
            self.reason, self.ended = "stop", token == ends.of_turn
        elif scored is not None:
            self.scored.append(scored)
        written = self.tokens[:-1] if is_end else self.tokens
        self.text = str(tokenizer.decode(written, skip_special_tokens=True))
        if found := [place for stop in self.wish.stop if (place := self.text.find(stop)) >= 0]:
            self.text, self.reason = self.text[: min(found)], "stop"
        elif not is_end and len(self.tokens) >= self.room:
            self.reason = "length"
        certain = len(self.text) if self.reason else self._certain(tokenizer)
        piece = self.text[self.told : certain]
        self.told = max(self.told, certain)
        return piece

    def end(self, reason: Reason) -> str:
        """End it where whoever generates the tokens says so; returns the characters that were not told yet."""
        piece, self.reason, self.told = self.text[self.told :], reason, len(self.text)
        return piece

    def _certain(self, tokenizer: Any) -> int:
        """Count the characters that no further token can change."""
        certain = len(self.text.rstrip(REPLACEMENT))
        if getattr(tokenizer, "clean_up_tokenization_spaces", False):
            # It takes away spaces before what comes next: "do n" becomes "don't".
            certain = min(certain, max(self.text.rfind(" "), 0))
        for stop in self.wish.stop:
            for length in range(min(len(stop) - 1, len(self.text)), 0, -1):
                if self.text.endswith(stop[:length]):
                    certain = min(certain, len(self.text) - length)
                    break
        return certain


Tell = Callable[[int, str, list[Scored]], None]
"""Takes the number of a prompt, the next piece of its answer, and its tokens if log-probabilities are wished for."""


def answer(
    served: Serving,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    wishes: Sequence[Wish],
    task: Task,
    together: int,
    tell: Tell = lambda number, piece, scored: None,
    is_wanted: Callable[[int], bool] = lambda number: True,
) -> list[Answer]:
    """Answer prompts.

    Args:
        served: A language model.
        tokenizer: Its tokenizer.
        prompts: Token ids; one that leaves no room for an answer gets an empty one, as in `predict`.
        wishes: Settings of each.
        task: Of the model.
        together: Prompts of a batch.
        tell: Is called with each piece as it comes, in this thread.
        is_wanted: Is asked after each token; an answer that nobody wants ends there.

    Returns:
        One answer a prompt, in their order.
    """
    network, ends = served.network, Ends.of(served.network, tokenizer, task)
    limit = generation.positions(network)
    answers = [
        Answer(wish, min(wish.max_tokens, limit - len(prompt))) for prompt, wish in zip(prompts, wishes, strict=True)
    ]
    with generation.greedy(network, tokenizer, task), served.running():
        most = max((wish.max_tokens for wish in wishes), default=0)
        for numbers, _ in generation.batches([len(prompt) for prompt in prompts], together, most, network):
            numbers = [number for number in numbers if is_wanted(number)]
            if not numbers:
                continue
            made = [answers[number] for number in numbers]
            draw = _Draw(made)
            watch = _Watch(made, numbers, draw, tokenizer=tokenizer, ends=ends, tell=tell, is_wanted=is_wanted)
            network.generate(
                **generation.padded(network, [prompts[number] for number in numbers]),
                max_new_tokens=max(one.room for one in made),
                logits_processor=LogitsProcessorList([draw] if draw.is_needed else []),
                stopping_criteria=StoppingCriteriaList([watch]),
            )
    for one in answers:
        one.reason = one.reason or ("length" if one.room <= 0 else "unwanted")
    return answers


class _Draw(LogitsProcessor):
    """Draws the tokens of the rows that wish for it, so that the likeliest one is the drawn one; notes logits."""

    def __init__(self, answers: Sequence[Answer]) -> None:
        self.answers = answers
        self.generators = [torch.Generator() for _ in answers]
        for one, generator in zip(answers, self.generators, strict=True):
            if one.wish.seed is None:
                generator.seed()
            else:
                generator.manual_seed(one.wish.seed)
        self.logprobs: dict[int, torch.Tensor] = {}
        """Of the next token, (V,), by row."""

    @property
    def is_needed(self) -> bool:
        """Tell whether any answer is more than the likeliest tokens."""
        return any(one.wish.temperature > 0 or one.wish.logprobs is not None for one in self.answers)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        for row, one in enumerate(self.answers):
            if one.reason is not None:
                continue
            if one.wish.logprobs is not None:
                self.logprobs[row] = scores[row].float().log_softmax(-1)
            if one.wish.temperature > 0:
                logits: Any = TemperatureLogitsWarper(one.wish.temperature)(input_ids, scores[row : row + 1].float())
                if one.wish.top_p < 1:
                    logits = TopPLogitsWarper(one.wish.top_p)(input_ids, logits)
                # On the CPU: one seed, one answer, on every device.
                chances = logits[0].softmax(-1).cpu()
                token = int(torch.multinomial(chances, 1, generator=self.generators[row]))
                scores[row] = -math.inf
                scores[row, token] = 0.0
        return scores

    def scored(self, row: int, token: int) -> Scored | None:
        """Return what was noted of the token that a row took."""
        wished = self.answers[row].wish.logprobs
        if wished is None:
            return None
        logprobs = self.logprobs[row]
        values, tokens = (found.tolist() for found in logprobs.topk(min(wished, len(logprobs))))
        return Scored(token, float(logprobs[token]), list(zip(tokens, values, strict=True)))


class _Watch(StoppingCriteria):
    """Reads each token as it is written, tells it on, and ends the rows that are done."""

    def __init__(
        self,
        answers: Sequence[Answer],
        numbers: Sequence[int],
        draw: _Draw,
        *,
        tokenizer: Any,
        ends: Ends,
        tell: Tell,
        is_wanted: Callable[[int], bool],
    ) -> None:
        self.answers, self.numbers, self.draw = answers, numbers, draw
        self.tokenizer, self.ends, self.tell, self.is_wanted = tokenizer, ends, tell, is_wanted

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        new: list[int] = input_ids[:, -1].tolist()
        for row, (one, number, token) in enumerate(zip(self.answers, self.numbers, new, strict=True)):
            if one.reason is not None:
                continue  # only padding since
            scored = self.draw.scored(row, token)
            piece = one.add(token, scored, self.tokenizer, self.ends)
            if one.reason is None and not self.is_wanted(number):
                one.reason = "unwanted"
            if piece or scored is not None:
                self.tell(number, piece, [] if scored is None or token in self.ends.all else [scored])
        done = [one.reason is not None for one in self.answers]
        return torch.tensor(done, device=input_ids.device, dtype=torch.bool)


def spelled(tokenizer: Any, scored: Sequence[Scored]) -> Iterator[dict[str, Any]]:
    """Write tokens as OpenAI's API has them: `token`, `logprob`, `bytes`, `top_logprobs`."""

    def one(token: int, logprob: float) -> dict[str, Any]:
        text = str(tokenizer.decode([token]))
        # JSON has no -inf; OpenAI's API writes -9999 for a token that can't come.
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode("utf-8", "replace"))}

    for token in scored:
        yield {**one(token.token, token.logprob), "top_logprobs": [one(*each) for each in token.top]}
