"""A model's weight files: there, as safetensors, and whole; none of the weights is read."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download

from hf_finetune.errors import ModelError, Problem
from hf_finetune.hubreach import HTTP_ERROR
from hf_finetune.model.pretrained import reading
from hf_finetune.schema.blocks import Model
from hf_finetune.schema.modelfolder import KEY, resolve

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
ENDS = 1 << 20
"""Bytes at each end of a file that are read to tell it from others."""
HEADER = 8
"""Bytes at the start of a safetensors file that tell the length of its JSON header
(https://huggingface.co/docs/safetensors)."""


def check(model: Model) -> None:
    """Look for the weights in a folder, in the Hub's list of files, or in the cache where the Hub can't be reached.

    Raises:
        ModelError: There are none, only pickled ones, or files are missing or truncated.
    """
    place = resolve(model.name)
    folder = Path(place) if Path(place).is_absolute() else None
    if folder is None:
        with reading(model):
            try:
                files = list(HfApi().list_repo_files(place, revision=model.revision))
            except (OSError, HTTP_ERROR):
                snapshot = snapshot_download(place, revision=model.revision, local_files_only=True)
                files = sorted(file.name for file in Path(snapshot).iterdir())
    else:
        files = sorted(file.name for file in folder.iterdir() if file.is_file())
    problem = _missing(files) or (folder is not None and _damaged(folder, files))
    if problem:
        raise ModelError(Problem(f"{model.name} {problem}", key=KEY))


def identity(model: Model, commit: str | None) -> str:
    """Tell one set of weights from another: by the commit on the Hub, else by size and both ends of each local file."""
    folder = Path(resolve(model.name))
    if not folder.is_absolute():
        return f"{model.name} {commit or model.revision}"
    digest = hashlib.sha256()
    for file in sorted(
        path for path in folder.iterdir() if path.suffix == ".safetensors" or path.name == "config.json"
    ):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            digest.update(content.read(ENDS))
            content.seek(max(0, size - ENDS))
            digest.update(content.read(ENDS))
    return digest.hexdigest()


def _missing(files: list[str]) -> str | None:
    if ADAPTER in files:
        # With it, from_pretrained would load the base that *it* names, at another revision.
        return "holds an adapter, not a base model; name its base here, and the adapter's folder as adapter.from"
    if WHOLE in files or INDEX in files:
        return None
    pickled = next((file for file in files if file.endswith(PICKLES)), None)
    if pickled is not None:
        how = "load it where you trust it and save it with save_pretrained"
        return f"has its weights only as {pickled}, a format that can run code; {how}, which writes safetensors"
    return f"has no {WHOLE}; give a model with weights"


def _damaged(folder: Path, files: list[str]) -> str | None:
    """Find a shard that the index names and the folder lacks, or a file that is cut off."""
    shards = [WHOLE]
    if WHOLE not in files:
        try:
            index = json.loads((folder / INDEX).read_text("utf-8"))
            shards = sorted(set(index["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            return f"has a damaged {INDEX}; copy it again"
        absent = [shard for shard in shards if shard not in files]
        if absent:
            return f"lacks {len(absent)} of {len(shards)} weight files, e.g. {absent[0]}; copy it again"
    cut = next((shard for shard in shards if not _is_whole(folder / shard)), None)
    return f"has a truncated or damaged {cut}; copy it again" if cut is not None else None


def _is_whole(file: Path) -> bool:
    """Compare the length of a safetensors file with its header."""
    size = file.stat().st_size
    with file.open("rb") as content:
        length = int.from_bytes(content.read(HEADER), "little")
        if length > size - HEADER:
            return False
        try:
            header = json.loads(content.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return False
    return size == HEADER + length + max(ends, default=0)
