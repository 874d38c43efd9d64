"""Answers that a model generates, and their comparison with references."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from hf_finetune.errors import DataError
from hf_finetune.log import phase
from hf_finetune.tasks._chat import Renderer
from hf_finetune.tasks._templated import Templated
from hf_finetune.tasks.base import Batch, Task, pad_token_of, tokenizer_of

_halted: ContextVar[Callable[[], bool]] = ContextVar("halted", default=lambda: False)

# Prompts that are answered together on one device.
BATCH = 16
# Fields of the generation config of an encoder-decoder that say which tokens an answer may be made of: they hold
# whatever else is asked for. Marian's decoder begins with its pad token, and must not write it.
KEPT = (
    "decoder_start_token_id",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)


@dataclass(frozen=True)
class Generation:
    """The answer to one prompt."""

    text: str
    """Without special tokens."""
    tokens: int
    """New tokens, the end token included."""
    ended: bool
    """Whether the model stopped by itself with the token that ends a turn (without a chat template: EOS)."""


@contextmanager
def until(halted: Callable[[], bool]) -> Iterator[None]:
    """Inside, answers end at the next token once `halted` says so: whoever asked for them no longer wants them."""
    token = _halted.set(halted)
    try:
        yield
    finally:
        _halted.reset(token)


class _Halt(StoppingCriteria):
    """Ends every answer of a batch."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), _halted.get()(), device=input_ids.device, dtype=torch.bool)


def generate(
    model: Any,
    processor: Any,
    prompts: list[Any],
    *,
    max_new_tokens: int,
    batch_size: int,
    task: Task | None = None,
) -> list[Generation]:
    """Continue each prompt, or answer it where the model has an encoder for it, with the likeliest tokens.

    Where the model has no position left for `max_new_tokens`, it writes what fits: a prompt that leaves no room gets
    an empty text that has not ended. Sampling settings that the model ships with are not used.

    Args:
        model: A causal LM or an encoder-decoder, or a PEFT model around one; not wrapped for distribution.
        processor: Its tokenizer, or the processor that has it.
        prompts: Token ids, one list a prompt, none empty; or what `task.asked` makes batches of.
        max_new_tokens: Most tokens of an answer.
        batch_size: Prompts that are continued together.
        task: Says how answers are found and where they end; None takes the likeliest tokens, and the template as it is.

    Returns:
        One `Generation` a prompt, in the order of `prompts`.
    """
    tokenizer: Any = tokenizer_of(processor)
    ends = Ends.of(model, processor, task)
    answers = [Generation("", 0, ended=False)] * len(prompts)
    shown = phase("generating answers", len(prompts), "prompts")
    with greedy(model, processor, task), shown as progress:
        for indices, room in batches([len(prompt) for prompt in prompts], batch_size, max_new_tokens, model):
            some = [prompts[index] for index in indices]
            new = _continue(model, some, room, None if task is None else task.asked(some, processor))
            progress.done += len(indices)
            for index, tokens in zip(indices, new, strict=True):
                answers[index] = _read(tokenizer, tokens, ends)
    return answers


def answer_together(
    model: Any, processor: Any, prompts: list[Any], *, max_new_tokens: int, task: Task | None = None
) -> list[Generation]:
    """`generate` with the prompts shared out among all ranks; every rank must call it and gets all answers."""
    state = PartialState()
    # Every n-th: rows of a file often come sorted, and the ranks should end together.
    numbers = range(state.process_index, len(prompts), state.num_processes)
    mine = [prompts[number] for number in numbers]
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": BATCH, "task": task}
    answers = generate(model, processor, mine, **options)
    gathered = gather_object(list(zip(numbers, answers, strict=True)))
    return [answer for _, answer in sorted(gathered, key=lambda pair: pair[0])]


@dataclass(frozen=True)
class Ends:
    """Tokens that end an answer."""

    all: frozenset[int]
    """Every one, see `end_tokens`."""
    of_turn: int | None
    """The one with which training teaches the model to end an answer."""

    @classmethod
    def of(cls, model: Any, processor: Any, task: Task | None = None) -> Ends:
        """Find those of a model."""
        return cls(frozenset(end_tokens(model, processor, task)), _turn_end(tokenizer_of(processor), task))


def end_tokens(model: Any, processor: Any, task: Task | None = None) -> list[int]:
    """Return every token that ends an answer: EOS, the end of turn of the chat template, and the model's own."""
    tokenizer: Any = tokenizer_of(processor)
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    # Chat models often name their end of turn in the generation config alone.
    ends = {tokenizer.eos_token_id, _turn_end(tokenizer, task), *configured}
    return sorted(end for end in ends if end is not None)


def _turn_end(tokenizer: Any, task: Task | None) -> int | None:
    """Return the token with which training teaches the model to end an answer."""
    token: Any = tokenizer.eos_token
    if tokenizer.chat_template is not None:
        # The variables of a template may decide how it ends a turn.
        token = (task.renderer(tokenizer) if isinstance(task, Templated) else Renderer(tokenizer)).end_of_turn
    end: Any = None if token is None else tokenizer.convert_tokens_to_ids(token)
    return int(end) if end is not None else None


@contextmanager
def greedy(model: Any, processor: Any, task: Task | None = None) -> Iterator[None]:
    """Inside, the model generates the likeliest tokens, in evaluation mode; everything is put back afterwards.

    Sampling settings that the model ships with are not used, but those of `task.decoding`.
    """
    ends, pad = end_tokens(model, processor, task), pad_token_of(processor)
    pad = pad if pad is not None else (ends[0] if ends else 0)
    fields: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True}
    if model.config.is_encoder_decoder:
        fields |= {name: getattr(model.generation_config, name, None) for name in KEPT}
    fields |= {"eos_token_id": ends or None, "pad_token_id": pad, **({} if task is None else task.decoding(processor))}
    config = GenerationConfig(**fields)  # type: ignore[no-untyped-call]
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    modes = [(module, module.training) for module in model.modules()]
    devices = [model.device] if model.device.type == "cuda" else []
    with ExitStack() as stack:
        for holder in (model, inner) if inner is not model else (model,):
            stack.callback(setattr, holder, "generation_config", holder.generation_config)
            holder.generation_config = config
        # Training goes on with the same random numbers, whether answers were generated or not.
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=devices))
        model.eval()
        try:
            yield
        finally:
            # One by one: `model.train()` would also wake what was frozen in evaluation mode.
            for module, training in modes:
                module.training = training


def positions(model: Any) -> int:
    """Return the most tokens of prompt and answer together; models without positions of their own may name no limit."""
    config = model.config.get_text_config()
    # Whisper's decoder has positions of its own.
    return getattr(config, "max_position_embeddings", None) or getattr(config, "max_target_positions", None) or 2**31


def batches(lengths: list[int], batch_size: int, max_new_tokens: int, model: Any) -> Iterator[tuple[list[int], int]]:
    """Yield the indices of prompts of like length, and the tokens that they may add; prompts short of room go alone."""
    limit = positions(model)
    if model.config.is_encoder_decoder:
        # The decoder has positions of its own, of which its start token takes one.
        order = sorted(range(len(lengths)), key=lambda index: lengths[index])
        for start in range(0, len(order), batch_size):
            yield order[start : start + batch_size], min(max_new_tokens, limit - 1)
        return
    # A batch is as wide as its longest prompt: rows of like length pad least.
    order = sorted(range(len(lengths)), key=lambda index: lengths[index])
    roomy = [index for index in order if lengths[index] + max_new_tokens <= limit]
    for start in range(0, len(roomy), batch_size):
        yield roomy[start : start + batch_size], max_new_tokens
    for index in order[len(roomy) :]:
        if lengths[index] < limit:
            yield [index], limit - lengths[index]


def _continue(model: Any, batch: list[Any], room: int, asked: Batch | None) -> list[list[int]]:
    """New tokens of each prompt, padded by whatever stands after the first end token; `asked` is that of `Task`."""
    options: dict[str, Any] = {"max_new_tokens": room, "stopping_criteria": StoppingCriteriaList([_Halt()])}
    output: torch.Tensor
    if asked is None:
        inputs = padded(model, batch)
        before = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        output = model.generate(**inputs, **options)
    else:
        before = asked["decoder_input_ids"].shape[1]
        bare = model.get_base_model() if isinstance(model, PeftModel) else model
        dtype = next(bare.parameters()).dtype
        for name, values in asked.items():
            options[name] = values.to(model.device, dtype if values.is_floating_point() else None)
        # Whisper's own `generate` takes its settings from a config with fields of its own.
        plain: Any = GenerationMixin.generate
        output = plain(bare, **options)
    new: list[list[int]] = output[:, before:].tolist()
    return new


def padded(model: Any, batch: list[list[int]]) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, (B, longest prompt), on the device of the model."""
    width = max(map(len, batch))
    pad = model.generation_config.pad_token_id
    # On the left, as answers go on at the right; an encoder reads its rows as in training.
    left = not model.config.is_encoder_decoder

    def filled(rows: list[list[int]], fill: int) -> torch.Tensor:
        fills = [[fill] * (width - len(row)) for row in rows]
        pairs = zip(fills, rows, strict=True) if left else zip(rows, fills, strict=True)
        return torch.tensor([[*one, *two] for one, two in pairs], device=model.device)

    return {"input_ids": filled(batch, pad), "attention_mask": filled([[1] * len(prompt) for prompt in batch], 0)}


def _read(tokenizer: PreTrainedTokenizerBase, new: list[int], ends: Ends) -> Generation:
    stop = next((position for position, token in enumerate(new) if token in ends.all), None)
    text = str(tokenizer.decode(new[:stop], skip_special_tokens=True))
    if stop is None:
        return Generation(text, len(new), ended=False)
    return Generation(text, stop + 1, ended=new[stop] == ends.of_turn)


def compare(generations: list[Generation], references: list[str], pattern: str | None) -> dict[str, list[float]]:
    """Compare answers with what the data say, one by one; metrics are the means.

    Args:
        generations: What the model wrote.
        references: What the data say, in the same order.
        pattern: Finds the answer in either text: its last match, group 1 where it has groups; null compares the
            whole texts without surrounding white space.

    Returns:
        `exact_match` (1 for equal answers), `ended` (1 where the model stopped with the token that ends a turn),
        `generated_tokens`.

    Raises:
        DataError: The pattern matches nothing in a reference, so that no answer could be right.
    """
    wanted = right_answers(references, pattern)
    given = [extract(generation.text, pattern) for generation in generations]
    return {
        "exact_match": [float(one == two) for one, two in zip(given, wanted, strict=True)],
        "ended": [float(generation.ended) for generation in generations],
        "generated_tokens": [float(generation.tokens) for generation in generations],
    }


def right_answers(references: list[str], pattern: str | None) -> list[str | None]:
    """Return the answer in each reference.

    Raises:
        DataError: The pattern matches nothing in a reference, so that no answer could be right.
    """
    wanted = [extract(reference, pattern) for reference in references]
    if None in wanted:
        row = wanted.index(None)
        raise DataError(f"task.answer_pattern {pattern!r} finds nothing in reference {row}: {references[row][-80:]!r}")
    return wanted


def extract(text: str, pattern: str | None) -> str | None:
    """Return the answer inside a text, without surrounding white space; None where the pattern matches nothing."""
    if pattern is None:
        return text.strip()
    matches = list(re.finditer(pattern, text))
    if not matches:
        return None
    last = matches[-1]
    return (last[1] or "" if last.re.groups else last[0]).strip()
