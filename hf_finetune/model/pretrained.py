"""A pretrained model without its weights: where it is, its config and its tokenizer."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from hf_finetune.errors import ModelError, Problem, RecipeError
from hf_finetune.hubreach import HTTP_ERROR
from hf_finetune.schema import modelfolder
from hf_finetune.schema.blocks import Model
from hf_finetune.schema.modelfolder import KEY, resolve
from hf_finetune.tasks.base import Task

PAD_TOKENS = ("<|finetune_right_pad_id|>", "<pad>", "<|pad|>", "[PAD]", "<|padding|>")
"""Tokens that models have for padding and nothing else; some do not declare theirs."""
KERNELS: dict[str, set[str | None]] = {
    "attn_implementation": {None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"},
    "experts_implementation": {None, "eager", "batched_mm", "grouped_mm"},
}
"""Keys of a config.json that choose a kernel -> values that are no code from the Hub; with and without `_` before."""


def read_config(model: Model, options: dict[str, Any] | None = None) -> PreTrainedConfig:
    """The model's config, with options of the task in it.

    Raises:
        ModelError: It can't be had, needs code of its own, or names an attention implementation that is not known.
        RecipeError: `revision` is given for a local folder, which has none.
    """
    place = _place(model)
    with reading(model), silence():
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            place, revision=model.revision, trust_remote_code=False, **(options or {})
        )
        raw, _ = type(config).get_config_dict(place, revision=model.revision)
    problems = [Problem(f"{model.name}: its config.json {what}", key=KEY) for what in _refused(raw)]
    if problems:
        raise ModelError(problems)
    return config


def commit(model: Model) -> str | None:
    """The commit of the Hub that the model's config was read at, as the cache knows it; None for a local folder.

    Configs of transformers 5 no longer say it.
    """
    place = resolve(model.name)
    if Path(place).is_absolute():
        return None
    config = try_to_load_from_cache(place, "config.json", revision=model.revision)
    found = re.search(r"/snapshots/([0-9a-f]{40})/", Path(config).as_posix()) if isinstance(config, str) else None
    return found[1] if found else None


def load_tokenizer(model: Model, options: Mapping[str, Any] | None = None) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token.

    A tokenizer without one gets a token that the vocabulary holds for padding (`PAD_TOKENS`), else its EOS token;
    padding is masked everywhere, so that this changes nothing that is learned.

    Raises:
        ModelError: There is no fast tokenizer, or nothing to pad with.
        RecipeError: See `read_config`.
    """
    place = _place(model)
    with reading(model), silence():
        tokenizer = AutoTokenizer.from_pretrained(
            place, revision=model.revision, trust_remote_code=False, **(options or {})
        )
    if not tokenizer.is_fast:
        raise ModelError(Problem(f"{model.name}: has no fast tokenizer (tokenizer.json); add one to it", key=KEY))
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        pad = next((token for token in PAD_TOKENS if token in vocabulary), tokenizer.eos_token)
        if pad is None:
            raise ModelError(Problem(f"{model.name}: its tokenizer has neither pad nor EOS token; set one", key=KEY))
        tokenizer.pad_token = pad
    return tokenizer


def load_processor(model: Model, task: Task) -> Any:
    """Load what prepares a task's rows: a tokenizer as `load_tokenizer` does, or an image processor and the like.

    Raises:
        ModelError: The model has none that fits.
        RecipeError: See `read_config`.
    """
    if task.auto_processor == "AutoTokenizer":
        return load_tokenizer(model, task.processor_options)
    with reading(model), silence():
        return getattr(transformers, task.auto_processor).from_pretrained(
            _place(model), revision=model.revision, trust_remote_code=False, **task.processor_options
        )


@contextmanager
def reading(model: Model) -> Iterator[None]:
    """Turn what transformers raises about missing or unreadable files into one line."""
    try:
        yield
    except (OSError, ValueError, KeyError, HTTP_ERROR) as error:
        if isinstance(error, ModelError):
            raise
        at = f" at {model.revision}" if model.revision else ""
        reason = " ".join(str(error).split())[:400]
        if "trust_remote_code" in str(error):  # transformers advises to run the code; this project never does
            reason = "it needs code of its own, which is never run here; take a model that transformers has a class for"
        if "couldn't connect" in str(error):
            reason = f"{modelfolder.NEITHER}, and the Hub can't be asked; correct the name, or fill the cache"
        raise ModelError(Problem(f"{model.name}{at} can't be loaded: {reason}", key=KEY)) from error


@contextmanager
def silence() -> Iterator[None]:
    """Keep transformers from printing load reports and progress bars; what they say is checked here."""
    log: Any = transformers.utils.logging
    before, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity(logging.CRITICAL)
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()


def _refused(raw: dict[str, Any]) -> Iterator[str]:
    """Find settings that a config.json must not have: kernels on the Hub, which are code, or quantised weights."""
    for kind, known in KERNELS.items():
        for field in (kind, f"_{kind}", f"_{kind}_internal"):
            value = raw.get(field)
            if not isinstance(value, str | None) or value not in known:
                yield f"sets {field} {value!r}, which may be code from the Hub; remove it there"
    if raw.get("use_kernels") or raw.get("kernel_config"):
        yield "asks for kernels from the Hub, which are code; remove use_kernels and kernel_config there"
    if raw.get("quantization_config"):
        how = raw["quantization_config"].get("quant_method", "some method")
        yield f"says that the weights are quantised ({how}); name the unquantised model and set model.quantization"
    for inner in raw.values():
        if isinstance(inner, dict) and "model_type" in inner:
            yield from _refused(inner)


def _place(model: Model) -> str:
    place = resolve(model.name)
    if model.revision is not None and Path(place).is_absolute():
        reason = f"belongs to a Hub id, and {model.name} is a folder; remove it"
        raise RecipeError(Problem(reason, key="model.revision"))
    return place
