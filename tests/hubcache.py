"""The caches of huggingface_hub and datasets as a download leaves them, filled without a Hub."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets

MODEL, DATA = "owner/tiny-model", "owner/tiny-data"
FIRST, SECOND = "a1" * 20, "b2" * 20
"""Commits."""


def keep_model(cache: Path, folder: str, commit: str = FIRST, branch: str | None = "main") -> None:
    """Put a model's folder into the cache as `MODEL`: blobs by hash, a snapshot of links, the branch.

    Args:
        cache: `HF_HUB_CACHE`.
        folder: The model.
        commit: Its snapshot.
        branch: That is at this commit.
    """
    place = cache / f"models--{MODEL.replace('/', '--')}"
    snapshot, blobs = place / "snapshots" / commit, place / "blobs"
    for made in (snapshot, blobs, place / "refs"):
        made.mkdir(parents=True, exist_ok=True)
    for file in Path(folder).iterdir():
        blob = blobs / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    if branch is not None:
        (place / "refs" / branch).write_text(commit)


def keep_data(cache: Path, splits: dict[str, Sequence[dict[str, Any]]], commit: str = FIRST) -> None:
    """Put rows into the cache of `datasets` as `DATA`.

    Args:
        cache: `HF_DATASETS_CACHE`.
        splits: Rows by split.
        commit: What they are of.
    """
    work = cache.parent / f"{cache.name}-work-{commit[:4]}"
    work.mkdir(parents=True)
    files = {name: str(work / f"{name}.jsonl") for name in splits}
    for name, rows in splits.items():
        Path(files[name]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    builder = datasets.load_dataset_builder("json", data_files=files, cache_dir=str(work / "built"))
    builder.download_and_prepare()
    name = DATA.partition("/")[2]
    folder = cache / DATA.replace("/", "___") / "default" / "0.0.0" / commit
    folder.parent.mkdir(parents=True, exist_ok=True)
    Path(builder.cache_dir).rename(folder)
    for file in folder.glob("json-*.arrow"):
        file.rename(folder / file.name.replace("json-", f"{name}-"))
    info = folder / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"config_name": "default", "dataset_name": name}))
    shutil.rmtree(work)
