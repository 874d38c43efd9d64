"""Texts as tokens, and which of them are trained: the tokenizer's offsets tell which token holds which character."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from typing import TYPE_CHECKING

from hf_finetune.badrows import BadRows
from hf_finetune.errors import ModelError, Problem
from hf_finetune.language.chat import Rendered, Renderer, Span
from hf_finetune.tasks import IGNORE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Marked = tuple[list[int], list[int]]
"""Token ids, and labels: the same id where the token is trained, else `IGNORE`."""


def mark(renderer: Renderer, rendered: Sequence[Rendered]) -> list[Marked]:
    """Tokenise rendered chats in one call and label the tokens inside their spans.

    The template writes the BOS token itself, so the tokenizer adds none.

    Raises:
        RowsError: Spans that hold text have no token.
    """
    batch = _tokenise(renderer.tokenizer, [text for text, _ in rendered], add_special_tokens=False)
    marked, bad = [], BadRows()
    for row, (ids, offsets, (_, spans)) in enumerate(zip(*batch, rendered, strict=True)):
        labels = _labels(ids, offsets, spans, renderer.special)
        if spans and all(label == IGNORE for label in labels):
            bad.add(row, "the tokenizer's offsets do not fit the chat: no trained token was found")
        marked.append((ids, labels))
    bad.raise_any()
    return marked


def mark_plain(renderer: Renderer, rendered: Sequence[Rendered]) -> list[Marked]:
    """The same for plain texts: BOS as the tokenizer adds it, but once; EOS at the end, trained.

    Raises:
        ModelError: The tokenizer has no EOS token, so that the model could not learn to stop.
    """
    eos = renderer.tokenizer.eos_token_id
    if eos is None:
        message = "the tokenizer has no EOS token to end a text with; name a model that has one"
        raise ModelError(Problem(message, key="model.name"))
    batch = _tokenise(renderer.tokenizer, [text for text, _ in rendered], add_special_tokens=True)
    marked = []
    for all_ids, all_offsets, (_, spans) in zip(*batch, rendered, strict=True):
        ids, offsets = _one_bos(renderer.tokenizer, all_ids, all_offsets)
        marked.append(([*ids, eos], [*_labels(ids, offsets, spans, renderer.special), eos]))
    return marked


def prompt_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, plain: bool) -> list[list[int]]:
    """Tokens of texts that are to be continued; of plain ones with BOS as the tokenizer adds it, and no EOS."""
    batch = _tokenise(tokenizer, texts, add_special_tokens=plain)
    return [_one_bos(tokenizer, *row)[0] if plain else row[0] for row in zip(*batch, strict=True)]


def _tokenise(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool
) -> tuple[list[list[int]], list[list[Span]]]:
    batch = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return batch["input_ids"], batch["offset_mapping"]


def _labels(ids: list[int], offsets: list[Span], spans: list[Span], special: frozenset[int]) -> list[int]:
    """A token is trained if it holds a character of a span; but not a header that swallows the first white space."""
    labels = [IGNORE] * len(ids)
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    for start, end in spans:
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        if first < last and starts[first] < start and ids[first] in special:
            first += 1
        labels[first:last] = ids[first:last]
    return labels


def _one_bos(tokenizer: PreTrainedTokenizerBase, ids: list[int], offsets: list[Span]) -> tuple[list[int], list[Span]]:
    """Drop a BOS that the text repeats, and the EOS that some tokenizers add (its offset is 0 to 0)."""
    if ids and ids[-1] == tokenizer.eos_token_id and offsets[-1] == (0, 0):
        ids, offsets = ids[:-1], offsets[:-1]
    if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id:
        ids, offsets = ids[1:], offsets[1:]
    return ids, offsets
