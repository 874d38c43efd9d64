"""`MANIFEST.json`: what a checkpoint holds, what it was made from, and whether all of it is still there.

    {"checksum": SHA-256 of all that follows, as JSON with sorted keys and no spaces,
     "facts": {...}, "files": {PATH: {"sha256": HEX, "size": BYTES}}, "format": 1, "step": 20, "world_size": 2}

The checksum finds accidents. It is no signature: whoever can write into the folder can forge it, so nothing in a
manifest is trusted to be a path inside the checkpoint before it was looked at.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from hf_finetune.checkpoints import disk
from hf_finetune.durable import as_umask_says
from hf_finetune.errors import CheckpointError, Problem, StorageError

MANIFEST = "MANIFEST.json"
FORMAT = 1


@dataclass(frozen=True)
class Facts:
    """What a checkpoint was made from, for whoever resumes: a run of something else must not."""

    recipe: str
    """Hash of the resolved recipe."""
    data: str
    """Fingerprint of the data."""
    model: str
    """Commit of the base model, or a hash of its files."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of packages, by name."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Anything else that JSON can hold."""


@dataclass(frozen=True)
class File:
    """One file of a checkpoint."""

    size: int
    """Bytes."""
    sha256: str
    """In hex."""


@dataclass(frozen=True)
class Manifest:
    """The description of one checkpoint."""

    step: int
    world_size: int
    """Processes that wrote it."""
    facts: Facts
    files: Mapping[str, File]
    """By path relative to the checkpoint, with `/`."""

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files.values())

    def render(self) -> bytes:
        """The one form of this manifest as a file."""
        content = {"format": FORMAT, **asdict(self)}
        return json.dumps({"checksum": _checksum(content), **content}, indent=1, sort_keys=True).encode() + b"\n"

    @staticmethod
    def parse(raw: bytes) -> Manifest:
        """Read a manifest.

        Raises:
            CheckpointError: It is damaged, of another format, or names a file outside the checkpoint.
        """
        try:
            content = json.loads(raw)
            del content["checksum"]
            if content["format"] != FORMAT:
                raise _unfit(MANIFEST, f"its format is {content['format']!r}, this version reads {FORMAT}")
            files = {name: File(**entry) for name, entry in content["files"].items()}
            manifest = Manifest(content["step"], content["world_size"], Facts(**content["facts"]), files)
            numbers = [manifest.step, manifest.world_size, *(file.size for file in files.values())]
            # Its own rendering, with its checksum, is the only spelling: a changed space is damage, too.
            is_whole = manifest.render() == raw and all(type(number) is int for number in numbers)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _unfit(MANIFEST, "it is damaged: no manifest can be read from it") from error
        if not is_whole:
            raise _unfit(MANIFEST, "it is damaged: it does not match its own checksum")
        for name in files:
            if not _is_inside(name):
                raise _unfit(MANIFEST, f"it names {name!r}, which is no plain path inside the checkpoint")
        return manifest


def seal(folder: Path, step: int, world_size: int, facts: Facts) -> Manifest:
    """Hash all files below a folder, make them durable, and write the manifest, durable too.

    Raises:
        StorageError: Something in the folder is no plain file, or is still being written.
        OSError: The disk refuses.
    """
    sizes = disk.listing(folder)
    as_umask_says(folder)
    hashes = disk.digests(folder, list(sizes), durable=True)
    if disk.listing(folder) != sizes:
        raise StorageError(Problem(f"{folder}: somebody still writes into it"))
    files = {name: File(size, hashes[name]) for name, size in sizes.items()}
    manifest = Manifest(step, world_size, facts, files)
    disk.write_durably(folder / MANIFEST, manifest.render())
    disk.sync_folders(folder)
    return manifest


def verify(folder: Path) -> Manifest:
    """Check that a checkpoint is whole: its manifest, and the size and hash of each file; nothing more may be there.

    Raises:
        CheckpointError: It is not; the message starts with the name of the file that is to blame.
    """
    try:
        if folder.is_symlink():
            raise _unfit("", "it is a symbolic link")
        sizes = disk.listing(folder)
        if sizes.pop(MANIFEST, None) is None:
            raise _unfit(MANIFEST, "is missing: the checkpoint was never committed")
        manifest = Manifest.parse((folder / MANIFEST).read_bytes())
        if folder.name != f"checkpoint-{manifest.step}":
            raise _unfit(MANIFEST, f"it describes checkpoint-{manifest.step}")
        _compare(sizes, manifest.files)
        hashes = disk.digests(folder, list(manifest.files), durable=False)
    except StorageError as error:
        raise CheckpointError(error.problems) from error
    except OSError as error:
        raise _unfit(str(error.filename or folder), f"can't be read: {error.strerror}") from error
    for name, file in manifest.files.items():
        if hashes[name] != file.sha256:
            raise _unfit(name, "is damaged: its SHA-256 is not the manifest's")
    return manifest


def _compare(sizes: Mapping[str, int], files: Mapping[str, File]) -> None:
    for name, file in files.items():
        if name not in sizes:
            raise _unfit(name, "is missing")
        if sizes[name] != file.size:
            raise _unfit(name, f"is damaged: it has {sizes[name]:,} bytes, the manifest says {file.size:,}")
    for name in sizes:
        if name not in files:
            raise _unfit(name, "is not in the manifest, so nobody vouches for it; move it elsewhere")


def _unfit(file: str, why: str) -> CheckpointError:
    return CheckpointError(Problem(why, file=file))


def _checksum(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def _is_inside(name: str) -> bool:
    path = PurePosixPath(name)
    is_plain = str(path) == name and not path.is_absolute() and ".." not in path.parts
    return is_plain and name not in {".", MANIFEST} and "\\" not in name and "\0" not in name
