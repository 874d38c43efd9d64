"""Files made durable, moved and removed; what goes wrong with them becomes a `StorageError` of one line."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hf_finetune.durable import discard, sync_file, sync_folder
from hf_finetune.errors import FinetuneError, Problem, StorageError
from hf_finetune.invocation import same_command

THREADS = 4
"""Files that are hashed and synced at the same time: the disk works while the processor does."""

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def listing(folder: Path) -> dict[str, int]:
    """Size in bytes of every file below a folder, by its path relative to it, with `/`.

    Raises:
        StorageError: There is something that is no plain file or folder, such as a symbolic link.
        OSError: It can't be read.
    """
    sizes: dict[str, int] = {}
    for path in _below(folder):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
            sizes[path.relative_to(folder).as_posix()] = status.st_size
        elif not stat.S_ISDIR(status.st_mode):
            raise StorageError(Problem("is no plain file", file=f"{folder.name}/{path.relative_to(folder)}"))
    return sizes


def names(folder: Path) -> set[str]:
    """The files below a folder, by their paths relative to it; without asking for the state of any.

    Raises:
        OSError: It can't be read.
    """
    walked = os.walk(folder, onerror=_raise)
    return {Path(root, name).relative_to(folder).as_posix() for root, _, files in walked for name in files}


def digests(folder: Path, names: list[str], *, durable: bool) -> dict[str, str]:
    """SHA-256 in hex of files.

    Args:
        folder: Where they are.
        names: Relative paths.
        durable: Wait until the files are on the disk, too.
    """
    with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint") as pool:
        # Side by side: the page cache is read for the hash while the disk writes it.
        pairs = {
            name: (pool.submit(sync_file, folder / name) if durable else None, pool.submit(_digest, folder / name))
            for name in names
        }
        for synced, _ in pairs.values():
            if synced is not None:
                synced.result()
        return {name: digest.result() for name, (_, digest) in pairs.items()}


def sync_folders(folder: Path) -> None:
    """Make the names of all files below a folder durable."""
    folders = [path for path in _below(folder) if path.is_dir()]
    for path in [*reversed(folders), folder]:
        sync_folder(path)


def write_durably(file: Path, content: bytes) -> None:
    """Write a new file and wait until it is on the disk."""
    with file.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def delete(folder: Path) -> None:
    """Remove a checkpoint under another name, so that half of it is never taken for one."""
    doomed = folder.with_name(f".deleted-{folder.name}")
    discard(doomed)
    folder.rename(doomed)
    discard(doomed)


def free_bytes(place: Path) -> int:
    """Bytes that this user may still write where a folder is, or was."""
    existing = next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free


@contextlib.contextmanager
def reported(folder: Path, needed: int) -> Iterator[None]:
    """Turn what a file system refuses into a `StorageError`; other errors pass.

    Args:
        folder: The folder of checkpoints, for the message.
        needed: Estimated bytes of a checkpoint, or 0.
    """
    try:
        yield
    except FinetuneError:
        raise
    except BaseException as error:
        reason = _reason(error)
        if reason is not None:
            raise failure(folder, needed, reason) from error
        raise


def failure(folder: Path, needed: int, reason: str) -> StorageError:
    """The sentence for a checkpoint that can't be written; where it was not estimated, with what it has so far."""
    stagings = folder.glob(".staging-*")
    written = sum(_size(Path(root, name)) for path in stagings for root, _, names in os.walk(path) for name in names)
    wanted = f"more than {written:,}" if written > needed or not needed else f"about {needed:,}"
    message = (
        f"{folder} can't take a checkpoint: {reason} (bytes needed: {wanted}, free: {free_bytes(folder):,}); make room "
        f"or mend it, and run {same_command()}; earlier checkpoints were not touched"
    )
    return StorageError(Problem(message, key="output"))


def _reason(error: BaseException) -> str | None:
    """What a file system complained of; torch, safetensors and torch's checkpoints hide it in texts of their own."""
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}"
    text = str(error)
    for number in WRITE_ERRORS:
        if os.strerror(number) in text or f"(os error {number})" in text:
            return os.strerror(number)
    if "PytorchStreamWriter" in text or "inline_container" in text:
        return "torch could write only a part of a file"
    return None


def _below(folder: Path) -> Iterator[Path]:
    """Everything below a folder, parents first; links are not followed."""
    for root, folders, files in os.walk(folder, onerror=_raise):
        yield from (Path(root, name) for name in sorted([*folders, *files]))


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except OSError:  # another rank is tidying up
        return 0


def _raise(error: OSError) -> None:
    raise error


def _digest(file: Path) -> str:
    with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
