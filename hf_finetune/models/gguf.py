"""GGUF files as base models: read once through transformers, and kept as safetensors in the cache.

A GGUF file holds weights, config, tokenizer and chat template of a language model, mostly with weights of 4 to 8 bits.
transformers reads it slowly, and can't save what it has read while its config says that it is quantised. So the
weights are kept in fp32, which is exact, and everything else then sees the folder of an ordinary model.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import json
import struct
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_finetune import log
from hf_finetune.config.paths import KEY, cache_folder
from hf_finetune.errors import ModelError, Problem
from hf_finetune.run.files import discard, free_bytes, put_in_place, sha256, write_atomically

MADE = "gguf.json"
"""Tells of what a folder was made."""
PACKAGE = "gguf"
WIDTH = 4
"""Bytes of a weight in fp32."""


def folder_of(file: Path) -> Path:
    """Return where a file is kept, by its content; the folder need not be there."""
    return cache_folder(None).absolute() / "models" / f"{file.stem}-{_digest(file)[:16]}"


def unpack(file: Path) -> Path:
    """Return the folder of an ordinary model with what a GGUF file holds; made where it is not there yet.

    Of several processes that ask at once, one makes it, and the others wait.

    Raises:
        ModelError: The package `gguf` is not installed; weights are missing, as in the first of several files; or the
            cache can't be written.
        OSError, ValueError: transformers can't read the file.
    """
    folder = folder_of(file)
    if (folder / MADE).exists():
        return folder
    if importlib.util.find_spec(PACKAGE) is None:
        how = "pip install 'hf-finetune[gguf]'"
        raise ModelError(Problem(f"{file.name} needs the package gguf to be read; {how}", key=KEY))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with folder.with_name(f"{folder.name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / MADE).exists():
                with log.phase(f"unpacking {file.name}"):
                    _make(file, folder)
    except OSError as error:
        if error.filename is None or Path(error.filename) == file:
            raise
        reason = f"can't be unpacked into {folder.parent}: {error.strerror}; set HF_FINETUNE_CACHE to another folder"
        raise ModelError(Problem(f"{file.name} {reason}", key=KEY)) from error
    return folder


def _make(file: Path, folder: Path) -> None:
    auto: Any = transformers.AutoModelForCausalLM
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # a bar that transformers' own switch does not stop
            tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
            read, info = auto.from_pretrained(**place, dtype=torch.float32, output_loading_info=True)
    except (struct.error, IndexError, TypeError, UnicodeDecodeError) as error:  # of a file that was cut off
        raise ValueError(f"it is damaged ({error}); copy it again") from error
    if info["missing_keys"]:
        first = min(info["missing_keys"])
        reason = f"lacks {len(info['missing_keys'])} weights, e.g. {first}; a model in several files must be joined"
        raise ModelError(Problem(f"{file.name} {reason}", key=KEY))
    need, free = WIDTH * read.num_parameters(), free_bytes(folder.parent)
    if need > free:
        reason = f"needs {need / 1e9:.1f} GB in {folder.parent}, which has {free / 1e9:.1f} GB left"
        raise ModelError(Problem(f"{file.name} {reason}; free space, or set HF_FINETUNE_CACHE", key=KEY))
    # A model that was read from GGUF refuses to be saved: one that never heard of it takes its weights.
    config = read.config
    del config.quantization_config
    config._name_or_path = ""
    with torch.device("meta"):
        plain = auto.from_config(config)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    staging = folder.with_name(f"{folder.name}.part")
    discard(staging)
    plain.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    write_atomically(staging / MADE, json.dumps({"file": file.name, "sha256": _digest(file)}, indent=1) + "\n")
    put_in_place(staging, folder)


def _digest(file: Path) -> str:
    return sha256(file, cache_folder(None)).hex()
