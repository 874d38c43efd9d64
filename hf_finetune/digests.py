"""SHA-256 of files; a large one that did not change is not read again, by no process of this or another run.

What is known stands beside the cache of tokenised data, in `digests/`: one small file for each path. It counts for a
file of the same path, size, inode, and times of the last change of content and of anything else (`st_ctime`, which
nobody can set back). A file that changed a moment ago is not remembered, as it could change again within one tick of
the file system's clock.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SMALL = 1 << 20
"""Bytes below which reading is as fast as looking it up."""
SETTLED_NS = 2_000_000_000
"""Age of the last change from which on a file is remembered: ticks of file systems are as long as two seconds."""
SLOW = 20_000_000
"""Bytes a second at which another process is expected to read, at least; it is not waited for longer."""
POLL_S = 0.1


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
    try:
        with _locked(root / "digests" / hashlib.sha256(before["path"].encode()).hexdigest()[:32], before) as note:
            known = _known(note, before)
            return known if known is not None else _noted(note, file, before)
    except _NoNoteError:
        return _read(file)


class _NoNoteError(Exception):
    """There is no place for notes."""


def _stamp(file: str | Path) -> dict[str, Any]:
    path, state = os.path.abspath(file), Path(file).stat()  # noqa: PTH100  # a link keeps its own name
    times = {"changed": state.st_mtime_ns, "touched": state.st_ctime_ns}
    return {"path": path, "size": state.st_size, "inode": state.st_ino, **times}


def _read(file: str | Path) -> bytes:
    with Path(file).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()


@contextmanager
def _locked(place: Path, stamp: dict[str, Any]) -> Iterator[IO[str]]:
    """The note about a file, which nobody else reads or writes meanwhile.

    Raises:
        _NoNoteError: There can't be one, or another process has held it for too long.
    """
    deadline = time.monotonic() + 60 + stamp["size"] / SLOW
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        note = place.open("a+", encoding="utf-8")
    except OSError as error:
        raise _NoNoteError from error
    with note:
        while True:
            try:
                fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)  # closing lets go of it
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise _NoNoteError from error
                time.sleep(POLL_S)
            except OSError as error:
                raise _NoNoteError from error
        yield note


def _known(note: IO[str], stamp: dict[str, Any]) -> bytes | None:
    """The digest that was noted, if the file is still the same."""
    note.seek(0)
    try:
        told = json.load(note)
        digest = bytes.fromhex(told.pop("sha256"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return digest if told == stamp else None


def _noted(note: IO[str], file: str | Path, stamp: dict[str, Any]) -> bytes:
    """Read the file, and note its digest if it did not change meanwhile or just before."""
    asked, digest = time.time_ns(), _read(file)
    if _stamp(file) == stamp and asked - max(stamp["changed"], stamp["touched"]) > SETTLED_NS:
        try:
            note.truncate(0)
            note.write(json.dumps({**stamp, "sha256": digest.hex()}))
            note.flush()
        except OSError:  # a full disk: a half-written note is none
            return digest
    return digest
