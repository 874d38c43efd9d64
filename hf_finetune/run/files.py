"""Files that survive a power failure, and that have the permissions that the umask gives to a new file."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hf_finetune.errors import FinetuneError, Problem, StorageError
from hf_finetune.run.invocation import same_command


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


def sync_tree(folder: Path) -> None:
    """Make a folder and everything below it durable."""
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            sync_file(path)


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


# Names of what `write_atomically` has not renamed yet: that of the file, and the process.
TEMPORARY = re.compile(r"\..+\.\d+")


def write_atomically(file: Path, content: str | bytes, *, durable: bool = False) -> None:
    """Write a whole file or nothing: a reader never sees half of it. Text is written as UTF-8.

    Args:
        file: Replaced where it is there.
        content: All of it.
        durable: Return only when a power failure can't take it back: for everything that a resume needs.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        if durable:
            sync_file(temporary)
        temporary.replace(file)
        if durable:
            sync_folder(file.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def put_in_place(staging: Path, final: Path) -> None:
    """Make a finished folder durable and rename it into place; an earlier one is moved aside first, then removed."""
    as_umask_says(staging)
    sync_tree(staging)
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


# Files made durable, moved and removed; a refusal by the file system becomes a `StorageError` of one line.

# Files that are hashed and synced at the same time: the disk works while the processor does.
THREADS = 4

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def listing(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file below a folder, by its path relative to it, with `/`.

    Raises:
        StorageError: There is something other than plain files and folders, such as a symbolic link.
        OSError: It can't be read.
    """
    sizes: dict[str, int] = {}
    for path in _below(folder):
        status = path.lstat()
        if stat.S_ISREG(status.st_mode):
            sizes[path.relative_to(folder).as_posix()] = status.st_size
        elif not stat.S_ISDIR(status.st_mode):
            raise StorageError(Problem("is not a plain file", file=f"{folder.name}/{path.relative_to(folder)}"))
    return sizes


def names(folder: Path) -> set[str]:
    """Return the files below a folder, by their paths relative to it; without asking for the state of any.

    Raises:
        OSError: It can't be read.
    """
    walked = os.walk(folder, onerror=_raise)
    return {Path(root, name).relative_to(folder).as_posix() for root, _, files in walked for name in files}


def digests(folder: Path, names: list[str], *, durable: bool) -> dict[str, str]:
    """Return the SHA-256 of files, in hex.

    Args:
        folder: Holds them.
        names: Relative paths.
        durable: Wait until the files are on the disk, too.
    """

    def digest(file: Path) -> str:
        with os.fdopen(os.open(file, os.O_RDONLY | os.O_NOFOLLOW), "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    with ThreadPoolExecutor(THREADS, thread_name_prefix="checkpoint") as pool:
        # Side by side: the page cache is read for the hash while the disk writes it.
        pairs = {
            name: (pool.submit(sync_file, folder / name) if durable else None, pool.submit(digest, folder / name))
            for name in names
        }
        for synced, _ in pairs.values():
            if synced is not None:
                synced.result()
        return {name: hashed.result() for name, (_, hashed) in pairs.items()}


def sync_folders(folder: Path) -> None:
    """Make the names of all files below a folder durable."""
    folders = [path for path in _below(folder) if path.is_dir()]
    for path in [*reversed(folders), folder]:
        sync_folder(path)


def delete(folder: Path) -> None:
    """Remove a checkpoint under another name, so that half of it is never taken for one."""
    doomed = folder.with_name(f".deleted-{folder.name}")
    discard(doomed)
    folder.rename(doomed)
    discard(doomed)


def free_bytes(place: Path) -> int:
    """Return the bytes that this user may still write where a folder is, or was."""
    return shutil.disk_usage(nearest_existing(place)).free


def nearest_existing(path: Path) -> Path:
    """Return the path itself, or the nearest folder above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


@contextlib.contextmanager
def reported(folder: Path, needed: int) -> Iterator[None]:
    """Turn a refusal by the file system into a `StorageError`; other errors pass.

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
    """Say that a checkpoint can't be written, and how many bytes it needs, or has so far where that is unknown."""
    written = 0
    for staging in folder.glob(".staging-*"):
        for root, _, files in os.walk(staging):
            for name in files:
                with contextlib.suppress(OSError):  # another rank is tidying up
                    written += Path(root, name).lstat().st_size
    wanted = f"more than {written:,}" if written > needed or not needed else f"about {needed:,}"
    message = (
        f"{folder} can't take a checkpoint: {reason} (bytes needed: {wanted}, free: {free_bytes(folder):,}); make room "
        f"or repair it, and run {same_command()}; earlier checkpoints were not touched"
    )
    return StorageError(Problem(message, key="output"))


@contextlib.contextmanager
def writing(place: Path, advice: str = "") -> Iterator[None]:
    """Turn a refusal by the file system into a `StorageError` about a file or folder; other errors pass.

    Args:
        place: The file or folder.
        advice: Follows the reason.
    """
    try:
        yield
    except FinetuneError:
        raise
    except Exception as error:
        if (reason := _reason(error)) is not None:
            raise StorageError(Problem(f"can't be written: {reason}{advice}", file=str(place))) from error
        raise


@contextlib.contextmanager
def staged(final: Path) -> Iterator[Path]:
    """Make a folder to write into, which takes its place when the body is through, and is gone if it raises."""
    staging = final.with_name(f".{final.name}.partial")
    try:
        with writing(final):
            discard(staging)
            staging.mkdir(parents=True)
        yield staging
        with writing(final):
            put_in_place(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _reason(error: BaseException) -> str | None:
    """Read off an error what a file system refused; None where it is something else."""
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):
        place = f"{error.filename}: " if error.filename else ""
        return f"{place}{error.strerror or error}"
    # torch, safetensors and torch's checkpoints hide it in texts of their own.
    text = str(error)
    for number in WRITE_ERRORS:
        if os.strerror(number) in text or f"(os error {number})" in text:
            return os.strerror(number)
    if "PytorchStreamWriter" in text or "inline_container" in text:
        return "torch could write only a part of a file"
    return None


def _below(folder: Path) -> Iterator[Path]:
    """Walk everything below a folder, parents first; links are not followed."""
    for root, folders, files in os.walk(folder, onerror=_raise):
        yield from (Path(root, name) for name in sorted([*folders, *files]))


def _raise(error: OSError) -> None:
    raise error


# SHA-256 of files; a large one that did not change is not read again, by no process of this or another run.
#
# What is known stands beside the cache of tokenised data, in `digests/`: one small file for each path.

# Bytes below which reading is as fast as looking it up.
SMALL = 1 << 20
# Age of the last change from which on a file is remembered: ticks of file systems are as long as two seconds.
SETTLED_NS = 2_000_000_000


def sha256(file: str | Path, root: Path) -> bytes:
    """Return the digest of a file; of several processes that ask at once, one reads it, and the others wait.

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
