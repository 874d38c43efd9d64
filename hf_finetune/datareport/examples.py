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
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import IGNORE, tokenizer_of

if TYPE_CHECKING:
    from hf_finetune.data import Prepared

HEAD, TAIL = 900, 300  # tokens shown of a row: the first and the last, where an answer ends
FOLD = 150  # tokens of a longer row that a page shows before it is unfolded
TOKEN_CHARACTERS, TEXT_CHARACTERS = 60, 10_000
SPACE = "▁"  # shown for a space within a token, however its tokenizer spells it


@dataclass(frozen=True)
class Token:
    """One token of an example."""

    text: str
    """Harmless, spaces as `SPACE`."""
    id: int
    trained: bool
    """The loss counts its prediction."""
    special: bool
    second: bool
    """It belongs to the second text of a pair."""
    starts: bool
    """A row begins here, of the one or several in the sequence."""
    breaks: bool
    """It ends a line."""


@dataclass(frozen=True)
class Example:
    """One training sequence."""

    name: str
    """E.g. `row 3`, from 1 in the split, or the rows that share the sequence."""
    label: str
    """Of the row; empty where every token has its own."""
    length: int
    trained: int | None
    """Tokens that the loss counts; None where it counts the row as a whole."""
    head: tuple[Token, ...]
    tail: tuple[Token, ...]
    """The last tokens, where not all are in `head`."""
    text: str
    """The tokens decoded, harmless, shortened to `TEXT_CHARACTERS`."""

    @property
    def parts(self) -> list[list[list[Token]]]:
        """The runs of `head`, and those of `tail` where there is one."""
        return [_runs(tokens) for tokens in (self.head, self.tail) if tokens]

    @property
    def folded(self) -> list[list[list[Token]]]:
        """The runs of the first and of the last few tokens of a row longer than `FOLD`."""
        last = (*self.head, *self.tail)[-FOLD // 3 :]
        return [_runs(self.head[: FOLD - FOLD // 3]), _runs(last)]

    @property
    def left_out(self) -> int:
        """Tokens between `head` and `tail`."""
        return self.length - len(self.head) - len(self.tail)

    @property
    def is_pair(self) -> bool:
        """Tell whether there is a second text."""
        return any(token.second for token in (*self.head, *self.tail))


def _runs(tokens: Sequence[Token]) -> list[list[Token]]:
    """Cut tokens wherever they begin another row, or begin or end being trained, or being the second text."""
    runs: list[list[Token]] = []
    for token in tokens:
        last = runs[-1][-1] if runs else None
        if last is None or token.starts or (last.trained, last.second) != (token.trained, token.second):
            runs.append([])
        runs[-1].append(token)
    return runs


def first(recipe: Recipe, prepared: Prepared, processor: Any, count: int) -> list[Example]:
    """Show the first training sequences: rows in their order, packed as for training, or the begin of the stream.

    Raises:
        DataError: A streamed row can't be read.
    """
    tokenizer: Any = tokenizer_of(processor)
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {*getattr(tokenizer, "all_special_ids", ()), *(id_ for id_, token in added.items() if token.special)}
    # Of rows that are not made of tokens only the labels are shown.
    ids, names = recipe.task.token_ids or "", prepared.targets.names
    sequences = itertools.islice(_sequences(recipe, prepared), count)
    return [_example(documents, tokenizer, ids, names, special) for documents in sequences]


def _sequences(recipe: Recipe, prepared: Prepared) -> Iterator[list[dict[str, Any]]]:
    """Yield the encoded rows of each training sequence."""
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


def _example(
    documents: list[dict[str, Any]], tokenizer: Any, name: str, names: Sequence[str], special: set[int]
) -> Example:
    """Show a sequence of one encoded row or several, with the tokenizer that made it."""
    given = documents[0]["labels"]
    by_token = isinstance(given, list) and not isinstance(given[0], float)  # floats are cells of labels
    places = [(row, index) for row in documents for index in range(len(row.get(name, ())))]
    ids = [row[name][index] for row, index in places]
    shown = len(places) if len(places) <= HEAD + TAIL else HEAD

    def token(row: dict[str, Any], index: int) -> Token:
        id_ = row[name][index]
        text = _text(tokenizer, id_)
        return Token(
            text=shortened(exact(text[: 2 * TOKEN_CHARACTERS]), TOKEN_CHARACTERS).replace(" ", SPACE),
            id=id_,
            # Nothing predicts the first token of a document.
            trained=by_token and index > 0 and row["labels"][index] != IGNORE,
            special=id_ in special,
            second="token_type_ids" in row and row["token_type_ids"][index] == 1,
            starts=index == 0,
            breaks=text.endswith("\n"),
        )

    label, trained = "", None
    if by_token:
        trained = sum(value != IGNORE for row in documents for value in row["labels"][1:])
    else:
        label = shortened(_label(given, names), TEXT_CHARACTERS)
    listed = [row["row"] + 1 for row in documents]
    return Example(
        name=f"row {numbers(listed)}" if len(listed) == 1 else f"rows {numbers(listed)} in one sequence",
        label=label,
        length=len(places) or documents[0]["size"],
        trained=trained,
        head=tuple(token(*place) for place in places[:shown]),
        tail=tuple(token(*place) for place in places[max(shown, len(places) - TAIL) :]),
        # Each token is a character at least, or nothing.
        text=shortened(exact(str(tokenizer.decode(ids[:TEXT_CHARACTERS]))), TEXT_CHARACTERS) if ids else "",
    )


def _text(tokenizer: Any, id_: int) -> str:
    """Spell a token; as in the vocabulary where it is only a part of a character."""
    spelling = tokenizer.convert_ids_to_tokens(id_)
    if spelling is None:
        return f"[token {id_} of no text]"
    if SPACE in spelling:
        return str(spelling)
    decoded = tokenizer.convert_tokens_to_string([spelling])
    return str(spelling if not decoded or "\N{REPLACEMENT CHARACTER}" in decoded else decoded)


def _label(value: Any, names: Sequence[str]) -> str:
    """Name a class, the classes whose cell is 1, or a number."""
    if isinstance(value, list):
        return ", ".join(exact(name) for name, cell in zip(names, value, strict=True) if cell) or "no label"
    return f"{value:g}" if isinstance(value, float) else exact(names[value])
