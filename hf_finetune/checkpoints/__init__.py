"""Checkpoints that commit: staged, hashed, fsynced, described, renamed into place, and only then they count.

    store     one folder of checkpoints: write, find the newest whole one, rotate
    manifest  MANIFEST.json: what a checkpoint holds, and whether it still does
    disk      files made durable, moved, removed; what goes wrong with them as `StorageError`
    ranks     the processes of a run, and how they act as one
    nodes     which of them looks after which disk

This package knows nothing of what is in a checkpoint: whoever trains writes files into a folder that it is given.
"""

from __future__ import annotations

from hf_finetune.checkpoints.manifest import MANIFEST, Facts, File, Manifest, verify
from hf_finetune.checkpoints.ranks import Alone, Group, Ranks, join, together
from hf_finetune.checkpoints.store import Found, Store

__all__ = [
    "MANIFEST",
    "Alone",
    "Facts",
    "File",
    "Found",
    "Group",
    "Manifest",
    "Ranks",
    "Store",
    "join",
    "together",
    "verify",
]
