"""Files that survive a power failure, and that have the permissions that the umask gives to a new file."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from pathlib import Path


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where this user may read it."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network and user-space file systems can't sync a folder; they do so when a file is renamed or closed.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def sync_file(file: Path) -> None:
    """Make the content of a file durable."""
    handle = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def as_umask_says(folder: Path) -> None:
    """Give every file below a folder the permissions that a new file would have there.

    safetensors (0.8, `serialize_file`) writes through a temporary file of mode 0600, and keeps that mode.
    """
    probe = folder / ".permissions"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink() and stat.S_IMODE(path.stat().st_mode) != mode:
            path.chmod(mode)


def put_in_place(staging: Path, final: Path) -> None:
    """Make a finished folder durable and rename it into place; an earlier one is moved aside first, then removed."""
    as_umask_says(staging)
    for path in [*staging.rglob("*"), staging]:
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            sync_file(path)
    old = final.with_name(f".{final.name}.old")
    discard(old)
    if final.exists():
        final.rename(old)
    staging.rename(final)
    sync_folder(final.parent)
    discard(old)


def discard(path: Path) -> None:
    """Remove a folder or file if it is there; a symbolic link itself, never what it means."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)
