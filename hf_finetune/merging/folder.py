"""The model folder: what transformers, vLLM and llama.cpp read, staged beside its place and renamed into it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from hf_finetune.adaptation import labelfile
from hf_finetune.checkpoints.disk import free_bytes
from hf_finetune.durable import discard, put_in_place
from hf_finetune.errors import ModelError, Problem, StorageError
from hf_finetune.hardware import DTYPES
from hf_finetune.model.pretrained import silence
from hf_finetune.tasks import _generation as generation
from hf_finetune.terminal import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_finetune.finished import Finished
    from hf_finetune.merging.options import Dtype

MODES = {"do_sample", "num_beams", "use_cache", "return_dict_in_generate", "max_new_tokens", "max_length"}
"""Values of a generation config that decide which others have an effect."""


@contextmanager
def staged(place: str) -> Iterator[Path]:
    """A folder to write into; it takes its place when the body is through, and is gone if it raises.

    Raises:
        StorageError: The disk does not take it.
    """
    final = Path(place)
    staging = final.with_name(f".{final.name}.partial")
    try:
        with reported(final):
            discard(staging)
            staging.mkdir(parents=True)
        yield staging
        with reported(final):
            put_in_place(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """Turn what a file system refuses into one line.

    Raises:
        StorageError: Instead.
    """
    from safetensors import SafetensorError

    try:
        yield
    except StorageError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
        raise StorageError(Problem(f"can't be written: {reason}", file=str(folder))) from error


def check_space(folder: Path, network: PreTrainedModel, dtype: Dtype) -> None:
    """Refuse before anything is written what will not fit.

    Raises:
        StorageError: There is too little room.
    """
    needed = sum(parameter.numel() for parameter in network.parameters()) * DTYPES[dtype].itemsize
    free = free_bytes(folder.parent)
    if free < needed:
        message = f"the weights need {needed:,} bytes, {free:,} are free; make room, or name a folder elsewhere"
        raise StorageError(Problem(message, file=str(folder)))


def write(network: PreTrainedModel, run: Finished, dtype: Dtype, shard_size: str, folder: Path) -> None:
    """Write weights, config, generation config, tokenizer, chat template and labels.

    Args:
        network: Full weights; they are cast in place.
        run: Its tokenizer and labels.
        dtype: Of the weights.
        shard_size: Most bytes of one weight file.
        folder: An empty folder.

    Raises:
        ModelError: A weight is too large for the dtype.
        StorageError: The disk does not take it.
    """
    _cast(network, dtype)
    if run.recipe.task.generates:
        _generation(network, run.tokenizer)
    if getattr(network.config, "use_cache", None) is False:
        network.config.use_cache = True  # off in training only, where it has no use
    with reported(folder), silence():
        network.save_pretrained(folder, max_shard_size=shard_size)
        add_tokenizer(run, folder)


def add_tokenizer(run: Finished, folder: Path) -> None:
    """Write what is not weights: tokenizer, chat template, and the names of labels for programs."""
    run.tokenizer.save_pretrained(folder)
    labelfile.write(folder, run.recipe.task.model_options(run.targets))


def _cast(network: PreTrainedModel, dtype: Dtype) -> None:
    wanted = DTYPES[dtype]
    for name, parameter in network.named_parameters():
        parameter.data = parameter.data.to(wanted)
        if not bool(torch.isfinite(parameter.data).all()):
            raise ModelError(f"{name} holds numbers that {dtype} can't; give --dtype bf16 or fp32")
    network.config.dtype = wanted


def _generation(network: Any, tokenizer: Any) -> None:
    """Stop where training taught the model to stop, whoever generates."""
    config = network.generation_config
    ends = generation.end_tokens(network, tokenizer)
    if ends:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
    if config.pad_token_id is None or config.pad_token_id < 0:
        config.pad_token_id = tokenizer.pad_token_id
    config._from_model_config = False  # else transformers may make it anew from config.json, which knows one end only
    left_out = _without_idle_values(config)
    if left_out:
        say(f"note: {', '.join(left_out)}: left out of generation_config.json, where they have no effect")


def _without_idle_values(config: Any) -> list[str]:
    """Reset what contradicts the rest of a generation config, such as a temperature without sampling.

    Models are published with such values. Reading them is allowed, but transformers (5.23) refuses to write a config
    with them once it was changed. Generation stays as it was; returns the names.
    """
    make: Any = GenerationConfig  # transformers leaves it untyped
    usual, left_out = make(), list[str]()
    while True:
        try:
            config.validate(strict=True)
        except ValueError as error:
            named = re.findall(r"`(\w+)`", str(error))
            idle = [name for name in named if name not in MODES and getattr(config, name, None) is not None]
            idle = [name for name in idle if getattr(config, name) != getattr(usual, name, None)]
            if not idle:
                raise ModelError(
                    f"its generation_config.json is not valid: {' '.join(str(error).split())[:300]}"
                ) from error
            for name in dict.fromkeys(idle):
                setattr(config, name, getattr(usual, name, None))
                left_out.append(name)
        else:
            return left_out
