"""Texts as tokens, and which of them are trained: the tokenizer's offsets tell which token holds which character."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from hf_finetune.errors import BadRows, ModelError, Problem
from hf_finetune.tasks import _texts
from hf_finetune.tasks._chat import Rendered, Renderer, Span
from hf_finetune.tasks.base import IGNORE, Batch

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

# Token ids and offsets of several texts.
Tokens = tuple[list[list[int]], list[list[Span]]]


class Marked(NamedTuple):
    """A tokenised text."""

    ids: list[int]
    labels: list[int]
    """The same id where the token is trained, else `IGNORE`."""
    splits: bool
    """Whether the prompt alone has other tokens than stand before what is trained, as where one lies across both."""


def mark(renderer: Renderer, rendered: Sequence[Rendered]) -> list[Marked]:
    """Tokenise rendered chats in one call and label the tokens inside their spans.

    The template writes the BOS token itself, so the tokenizer adds none.

    Raises:
        RowsError: Spans that hold text have no token.
    """
    batch = _tokenise(renderer.tokenizer, [text for text, _ in rendered], add_special_tokens=False)
    bad, splits = BadRows(), _splits(renderer, rendered, batch, plain=False)
    marked = []
    for row, (ids, offsets, (_, spans)) in enumerate(zip(*batch, rendered, strict=True)):
        labels = _labels(ids, offsets, spans, renderer.special)
        if spans and all(label == IGNORE for label in labels):
            bad.add(row, "the tokenizer's offsets do not fit the chat: no trained token was found")
        marked.append(Marked(ids, labels, splits[row]))
    bad.raise_any()
    return marked


def mark_plain(renderer: Renderer, rendered: Sequence[Rendered]) -> list[Marked]:
    """Return the same for plain texts: BOS as the tokenizer adds it, but once; EOS at the end, trained.

    Raises:
        ModelError: The tokenizer has no EOS token, so that the model could not learn to stop.
    """
    # A chat template writes its own end; plain text has no other.
    eos = renderer.tokenizer.eos_token_id
    if eos is None:
        message = "the tokenizer has no EOS token to end a text with; name a model that has one"
        raise ModelError(Problem(message, key="model.name"))
    tokens = _tokenise(renderer.tokenizer, [text for text, _ in rendered], add_special_tokens=True)
    rows = [_one_bos(renderer.tokenizer, *row) for row in zip(*tokens, strict=True)]
    splits = _splits(renderer, rendered, ([ids for ids, _ in rows], [offsets for _, offsets in rows]), plain=True)
    return [
        Marked([*ids, eos], [*_labels(ids, offsets, spans, renderer.special), eos], is_split)
        for (ids, offsets), (_, spans), is_split in zip(rows, rendered, splits, strict=True)
    ]


def _splits(renderer: Renderer, rendered: Sequence[Rendered], tokens: Tokens, *, plain: bool) -> list[bool]:
    """`Marked.splits` of each text: whether the prompt alone has other tokens than stand before what is trained.

    Offsets tell where a token lies across, and cost nothing. The prompt is tokenised alone where they don't: where the
    tokenizer leaves white space out of them, and at the end of white space or inside a number, which tokenizers split
    by what follows.
    """
    tokenizer, leaves_out = renderer.tokenizer, _leaves_out_spaces(renderer.tokenizer)
    found, whole = [], list[tuple[int, str]]()
    for row, ((text, spans), ids, offsets) in enumerate(zip(rendered, *tokens, strict=True)):
        is_split = not leaves_out and _is_across(ids, offsets, spans, renderer.special)
        for start, _ in spans:
            if is_split or not start or not (leaves_out or _depends(text, start)):
                continue
            header = renderer.header(text[:start])
            if leaves_out or header is None:
                whole.append((row, text[:start]))
            else:
                begin, end = (bisect_left(offsets, at, key=lambda pair: pair[0]) for at in (start - len(header), start))
                is_split = tuple(ids[begin:end]) != _header_ids(tokenizer, header)
        found.append(is_split)
    asked = prompt_ids(tokenizer, [head for _, head in whole], plain=plain) if whole else []
    for (row, _), ids in zip(whole, asked, strict=True):
        found[row] |= tokens[0][row][: len(ids)] != ids
    return found


def _depends(text: str, start: int) -> bool:
    """Tell whether tokens before a place may depend on what follows, though none lies across it."""
    before, after = text[max(0, start - 2) : start], text[start : start + 1]
    return (len(before) == 2 and before.isspace()) or (before[-1:].isdigit() and after.isdigit())


@lru_cache(maxsize=256)
def _header_ids(tokenizer: PreTrainedTokenizerBase, header: str) -> tuple[int, ...]:
    """Return the tokens of a header that begins with a special token, before which every tokenizer splits."""
    return tuple(_tokenise(tokenizer, [header], add_special_tokens=False)[0][0])


def _is_across(ids: list[int], offsets: list[Span], spans: list[Span], special: frozenset[int]) -> bool:
    for start, _ in spans:
        first = bisect_right(offsets, start, key=lambda pair: pair[1])
        # A special token that swallows white space is the same token without it.
        if start and first < len(ids) and offsets[first][0] < start and ids[first] not in special:
            return True
    return False


@lru_cache(maxsize=8)
def _leaves_out_spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether no offset covers the space between two words, be it a part of a token or of none."""
    offsets: Any = _tokenise(tokenizer, ["a a"], add_special_tokens=False)[1][0]
    return not any(start <= 1 < end for start, end in offsets)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, plain: bool) -> list[list[int]]:
    """Tokens of texts that are to be continued; of plain ones with BOS as the tokenizer adds it, and no EOS."""
    batch = _tokenise(tokenizer, texts, add_special_tokens=plain)
    return [_one_bos(tokenizer, *row)[0] if plain else row[0] for row in zip(*batch, strict=True)]


def _tokenise(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, add_special_tokens: bool) -> Tokens:
    batch: Any = tokenizer(
        texts,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids, offsets = batch["input_ids"], batch["offset_mapping"]
    for row, text in enumerate(texts):
        if _texts.GUARD in text:
            ids[row], offsets[row] = _texts.plain(tokenizer, text, add_special_tokens=add_special_tokens)
    return ids, offsets


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


# Batches of token rows: padded, or several documents packed into one row without attention across documents.
#
# A packed batch has `position_ids` that restart at every document and no `attention_mask`: from that transformers
# (`masking_utils.find_packed_sequence_indices`) makes a causal mask that is block-diagonal, for the attention
# implementations in `PACKED_ATTENTION`. Shapes: B rows, T tokens.

# Attention implementations that packing is offered for. `flash_attention_2` sees documents only in a batch of one
# row, so it is left out.
PACKED_ATTENTION = ("eager", "sdpa")
# Rows are padded to a multiple of this on CUDA, where tensor cores want it.
MULTIPLE_ON_GPU = 8


def padded(features: list[dict[str, Any]], pad: int) -> Batch:
    """Pad rows on the right: `input_ids`, `attention_mask` and `labels`, each (B, T)."""
    width = _width([len(row["input_ids"]) for row in features])
    return {
        "input_ids": _stack([row["input_ids"] for row in features], width, pad),
        "attention_mask": _stack([[1] * len(row["input_ids"]) for row in features], width, 0),
        "labels": _stack([row["labels"] for row in features], width, IGNORE),
    }


def packed(features: list[Any], pad: int) -> Batch:
    """Join the documents of each row: `input_ids`, `position_ids` and `labels`, each (B, T).

    Padding at the end is a document of its own: its tokens see each other, so no row of the attention is empty. The
    first label of each document is `IGNORE`, so that nothing is predicted across documents.
    """
    ids = [[token for document in row for token in document["input_ids"]] for row in features]
    # Else the last token of a document would be asked for the first one of the next.
    labels = [[label for document in row for label in (IGNORE, *document["labels"][1:])] for row in features]
    width = _width([len(row) for row in ids])
    # The padding counts from 0, too, which makes a document of it.
    positions = [
        [position for document in row for position in range(len(document["input_ids"]))]
        + list(range(width - len(tokens)))
        for row, tokens in zip(features, ids, strict=True)
    ]
    return {
        "input_ids": _stack(ids, width, pad),
        "position_ids": _stack(positions, width, 0),
        "labels": _stack(labels, width, IGNORE),
    }


def check_packing(model: torch.nn.Module) -> None:
    """Prove on the model itself that packed documents do not see each other and start at position 0.

    No logit of a document may have a gradient at the embeddings of the one before it. Values can't tell: bitsandbytes'
    int8 rounds a token by what else is in the batch.

    Turns `config.use_cache` off for good: with a cache, transformers does not look for packed documents.

    Args:
        model: A causal LM, with or without its adapter.

    Raises:
        ModelError: Packing would train this model on something else than its rows.
    """
    import torch

    config: Any = model.config
    config.use_cache = False
    vocabulary = config.get_text_config().vocab_size
    first, second = ((torch.arange(length) * step + 1) % vocabulary for length, step in ((7, 7), (9, 3)))
    training = model.training
    model.eval()
    try:
        packed, gradient = _second_logits(model, [first, second])
        alone, _ = _second_logits(model, [second])
    except TypeError as error:
        raise ModelError(f"this model takes no position ids, so rows can't be packed; {_REMEDY} ({error})") from None
    finally:
        model.train(training)
    # Other shapes round otherwise, weights of a few bits most of all.
    is_rounded = any(p.dtype not in {torch.float32, torch.float64} for p in model.parameters())
    tolerance = (0.1 if is_rounded else 1e-3) * alone.abs().max()
    leaks, is_seen = gradient[: len(first)].any(), gradient[len(first) :].any()
    if leaks or not is_seen or not bool(((packed - alone).abs() <= tolerance).all()):
        raise ModelError(f"this model ignores position ids: packed rows would see each other; {_REMEDY}")


_REMEDY = "set data.packing: false"


def _second_logits(model: Any, documents: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (tokens of the last document, V) in float32, and the gradient of their norm at the embeddings (T, H)."""
    import torch

    device = next(model.parameters()).device
    ids = torch.cat(documents)[None].to(device)
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None].to(device)
    embedded: list[torch.Tensor] = []

    def begin_here(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    hook = model.get_input_embeddings().register_forward_hook(begin_here)
    try:
        with torch.enable_grad():
            logits: torch.Tensor = model(input_ids=ids, position_ids=positions).logits
            logits = logits[0, -len(documents[-1]) :].float()
            (gradient,) = torch.autograd.grad(torch.linalg.vector_norm(logits), embedded)
    finally:
        hook.remove()
    return logits.detach(), gradient[0]


def _width(lengths: list[int]) -> int:
    import torch

    # On a CPU it would only be more padding.
    multiple = MULTIPLE_ON_GPU if torch.cuda.is_available() else 1
    return -(-max(lengths) // multiple) * multiple


def _stack(rows: list[list[int]], width: int, fill: int) -> torch.Tensor:
    import torch

    return torch.tensor([row + [fill] * (width - len(row)) for row in rows], dtype=torch.long)
