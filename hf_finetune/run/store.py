"""One folder of checkpoints: written so that a kill at any moment leaves the previous one or the new one, whole.

    .staging-20       being written
    checkpoint-20     committed: it counts
    .replaced-20      an older one of the same step, while the new one takes its name; put back after a kill
    .deleted-...      being removed

Every rank makes a `Store` and calls its methods at the same time. On each disk (one where it is shared, one a node
where it is not) one rank stages, seals, commits and rotates: the lowest that sees it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from hf_finetune.errors import CheckpointError, Problem, StorageError
from hf_finetune.run import files as run_files
from hf_finetune.run.files import as_umask_says, discard, sync_folder
from hf_finetune.run.ranks import MARK, Ranks, together, writers

# `MANIFEST.json`: the files of a checkpoint with their hashes, and what it was made from.
#
#     {"checksum": SHA-256 of all that follows, as JSON with sorted keys and no spaces,
#      "facts": {...}, "files": {PATH: {"sha256": HEX, "size": BYTES}}, "format": 1, "step": 20, "world_size": 2}
#
# The checksum finds accidents. It is not a signature: anyone who can write into the folder can forge it, so no name in
# a manifest is trusted to be a path inside the checkpoint before it was checked.

MANIFEST = "MANIFEST.json"
FORMAT = 1
TRAINED = "trained.safetensors"
"""The trained weights, where they are in one piece; sharded training writes others."""


@dataclass(frozen=True)
class Facts:
    """The sources of a checkpoint: a run of anything else must not resume from it."""

    recipe: str
    """Hash of the resolved recipe."""
    data: str
    """Fingerprint of the data."""
    model: str
    """Commit of the base model, or a hash of its files."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of packages, by name."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """Anything else: `adapter`, the commit or files of the one that goes on training; earlier versions wrote others."""


@dataclass(frozen=True)
class Manifest:
    """The description of one checkpoint."""

    step: int
    world_size: int
    """Processes that wrote it."""
    facts: Facts
    sizes: Mapping[str, int]
    """Bytes of each file, by its path relative to the checkpoint, with `/`."""
    hashes: Mapping[str, str]
    """SHA-256 in hex, by the same."""

    def render(self) -> bytes:
        """Write this manifest in its only form as a file."""
        files = {name: {"sha256": self.hashes[name], "size": size} for name, size in self.sizes.items()}
        own = {"step": self.step, "world_size": self.world_size, "facts": asdict(self.facts)}
        content: dict[str, Any] = {"format": FORMAT, **own, "files": files}
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
        checksum = hashlib.sha256(canonical.encode()).hexdigest()
        return json.dumps({"checksum": checksum, **content}, indent=1, sort_keys=True).encode() + b"\n"

    @staticmethod
    def parse(raw: bytes) -> Manifest:
        """Read a manifest.

        Raises:
            CheckpointError: It is damaged, of another format, or names a file outside the checkpoint.
        """
        try:
            content = json.loads(raw)
            if content["format"] != FORMAT:
                raise _unfit(MANIFEST, f"its format is {content['format']!r}, this version reads {FORMAT}")
            sizes = {name: entry["size"] for name, entry in content["files"].items()}
            hashes = {name: entry["sha256"] for name, entry in content["files"].items()}
            manifest = Manifest(content["step"], content["world_size"], Facts(**content["facts"]), sizes, hashes)
            numbers = [manifest.step, manifest.world_size, *sizes.values()]
            # Its own rendering, with its checksum, is the only spelling: a changed space is damage, too.
            is_whole = manifest.render() == raw and all(type(number) is int for number in numbers)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise _unfit(MANIFEST, "it is damaged: no manifest can be read from it") from error
        if not is_whole:
            raise _unfit(MANIFEST, "it is damaged: it does not match its own checksum")
        for name in sizes:
            path = PurePosixPath(name)
            is_plain = str(path) == name and not path.is_absolute() and ".." not in path.parts
            if not is_plain or name in {".", MANIFEST} or "\\" in name or "\0" in name:
                raise _unfit(MANIFEST, f"it names {name!r}, which is not a plain path inside the checkpoint")
        return manifest


def seal(folder: Path, step: int, world_size: int, facts: Facts) -> Manifest:
    """Hash all files below a folder, make them durable, and write the manifest, durable too.

    Raises:
        StorageError: The folder holds something other than plain files, or is still being written.
        OSError: The disk refuses.
    """
    sizes = run_files.listing(folder)
    as_umask_says(folder)
    hashes = run_files.digests(folder, list(sizes), durable=True)
    if run_files.listing(folder) != sizes:
        raise StorageError(Problem(f"{folder}: another process still writes into it"))
    manifest = Manifest(step, world_size, facts, sizes, hashes)
    with (folder / MANIFEST).open("xb") as stream:
        stream.write(manifest.render())
        stream.flush()
        os.fsync(stream.fileno())
    run_files.sync_folders(folder)
    return manifest


def verify(folder: Path) -> Manifest:
    """Check that a checkpoint is whole: its manifest, and the size and hash of each file; no other file may be there.

    Raises:
        CheckpointError: It is not; the message starts with the name of the file that is to blame.
    """
    try:
        if folder.is_symlink():
            raise _unfit("", "it is a symbolic link")
        sizes = run_files.listing(folder)
        if sizes.pop(MANIFEST, None) is None:
            raise _unfit(MANIFEST, "is missing: the checkpoint was never committed")
        manifest = Manifest.parse((folder / MANIFEST).read_bytes())
        if folder.name != f"checkpoint-{manifest.step}":
            raise _unfit(MANIFEST, f"it describes checkpoint-{manifest.step}")
        for name, size in manifest.sizes.items():
            if name not in sizes:
                raise _unfit(name, "is missing")
            if sizes[name] != size:
                raise _unfit(name, f"is damaged: it has {sizes[name]:,} bytes, the manifest says {size:,}")
        for name in sizes:
            if name not in manifest.sizes:
                raise _unfit(name, "is not in the manifest, so nothing vouches for it; move it elsewhere")
        # Last, as it reads every byte.
        hashes = run_files.digests(folder, list(sizes), durable=False)
    except StorageError as error:
        raise CheckpointError(error.problems) from error
    except OSError as error:
        raise _unfit(str(error.filename or folder), f"can't be read: {error.strerror}") from error
    for name, sha256 in manifest.hashes.items():
        if hashes[name] != sha256:
            raise _unfit(name, "is damaged: its SHA-256 is not the manifest's")
    return manifest


def _unfit(file: str, why: str) -> CheckpointError:
    return CheckpointError(Problem(why, file=file))


# A checkpoint is expected to need so many times the bytes of the one before.
GROWTH = 1.2


class Store:
    """A folder of checkpoints.

    Args:
        folder: Made if need be. Whatever a killed run left half-done in it is cleaned up.
        ranks: All of them make a store at the same time.
        keep: Newest checkpoints to keep, 1 or more.
        estimate: Bytes that the first checkpoint may need; 0 where that is unknown. Later ones are measured by it.

    Raises:
        StorageError: The folder can't be made or written, on every rank.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int, estimate: int = 0) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least one checkpoint must be kept")
        self.folder, self.ranks, self.keep = folder, ranks, keep
        self._needed = estimate
        self.skipped: list[tuple[str, str]] = []
        """Checkpoints that `newest` found not to be whole, newest first: name of the folder and reason."""
        self._damaged: set[int] = set()
        self._writers = writers(folder, ranks)
        """By rank, the rank that writes for its disk."""
        self._on_each_disk(self._clean)

    @property
    def is_writer(self) -> bool:
        """Tell whether this rank writes for its disk."""
        return self._writers[self.ranks.rank] == self.ranks.rank

    def path(self, step: int) -> Path:
        """Return the place of the checkpoint of a step, whether it is there or not."""
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints on this rank's disk, whole or not, ascending."""
        named = (re.fullmatch(r"checkpoint-(0|[1-9]\d*)", path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in named if match)

    def write(self, step: int, body: Callable[[Path], None], facts: Facts, protect: Iterable[int] = ()) -> Path:
        """Write a checkpoint; it counts when this returns, and then older ones go.

        Args:
            step: Optimiser steps done; an earlier checkpoint of this step is replaced.
            body: Writes the files of this rank into the folder that it gets; called on every rank.
            facts: For the manifest.
            protect: Steps that rotation spares, such as the best model's.

        Returns:
            The checkpoint's folder.

        Raises:
            StorageError: The disk is full, read-only or gone; on every rank. Earlier checkpoints were not touched.
            PeerError: Another rank died, or failed with an error that is no `FinetuneError`.
        """
        staging = self.folder / f".staging-{step}"
        own_writer = self._writers[self.ranks.rank]

        def fill() -> None:
            with self._reported():
                body(staging)

        def look() -> dict[str, int]:
            with self._reported():
                return run_files.listing(staging) if self.is_writer else {}

        def hidden() -> list[str]:
            # One rank a node looks, and tells only what is missing: hundreds of ranks that ask for the state of every
            # file of all others, and send each other the lists, would keep a shared file system busy for minutes.
            if self.ranks.local_rank != 0:
                return []
            with self._reported():
                return sorted(run_files.names(staging) - written[own_writer].keys())

        try:
            self._on_each_disk(lambda: self._stage(staging))
            together(self.ranks, fill)
            written = together(self.ranks, look)
            unseen = together(self.ranks, hidden)
            self._on_each_disk(lambda: self._seal(staging, step, facts, unseen))
            self._on_each_disk(lambda: self._commit(staging, step))
        except BaseException:
            if self.is_writer:
                with contextlib.suppress(OSError):  # the next start cleans up
                    discard(staging)
            raise
        self._needed = int(sum(written[own_writer].values()) * GROWTH)
        # Not before every disk has committed: there must be one that is whole on all of them at any moment.
        self._on_each_disk(lambda: self._rotate(step, protect))
        return self.path(step)

    def newest(self) -> Manifest | None:
        """Find the newest checkpoint that is whole on every disk; all ranks find the same, and fill `skipped`.

        Returns:
            Its manifest, from this rank's disk (from the writer's, where another rank writes).

        Raises:
            StorageError: The folder can't be read.
        """

        def steps() -> list[int]:
            with self._reported():
                return self.steps() if self.is_writer else []

        def verdict() -> Manifest | str | None:
            if not self.is_writer:
                return None
            if not self.path(step).exists():
                return f"it is missing on the disk of rank {self.ranks.rank}"
            try:
                return verify(self.path(step))
            except CheckpointError as error:
                return str(error)

        self.skipped = []
        for step in sorted(set().union(*together(self.ranks, steps)), reverse=True):
            verdicts = together(self.ranks, verdict)
            reasons = list(dict.fromkeys(verdict for verdict in verdicts if isinstance(verdict, str)))
            read = verdicts[self._writers[self.ranks.rank]]
            if not reasons and isinstance(read, Manifest):
                self._needed = max(self._needed, int(sum(read.sizes.values()) * GROWTH))
                return read
            self._damaged.add(step)
            self.skipped.append((self.path(step).name, "; ".join(reasons)))
        return None

    def resume_point(self) -> Manifest | None:
        """Find the checkpoint to resume from as `newest`; None only where there is no checkpoint at all.

        Raises:
            CheckpointError: There are checkpoints, and none is whole.
            StorageError: The folder can't be read.
        """
        found = self.newest()
        if found is None and self.skipped:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.skipped)
            message = (
                f"{self.folder} holds no checkpoint that is whole ({reasons}); refusing to start from scratch: "
                f"give --restart to move the run aside and do so"
            )
            raise CheckpointError(Problem(message, key="output"))
        return found

    def _reported(self) -> contextlib.AbstractContextManager[None]:
        return run_files.reported(self.folder, self._needed)

    def _on_each_disk(self, action: Callable[[], None]) -> None:
        """Do something once a disk, on all disks or on none."""

        def act() -> None:
            if self.is_writer:
                with self._reported():
                    action()

        together(self.ranks, act)

    def _clean(self) -> None:
        """Finish whatever a killed run left half-done."""
        for path in list(self.folder.iterdir()):
            if path.name.startswith((".staging-", ".deleted-", MARK)):
                discard(path)
            elif match := re.fullmatch(r"\.replaced-(\d+)", path.name):
                final = self.path(int(match[1]))
                if final.exists():
                    discard(path)
                else:
                    path.rename(final)

    def _stage(self, staging: Path) -> None:
        if not self.folder.is_dir():
            raise run_files.failure(self.folder, self._needed, "it was deleted or replaced while the run went on")
        for old in self.folder.glob(".staging-*"):
            discard(old)
        if run_files.free_bytes(self.folder) < self._needed:
            raise run_files.failure(self.folder, self._needed, "there is not enough room")
        staging.mkdir()

    def _seal(self, staging: Path, step: int, facts: Facts, unseen: list[list[str]]) -> None:
        sealed = seal(staging, step, self.ranks.world_size, facts)
        for rank, names in enumerate(unseen):
            # A network file system may show a file to others late: then it would be in no manifest.
            lost = set(names) - sealed.sizes.keys() if self._writers[rank] == self.ranks.rank else ()
            if lost:
                reason = f"{sorted(lost)[0]}, seen by rank {rank}, is not there for rank {self.ranks.rank}"
                raise run_files.failure(self.folder, self._needed, reason)

    def _commit(self, staging: Path, step: int) -> None:
        final, replaced = self.path(step), self.folder / f".replaced-{step}"
        discard(replaced)
        if final.exists() or final.is_symlink():
            final.rename(replaced)
        try:
            staging.rename(final)
        except OSError:
            if replaced.exists():
                replaced.rename(final)
            raise
        sync_folder(self.folder)
        discard(replaced)

    def _rotate(self, step: int, protect: Iterable[int]) -> None:
        self._damaged.discard(step)
        # A newer one is damaged, or training would have resumed from it; it stays until its step is reached again.
        steps = [old for old in self.steps() if old <= step]
        whole = [old for old in steps if old not in self._damaged]
        spared = {*whole[-self.keep :], *protect}
        for old in steps:
            if old not in spared:
                run_files.delete(self.path(old))
