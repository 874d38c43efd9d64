"""Tokenises texts, or pairs of texts, for models that read whole rows, and pads the rows to batches."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hf_finetune.errors import BadRows, Problem, RecipeError
from hf_finetune.tasks._proposals import as_list
from hf_finetune.tasks.base import Batch, Features

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SURROGATES = re.compile("[\ud800-\udfff]")


def checked(values: Sequence[Any], column: str) -> list[str]:
    """Return the texts of a column.

    Raises:
        RowsError: Some are null, empty or no text; rows are counted from 0.
    """
    bad = BadRows()
    for row, value in enumerate(values):
        if value is None:
            bad.add(row, f"column {column!r} is null; remove the row or fill it in")
        elif not isinstance(value, str):
            bad.add(row, f"column {column!r} holds {_kind(value)}, not text; write it in quotes or remove it")
        elif not value.strip():
            bad.add(row, f"column {column!r} is empty; remove the row or fill it in")
        elif SURROGATES.search(value):  # tokenizers take only what UTF-8 can write
            bad.add(row, f"column {column!r} holds half a surrogate pair, which is no character; write the text anew")
    bad.raise_any()
    return list(values)


def lists(values: Sequence[Any], column: str, what: str, bad: BadRows) -> list[list[str]]:
    """Return the lists of texts of a column, also where they are JSON text; an empty list where there is none.

    Args:
        values: One a row.
        column: Its name.
        what: What messages call the texts, e.g. `words`.
        bad: Rows without such a list are added to it.
    """
    found = []
    for row, value in enumerate(values):
        read = as_list(value)
        if read is None or not all(isinstance(text, str) for text in read):
            bad.add(row, f'column {column!r} holds no list of {what}; write it as a list of texts, e.g. ["a", "b"]')
            read = []
        found.append(read)
    return found


def _kind(value: Any) -> str:
    """Name the kind of a cell, without the value: the same fault of many rows is told once."""
    kinds = {bool: "true or false", int | float: "a number", list: "a list", dict: "an object"}
    return next((said for kind, said in kinds.items() if isinstance(value, kind)), type(value).__name__)


def tokenize(texts: Sequence[list[str]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Features]:
    """Tokenise rows: whole, to learn their length, and those that are too long again, cut (pairs: longest first).

    Args:
        texts: One column of texts, or two that make pairs.
        tokenizer: The model's.
        max_length: Most tokens of a row, special tokens included.

    Returns:
        One row each, without labels.

    Raises:
        RecipeError: `max_length` leaves no room for text.
    """
    special = tokenizer.num_special_tokens_to_add(pair=len(texts) == 2)
    if max_length < special + len(texts):
        message = f"{max_length} tokens leave no room for text beside {special} special tokens"
        raise RecipeError(Problem(message, key="data.max_length"))
    options = {"padding": False, "return_attention_mask": False, "verbose": False}
    # Reports say how long rows were: a tokenizer that cuts does not tell what it cut off.
    whole = tokenizer(*texts, truncation=False, **options)
    lengths = [len(ids) for ids in whole["input_ids"]]
    long = [row for row, length in enumerate(lengths) if length > max_length]
    if long:
        parts = [[column[row] for row in long] for column in texts]
        cut = tokenizer(*parts, truncation="longest_first", max_length=max_length, **options)
        for name, values in cut.items():
            for row, value in zip(long, values, strict=True):
                whole[name][row] = value
    rows: list[Features] = [
        {"input_ids": ids, "size": len(ids), "whole": length, "weight": 0}
        for ids, length in zip(whole["input_ids"], lengths, strict=True)
    ]
    if "token_type_ids" in whole:
        for encoded, kinds in zip(rows, whole["token_type_ids"], strict=True):
            encoded["token_type_ids"] = kinds
    return rows


def padded(rows: list[Features], tokenizer: Any) -> Batch:
    """Pad to the longest row: `input_ids`, `attention_mask`, perhaps `token_type_ids`, each (B, T)."""
    names = [name for name in ("input_ids", "token_type_ids") if name in rows[0]]
    inputs: dict[str, list[list[int]]] = {name: [row[name] for row in rows] for name in names}
    import torch  # not above: recipes are read without it

    # Tensor cores want multiples of 8; elsewhere it is only more padding. On the right: decoders with absolute
    # positions, such as GPT-2, count from the first column.

    multiple = 8 if torch.cuda.is_available() else None
    return dict(tokenizer.pad(inputs, padding_side="right", pad_to_multiple_of=multiple, return_tensors="pt"))


# Special tokens that stand in the text of the data, such as `<|im_end|>`: found, or read as plain text.
#
# A tokenizer reads them as what they are wherever they stand, so that a user's text could end its own turn. To be
# read as text they are guarded before the chat template joins them with its own, by a character that no text has (a
# Unicode noncharacter) behind their first one; texts with such guards are tokenised by `plain`.

GUARD = "\ufdd0"
# Around the alias of a special token: noncharacters, too.
BEGIN, END = "\ufdd1", "\ufdd2"


def pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Finds the special tokens of a tokenizer; None where it has none."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]
    # Of two tokens that begin alike, the regular expression must try the longer one first.
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if special else None


def guarded(value: Any, specials: re.Pattern[str]) -> Any:
    """Return a copy of a text, or of lists and dicts of texts, with a guard inside each special token."""
    if isinstance(value, str):
        return specials.sub(lambda found: found[0][0] + GUARD + found[0][1:], value)
    if isinstance(value, dict):
        return {key: guarded(inner, specials) for key, inner in value.items()}
    if isinstance(value, list):
        return [guarded(inner, specials) for inner in value]
    return value


def plain(
    tokenizer: PreTrainedTokenizerBase, text: str, *, add_special_tokens: bool
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids and offsets of a text in which guarded special tokens are text, and the others are what they are."""
    backend, ids = _with_aliases(tokenizer)
    written, origin, last = list[str](), list[int](), 0
    specials = pattern(tokenizer)
    for found in specials.finditer(text) if specials is not None else ():
        _copy(text, last, found.start(), written, origin)
        # Every character of the alias comes from the token's first one, but the last: so offsets cover the whole token.
        alias = BEGIN + found[0] + END
        written.append(alias)
        origin += [found.start()] * (len(alias) - 1) + [found.end() - 1]
        last = found.end()
    _copy(text, last, len(text), written, origin)
    encoding = backend.encode("".join(written), add_special_tokens=add_special_tokens)
    offsets = [(origin[start], origin[end - 1] + 1) if end > start else (0, 0) for start, end in encoding.offsets]
    return [ids.get(index, index) for index in encoding.ids], offsets


def _copy(text: str, start: int, end: int, written: list[str], origin: list[int]) -> None:
    """Add a part of a text without its guards, and where each of its characters comes from."""
    kept = [index for index in range(start, end) if text[index] != GUARD]
    written.append("".join(text[index] for index in kept))
    origin += kept


@lru_cache(maxsize=2)
def _with_aliases(tokenizer: PreTrainedTokenizerBase) -> tuple[Tokenizer, dict[int, int]]:
    """A copy of the tokenizer to which special tokens are text, and their aliases what they were; alias -> token id."""
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    special = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    aliases = {index: BEGIN + token.content + END for index, token in special.items()}
    backend.add_tokens(
        [
            AddedToken(aliases[index], lstrip=token.lstrip, rstrip=token.rstrip, normalized=False, special=False)
            for index, token in special.items()
        ]
    )
    backend.encode_special_tokens = True
    known: dict[str, int] = backend.get_vocab()
    return backend, {known[alias]: index for index, alias in aliases.items()}


# Chat templates that print today's date: the date is pinned, so that the same rows give the same tokens on any day.

# The function of transformers that gives a template the date and time.
CLOCK = "strftime_now"
# Directives of strftime.
LETTERS = "aAbBcdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZC"


def reads_clock(processor: Any) -> bool:
    """Tell whether a chat template of a tokenizer, or of what holds one, prints the date."""
    templates = getattr(processor, "chat_template", None) or ""
    return any(CLOCK in text for text in (templates.values() if isinstance(templates, dict) else [templates]))


@lru_cache
def pinned(template: str, day: str) -> str:
    """Return a template for which it is midnight of a day.

    transformers hands `strftime_now` over as a global of Jinja that can't be replaced from outside; a macro of the
    same name comes before it. It replaces every directive in its format by what it stands for.

    Args:
        template: Its source.
        day: As YYYY-MM-DD.
    """
    if CLOCK not in template:
        return template
    then = date.fromisoformat(day)
    filters = ["%%", *(f"%{flag}{letter}" for letter in LETTERS for flag in ("", "-"))]
    stands_for = {directive: then.strftime(directive) for directive in filters}
    replaced = "".join(f" | replace({old!r}, {new!r})" for old, new in stands_for.items() if old != "%%")
    # The line end behind a block is not rendered, so the template begins at the beginning of a line as it did.
    return f"{{%- macro {CLOCK}(format) -%}}{{{{- format{replaced} -}}}}{{%- endmacro %}}\n{template}"
