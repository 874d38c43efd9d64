"""Messages between the service and the process that answers: a question goes in, events come back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_finetune.inference.answering import Reason


@dataclass(frozen=True)
class Question:
    """Rows for a run."""

    run: str
    """The run folder."""
    rows: Sequence[Mapping[str, Any]]
    """Cells by column, of which the answers follow."""
    settings: Mapping[str, Any] | None = None
    """Fields of `answering.Wish`, for generated answers; `max_tokens` may be left to the run."""
    choices: int = 1
    """Answers to each row."""


@dataclass(frozen=True)
class Began:
    """The question fits; answers follow."""

    tokens: int
    """Of all rows together, after cutting."""


@dataclass(frozen=True)
class Piece:
    """The next characters of an answer, and its tokens if log-probabilities are wished for."""

    index: int
    """Of the answer: number of the row x choices + number of the choice."""
    text: str
    logprobs: Sequence[dict[str, Any]] = ()


@dataclass(frozen=True)
class Ended:
    """An answer is whole."""

    index: int
    reason: Reason
    tokens: int


@dataclass(frozen=True)
class Outputs:
    """Labels, numbers or tags of every row, as `predict` gives them."""

    rows: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Done:
    """Everything was said."""


@dataclass(frozen=True)
class Failed:
    """There is no answer, or no more of it."""

    status: int
    """Of HTTP."""
    message: str
    param: str | None = None
    code: str | None = None


@dataclass(frozen=True)
class Declined:
    """Another process must be asked; nothing was said before."""


Event = Began | Piece | Ended | Outputs | Done | Failed | Declined
FINAL = (Done, Failed, Declined)
"""Kinds of events after which no other comes."""


@dataclass
class Heard:
    """Everything that was said to one question."""

    tokens: int = 0
    written: int = 0
    texts: dict[int, str] = field(default_factory=dict)
    logprobs: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    rows: Sequence[dict[str, Any]] = ()
    failed: Failed | None = None

    def hear(self, event: Event) -> None:
        """Take the next event."""
        match event:
            case Began(tokens):
                self.tokens = tokens
            case Piece(index, text, logprobs):
                self.texts[index] = self.texts.get(index, "") + text
                self.logprobs.setdefault(index, []).extend(logprobs)
            case Ended(index, reason, tokens):
                self.reasons[index] = reason
                self.written += tokens
                self.texts.setdefault(index, "")
            case Outputs(rows):
                self.rows = rows
            case Failed():
                self.failed = event
            case Done() | Declined():
                pass

    @property
    def usage(self) -> dict[str, int]:
        """Tokens, as OpenAI counts them."""
        total = self.tokens + self.written
        return {"prompt_tokens": self.tokens, "completion_tokens": self.written, "total_tokens": total}
