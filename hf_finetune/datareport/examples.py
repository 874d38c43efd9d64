"""Training rows as the model sees them: tokens, which of them are trained, the label, the text they stand for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hf_finetune.badrows import numbers
from hf_finetune.batching import PackedRows, Rows, lengths_of
from hf_finetune.data import Stream
from hf_finetune.packs import pack
from hf_finetune.pages.escaping import exact, shortened
from hf_finetune.tasks.base import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_finetune.data import Prepared
    from hf_finetune.recipe import Recipe

HEAD, TAIL = 900, 300
"""Tokens of a row that are shown: the first and the last, where an answer ends."""
FOLD = 150
"""Tokens of a longer row that a page shows before it is unfolded."""
TOKEN_CHARACTERS = 60
TEXT_CHARACTERS = 10_000
SPACE = "▁"
"""What a space of a token is shown as, whatever its tokenizer writes."""
UNDECODED = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Token:
    """One token of an example."""

    text: str
    """What it stands for, harmless, spaces as `SPACE`."""
    id: int
    trained: bool
    """Whether the loss counts its prediction."""
    special: bool
    second: bool
    """Whether it belongs to the second text of a pair."""
    starts: bool
    """Whether a row begins here, of the one or several in the sequence."""
    breaks: bool
    """Whether it ends a line."""


@dataclass(frozen=True)
class Run:
    """Tokens in a row with the same fate."""

    trained: bool
    second: bool
    starts: bool
    """Whether it begins another row that shares the sequence."""
    tokens: list[Token]


@dataclass(frozen=True)
class Example:
    """One training sequence."""

    name: str
    """E.g. `row 3`, from 1 in the split, or the rows that share the sequence."""
    label: str
    """Name of the label, or the number to learn; empty where every token has its own."""
    length: int
    """Tokens."""
    trained: int | None
    """Tokens that the loss counts; None where it counts the row as a whole."""
    head: tuple[Token, ...]
    tail: tuple[Token, ...]
    """The last tokens, where not all are in `head`."""
    text: str
    """The tokens decoded, harmless, shortened to `TEXT_CHARACTERS`."""

    @property
    def parts(self) -> list[list[Run]]:
        """The runs of `head`, and those of `tail` where there is one."""
        return [_runs(tokens, first=index == 0) for index, tokens in enumerate((self.head, self.tail)) if tokens]

    @property
    def folded(self) -> list[list[Run]]:
        """The runs of the first and of the last few tokens of a row longer than `FOLD`."""
        last = (*self.head, *self.tail)[-FOLD // 3 :]
        return [_runs(self.head[: FOLD - FOLD // 3], first=True), _runs(last, first=False)]

    @property
    def left_out(self) -> int:
        """Tokens between `head` and `tail`."""
        return self.length - len(self.head) - len(self.tail)

    @property
    def is_pair(self) -> bool:
        """Whether there is a second text."""
        return any(token.second for token in (*self.head, *self.tail))


def first(recipe: Recipe, prepared: Prepared, tokenizer: PreTrainedTokenizerBase, count: int) -> list[Example]:
    """The first `count` training sequences: rows in their order, packed as for training, or the begin of the stream.

    Raises:
        DataError: A streamed row can't be read.
    """
    reader = _Reader(tokenizer, prepared.targets.names)
    return [reader.example(documents) for documents in itertools.islice(_sequences(recipe, prepared), count)]


def _sequences(recipe: Recipe, prepared: Prepared) -> Iterator[list[dict[str, Any]]]:
    """The encoded rows of each training sequence."""
    if isinstance(prepared.train, Stream):
        for number, row in enumerate(prepared.train.rows(recipe.training.seed)):
            yield [{**row, "row": number}]
        return
    rows = Rows(prepared.train, recipe.task)
    if not recipe.data.packing:
        yield from ([rows[index]] for index in range(len(rows)))
        return
    packed = PackedRows(rows, pack(lengths_of(prepared.train), recipe.data.max_length))
    yield from (packed[index] for index in range(len(packed)))


class _Reader:
    """Reads encoded rows with the tokenizer that made them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.names = names
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self.special = {*tokenizer.all_special_ids, *(id_ for id_, token in added.items() if token.special)}

    def example(self, documents: list[dict[str, Any]]) -> Example:
        """One sequence of one encoded row or several."""
        places = [(row, index) for row in documents for index in range(len(row["input_ids"]))]
        # A language model has a label for each token; names are what a classifier has.
        by_token = not self.names
        shown = len(places) if len(places) <= HEAD + TAIL else HEAD
        ids = [row["input_ids"][index] for row, index in places]
        return Example(
            name=_name(documents),
            label="" if by_token else shortened(self._label(documents[0]["labels"]), TEXT_CHARACTERS),
            length=len(places),
            trained=sum(_trained(row) for row in documents) if by_token else None,
            head=tuple(self._token(row, index, by_token=by_token) for row, index in places[:shown]),
            tail=tuple(self._token(*place, by_token=by_token) for place in places[max(shown, len(places) - TAIL) :]),
            # Each token is a character at least, or nothing.
            text=shortened(exact(str(self.tokenizer.decode(ids[:TEXT_CHARACTERS]))), TEXT_CHARACTERS),
        )

    def _token(self, row: dict[str, Any], index: int, *, by_token: bool) -> Token:
        id_ = row["input_ids"][index]
        spelt = self._text(id_)
        return Token(
            text=shortened(exact(spelt[: 2 * TOKEN_CHARACTERS]), TOKEN_CHARACTERS).replace(" ", SPACE),
            id=id_,
            trained=by_token and _is_trained(row, index),
            special=id_ in self.special,
            second="token_type_ids" in row and row["token_type_ids"][index] == 1,
            starts=index == 0,
            breaks=spelt.endswith("\n"),
        )

    def _text(self, id_: int) -> str:
        """A token's text; its spelling in the vocabulary where it is only a part of a character."""
        spelling: Any = self.tokenizer.convert_ids_to_tokens(id_)
        if spelling is None:
            return f"[token {id_} of no text]"
        if SPACE in spelling:
            return str(spelling)
        decoded = self.tokenizer.convert_tokens_to_string([spelling])
        return str(spelling if not decoded or UNDECODED in decoded else decoded)

    def _label(self, value: Any) -> str:
        """A class, the classes whose cell is 1, or a number."""
        if isinstance(value, list):
            return ", ".join(exact(name) for name, cell in zip(self.names, value, strict=True) if cell) or "no label"
        return f"{value:g}" if isinstance(value, float) else exact(self.names[value])


def _runs(tokens: Sequence[Token], *, first: bool) -> list[Run]:
    """Tokens, cut wherever their fate changes; `first` says that they begin the sequence."""
    runs: list[Run] = []
    for index, token in enumerate(tokens):
        another = token.starts and not (first and index == 0)
        if not runs or another or (runs[-1].trained, runs[-1].second) != (token.trained, token.second):
            runs.append(Run(token.trained, token.second, another, []))
        runs[-1].tokens.append(token)
    return runs


def _trained(row: dict[str, Any]) -> int:
    return sum(label != IGNORE for label in row["labels"][1:])


def _is_trained(row: dict[str, Any], index: int) -> bool:
    """Whether the loss counts a token: nothing predicts the first of a document."""
    return bool(index > 0 and row["labels"][index] != IGNORE)


def _name(documents: list[dict[str, Any]]) -> str:
    rows = [row["row"] + 1 for row in documents]
    return f"row {numbers(rows)}" if len(rows) == 1 else f"rows {numbers(rows)} in one sequence"
