"""Special tokens that stand in the text of the data, such as `<|im_end|>`: found, or read as plain text.

A tokenizer reads them as what they are wherever they stand, so that a user's text could end its own turn. To be read as
text they are guarded before the chat template joins them with its own, by a character that no text has (a Unicode
noncharacter) behind their first one; texts with such guards are tokenised by `plain`.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

GUARD = "\ufdd0"
BEGIN, END = "\ufdd1", "\ufdd2"
"""Around the alias of a special token: noncharacters, too."""


def pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Finds the special tokens of a tokenizer; None where it has none."""
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content]
    longest_first = sorted(special, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if special else None


def guarded(value: Any, specials: re.Pattern[str]) -> Any:
    """A copy of a text, or of lists and dicts of texts, with a guard inside each special token."""
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
