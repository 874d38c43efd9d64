"""SHA-256 of files; a large one that did not change is not read again, by no process of this or another run.

What is known stands beside the cache of tokenised data, in `digests/`: one small file for each path.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

SMALL = 1 << 20
"""Bytes below which reading is as fast as looking it up."""
SETTLED_NS = 2_000_000_000
"""Age of the last change from which on a file is remembered: ticks of file systems are as long as two seconds."""


def sha256(file: str | Path, root: Path) -> bytes:
    """The digest of a file; of several processes that ask at the same time one reads it, and the others wait.

    Args:
        file: Its path.
        root: Folder of the cache. Where it can't be written, or has no locks, the file is read.

    Raises:
        OSError: The file can't be read.
    """
    before = _stamp(file)
    if before["size"] < SMALL:
        return _read(file)
    place = root / "digests" / hashlib.sha256(before["path"].encode()).hexdigest()[:32]
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        note = place.open("a+", encoding="utf-8")
    except OSError:
        return _read(file)
    with note:
        try:
            fcntl.flock(note, fcntl.LOCK_EX)  # closing lets go of it
        except OSError:
            return _read(file)
        note.seek(0)
        try:
            known = json.load(note)
            digest = bytes.fromhex(known.pop("sha256"))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            known = None
        if known == before:
            return digest
        asked, digest = time.time_ns(), _read(file)
        # A file that changed a moment ago could change again within one tick of the file system's clock.
        if _stamp(file) == before and asked - max(before["changed"], before["touched"]) > SETTLED_NS:
            try:
                note.truncate(0)
                note.write(json.dumps({**before, "sha256": digest.hex()}))
                note.flush()
            except OSError:  # a full disk: a half-written note is none
                return digest
        return digest


def _stamp(file: str | Path) -> dict[str, Any]:
    path, state = os.path.abspath(file), Path(file).stat()  # noqa: PTH100  # a link keeps its own name
    # Nobody can set back `st_ctime`, the time of the last change of anything about the file.
    times = {"changed": state.st_mtime_ns, "touched": state.st_ctime_ns}
    return {"path": path, "size": state.st_size, "inode": state.st_ino, **times}


def _read(file: str | Path) -> bytes:
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
