"""Answers to a prompt of which one is preferred: read from the data, rendered, and the losses that teach it.

Shapes: B rows, S answers of a row (chosen and rejected, or one), T tokens, V vocabulary. Losses are of single rows, so
that it does not matter which rows share a micro-batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from hf_finetune.errors import DataError
from hf_finetune.tasks import _examples as examples
from hf_finetune.tasks import _tokens
from hf_finetune.tasks._chat import Rendered, Renderer
from hf_finetune.tasks._fidelity import Lost
from hf_finetune.tasks._formats import SPEAKER
from hf_finetune.tasks._messages import Chat
from hf_finetune.tasks._proposals import as_list
from hf_finetune.tasks.base import Judged, Rows, is_blank

if TYPE_CHECKING:
    import torch

# An answer as text, with the characters that are trained, and what the chat template dropped.
Answer = tuple[Rendered, tuple[Lost, ...]]


class Answered:
    """Tasks whose rows hold a better and a worse answer to a prompt, or single answers."""

    if TYPE_CHECKING:  # fields of the tasks, which document them
        prompt: str | None
        chosen: str | None
        rejected: str | None
        completion: str | None

    @property
    def answers(self) -> tuple[str, ...]:
        """Columns of answers: of the better and the worse, or of single ones."""
        return (str(self.completion),) if self.completion is not None else (str(self.chosen), str(self.rejected))

    @property
    def sequences(self) -> int:
        """One for each answer."""
        return len(self.answers)

    def blank(self, rows: Rows) -> list[bool]:
        """Tell which rows have a blank prompt or answer."""
        names = tuple(name for name in (self.prompt, *self.answers) if name is not None and name in rows)
        cells = zip(*(rows[name] for name in names), strict=True)
        return [is_empty(dict(zip(names, row, strict=True)), names) for row in cells]

    def describe(self, row: Mapping[str, Any]) -> str:
        """Return the chosen answer behind its prompt, then the rejected one."""
        return "\n---\n".join(
            str(row[name]) for name in (self.prompt, *self.answers) if name is not None and name in row
        )

    def _spoken(self, size: int) -> dict[str, Any]:
        """Return answers of words, as many together as tokens are wanted."""
        # Not the same word in both: equal answers teach nothing.
        return {
            name: " ".join([word] * max(1, (size + place) // self.sequences))
            for place, (name, word) in enumerate(zip(self.answers, ("the", "a"), strict=False))
        }


def parts(row: Mapping[str, Any], *names: str) -> list[dict[str, Any]]:
    """Return the answers of an encoded row, which stand one after the other; of the features that it has."""
    bounds = [0, *row["ends"], len(row["input_ids"])]
    return [{name: row[name][start:end] for name in names if name in row} for start, end in pairwise(bounds)]


def digest(prompt: str) -> int:
    """Return 56 bits of a hash of a prompt, by which rows about one prompt are found."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=7).digest())


@dataclass(frozen=True)
class Reader:
    """Reads rows by the columns that the fields of `preference` name, which document them.

    Every method raises a `DataError` where the row does not hold what its columns should.
    """

    prompt: str | None
    answers: tuple[str, ...]
    system: str | None

    def asked(self, prompt: str) -> Chat:
        """Return a chat that waits for the answer to a prompt."""
        return Chat.asking(prompt, self.system)

    def chats(self, row: Mapping[str, Any]) -> tuple[Chat, list[Chat]]:
        """Return the prompt as a chat, and one for each answer that begins with it."""
        given = [self._turns(row, name) for name in self.answers]
        if self.prompt is not None:
            asked = self._turns(row, self.prompt) or self.asked(self._text(row, self.prompt))
        else:
            asked = self._shared(row, given)
        start, found = len(asked.messages), []
        for name, chat in zip(self.answers, given, strict=True):
            turns = [{"role": "assistant", "content": self._text(row, name)}] if chat is None else chat.messages
            # Some data repeat the prompt before each answer; a system turn may stand in one of both alone.
            for head in (asked.messages, [turn for turn in asked.messages if turn["role"] != "system"]):
                if turns[0]["role"] != "assistant" and turns[: len(head)] == head:
                    turns = turns[len(head) :]
                    break
            if not turns or turns[0]["role"] != "assistant":
                raise DataError(f"column {name!r} holds no answer of the assistant to the prompt; write it as one turn")
            muted = {index for index, turn in enumerate(asked.messages) if turn["role"] == "assistant"}
            found.append(Chat([*asked.messages, *turns], asked.tools, frozenset(muted)))
            if not found[-1].messages[start:]:
                raise DataError(f"column {name!r} holds no answer; remove the row")
        return asked, found

    def texts(self, row: Mapping[str, Any]) -> tuple[str, list[str]]:
        """Return the prompt and the answers as plain texts, for models without a chat template."""
        answers = [self._text(row, name) for name in self.answers]
        if self.prompt is not None:
            return self._text(row, self.prompt), answers
        if len(answers) == 1:
            raise DataError("a single answer needs a prompt; set task.prompt")
        at = shared(*answers)
        headers = [found.end() for found in SPEAKER.finditer(answers[0]) if found[1] == "Assistant"]
        if headers and SPEAKER.match(answers[0]) and (before := [end for end in headers if end <= at]):
            at = before[-1]
        prompt, rest = answers[0][:at], [answer[at:] for answer in answers]
        if not prompt.strip():
            raise DataError(f"{' and '.join(self.answers)} begin with no common prompt; set task.prompt to its column")
        return prompt, rest

    def rendered(self, row: Mapping[str, Any], renderer: Renderer, *, is_chat: bool) -> list[Answer]:
        """Return each answer behind its prompt; the answer is to be trained."""
        if not is_chat:
            prompt, *answers = (renderer.guarded(text) for text in self._flat(row))
            return [((prompt + answer, [(len(prompt), len(prompt) + len(answer))]), ()) for answer in answers]
        asked, chats = self.chats(row)
        # The last answer is rendered as a model is asked for it: templates may change earlier turns.
        alone = [len(chat.messages) == len(asked.messages) + 1 for chat in chats]
        return [
            renderer.spoken(chat, train_on="last" if is_last else "assistant")
            for chat, is_last in zip(chats, alone, strict=True)
        ]

    def question(self, row: Mapping[str, Any], renderer: Renderer) -> str:
        """Return the rendered chat up to the header of the answer."""
        return renderer.text(self.open_chat(row), ask=True)

    def pair(self, row: Mapping[str, Any]) -> tuple[str, str]:
        """Return prompt and preferred answer as plain texts."""
        prompt, answers = self.texts(row)
        return prompt, answers[0]

    def open_chat(self, row: Mapping[str, Any]) -> Chat:
        """Return the chat that waits for an answer; of rows without a column of prompts, the chosen one without its."""
        if self.prompt is not None:
            return self._turns(row, self.prompt) or self.asked(self._text(row, self.prompt))
        chat = self._turns(row, self.answers[0])
        if chat is None or not chat.messages:
            raise DataError(f"column {self.answers[0]!r} holds no dialogue; set task.prompt")
        ends = chat.answers[-1:] == [len(chat.messages) - 1]
        return chat.upto(chat.answers[-1]) if ends else chat

    def open_text(self, row: Mapping[str, Any]) -> str:
        """Return the prompt that is to be continued; of rows without a column of prompts, the text to its answer."""
        if self.prompt is not None:
            return self._text(row, self.prompt)
        text = self._text(row, self.answers[0])
        headers = [found.end() for found in SPEAKER.finditer(text) if found[1] == "Assistant"]
        return text[: headers[-1]] if headers else text

    def reference(self, row: Mapping[str, Any]) -> str:
        """Return the preferred answer."""
        chat = self._turns(row, self.answers[0])
        answer = self._text(row, self.answers[0]) if chat is None else chat.messages[-1].get("content")
        if not isinstance(answer, str):
            raise DataError("the preferred answer is no text to compare with")
        return answer

    def _flat(self, row: Mapping[str, Any]) -> list[str]:
        prompt, answers = self.texts(row)
        return [prompt, *answers]

    def _text(self, row: Mapping[str, Any], name: str) -> str:
        if isinstance(row.get(name), list | Mapping):
            raise DataError(f"column {name!r} holds a chat, not text; write text, or name a chat model")
        value = examples.fill([("", name)], row)
        if not value.strip():
            raise DataError(f"column {name!r} is empty; remove the row or fill it in")
        return value

    def _turns(self, row: Mapping[str, Any], name: str) -> Chat | None:
        """Read a cell that is a chat: a list of turns, an object with `messages`, or a dialogue as one text."""
        value = row.get(name)
        if isinstance(value, Mapping):
            if "messages" in value:  # OpenAI's `input`
                return Chat.parse(value["messages"], value.get("tools"))
            return Chat.parse([value])
        turns = as_list(value)
        if isinstance(value, str) and turns is not None:
            # Text that is a list in JSON is a chat where each element says who speaks; else it is an answer of data.
            says = [isinstance(turn, Mapping) and ("role" in turn or "from" in turn) for turn in turns]
            turns = turns if says and all(says) else None
        if turns is not None:
            chat = Chat.parse(turns)
            if not chat.messages:
                raise DataError(f"column {name!r} holds a chat without turns; remove the row")
            return chat
        if isinstance(value, str) and SPEAKER.match(value):
            return Chat.parse(value)
        return None

    def _shared(self, row: Mapping[str, Any], given: list[Chat | None]) -> Chat:
        """Return the turns with which all answers begin, up to where the assistant speaks."""
        chats = [chat for chat in given if chat is not None]
        if not chats or len(chats) < len(given):
            prompt, answers = self.texts(row)
            if not all(map(str.strip, answers)):
                raise DataError("one answer is the begin of the other, so that no prompt can be told; set task.prompt")
            return self.asked(prompt)
        alike = 0
        while all(len(chat.messages) > alike for chat in chats) and all(
            chat.messages[alike] == chats[0].messages[alike] for chat in chats
        ):
            alike += 1
        # The answer begins with a turn of the assistant, also where both answers are the same.
        starts = [index for index in chats[0].answers if index <= min(alike, *(len(c.messages) - 1 for c in chats))]
        if not starts or not starts[-1]:
            raise DataError(f"{' and '.join(self.answers)} begin with no common prompt; set task.prompt to its column")
        return chats[0].upto(starts[-1])


def shared(one: str, two: str) -> int:
    """Return how many characters two texts begin with alike, whole words alone."""
    at = next((index for index, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    while at and not one[at - 1].isspace():
        at -= 1
    # The space belongs to the word behind it, as most tokenizers have it.
    return at - 1 if at and one[at - 1] == " " else at


def is_empty(row: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    """Tell whether a cell of the row is blank, or ends with a turn in which nothing is said."""
    for name in names:
        cell = row[name]
        turns = cell if isinstance(cell, list) else None
        last = turns[-1] if turns else cell
        if is_blank(cell) or (isinstance(last, Mapping) and "content" in last and is_blank(last["content"])):
            return not (isinstance(last, Mapping) and last.get("tool_calls"))
    return False


def marked(renderer: Renderer, answers: list[Answer], *, is_chat: bool) -> list[_tokens.Marked]:
    """Return answers as tokens."""
    texts = [rendered for rendered, _ in answers]
    return _tokens.mark(renderer, texts) if is_chat else _tokens.mark_plain(renderer, texts)


def right(margin: torch.Tensor) -> torch.Tensor:
    """Return 1 where the better answer has the greater reward, and 0.5 where both have the same."""
    return (margin > 0).float() + 0.5 * (margin == 0)


def judged(rewards: Any) -> Judged:
    """Judge pairs, (N, 2): wrong are those whose worse answer has the greater reward; with how much greater it is."""
    import numpy as np

    margins = rewards[:, 0] - rewards[:, 1]
    given = ["chosen" if margin > 0 else "rejected" for margin in margins]
    return Judged(np.arange(len(margins)), ["chosen"] * len(margins), given, abs(margins), margins <= 0)


# Losses of single rows, from log-probabilities of whole answers. `chosen` and `rejected` are (B,), with `ratio` the
# log-probability less that of the model at the start, with `mean` that of a token.


def dpo(ratio: torch.Tensor, beta: float, smoothing: float) -> torch.Tensor:
    """Return the loss of Rafailov et al. 2023 (arXiv 2305.18290, equation 7), (B,).

    With smoothing e that of a pair whose answers are exchanged with a probability of e (conservative DPO).

    Args:
        ratio: (B, 2), of chosen and rejected.
        beta: Strength of the reference.
        smoothing: e.
    """
    from torch.nn.functional import logsigmoid

    margin = beta * (ratio[:, 0] - ratio[:, 1])
    return -(1 - smoothing) * logsigmoid(margin) - smoothing * logsigmoid(-margin)


def ipo(ratio: torch.Tensor, lengths: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the loss of Azar et al. 2023 (arXiv 2310.12036, equation 17) of ratios of a mean token, (B,)."""
    mean = ratio / lengths.clamp(min=1)
    return (mean[:, 0] - mean[:, 1] - 1 / (2 * beta)).square()


def apo(ratio: torch.Tensor, beta: float, *, down: bool) -> torch.Tensor:
    """Return the loss of D'Oosterlinck et al. 2024 (arXiv 2408.06266, equations 7 and, with `down`, 8), (B,)."""
    chosen, rejected = (beta * ratio).unbind(1)
    if down:
        return chosen.sigmoid() + (rejected - chosen).sigmoid()
    return (-chosen).sigmoid() + rejected.sigmoid()


def orpo(mean: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the loss of Hong et al. 2024 (arXiv 2403.07691, equation 6), of the chosen answer and of the odds; (B,).

    Args:
        mean: (B, 2), log-probabilities of a mean token.
        beta: Weight of the odds, the paper's lambda.
    """
    import torch
    from torch.nn.functional import logsigmoid

    # log(p / (1 - p)); a p of 1 has no odds.
    odds = mean - torch.log1p(-mean.exp().clamp(max=1 - 1e-6))
    return -mean[:, 0] - beta * logsigmoid(odds[:, 0] - odds[:, 1])


def simpo(mean: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """Return the loss of Meng et al. 2024 (arXiv 2405.14734, equation 6), with `mean` as for `orpo`, (B,)."""
    from torch.nn.functional import logsigmoid

    return -logsigmoid(beta * (mean[:, 0] - mean[:, 1]) - gamma)


def kto(ratio: torch.Tensor, desired: torch.Tensor, kl: torch.Tensor, beta: float) -> torch.Tensor:
    """Return the loss of Ethayarajh et al. 2024 (arXiv 2402.01306, equation 8) of single answers, (B, S).

    Args:
        ratio: (B, S).
        desired: (B, S) bool.
        kl: The reference point, a scalar that is not negative.
        beta: How sharply gains and losses saturate.
    """
    import torch

    gain = beta * (ratio - kl)
    return 1 - torch.where(desired, gain, -gain).sigmoid()


def divergences(own: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Return the Kullback-Leibler divergence, in nats, of the model from what it was, at each position; (N,).

    Args:
        own: (N, V) logits.
        start: Those of the model at the start.
    """
    mine, before = own.float().log_softmax(-1), start.float().log_softmax(-1)
    return (mine.exp() * (mine - before)).sum(-1)
