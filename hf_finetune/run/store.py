"""One folder of checkpoints: written so that a kill at any moment leaves the previous one or the new one, whole.

    .staging-20       being written
    checkpoint-20     committed: it counts
    .replaced-20      an older one of the same step, while the new one takes its name; put back after a kill
    .deleted-...      on its way out

Every rank makes a `Store` and calls its methods at the same time. On each disk (one where it is shared, one a node
where it is not) one rank stages, seals, commits and rotates: the lowest that sees it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from hf_finetune.errors import CheckpointError, Problem, StorageError
from hf_finetune.run import files as run_files
from hf_finetune.run import ranks as run_ranks
from hf_finetune.run.files import as_umask_says, discard, sync_folder
from hf_finetune.run.ranks import Ranks, together

# `MANIFEST.json`: what a checkpoint holds, what it was made from, and whether all of it is still there.
#
#     {"checksum": SHA-256 of all that follows, as JSON with sorted keys and no spaces,
#      "facts": {...}, "files": {PATH: {"sha256": HEX, "size": BYTES}}, "format": 1, "step": 20, "world_size": 2}
#
# The checksum finds accidents. It is no signature: whoever can write into the folder can forge it, so nothing in a
# manifest is trusted to be a path inside the checkpoint before it was looked at.

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
    sizes = run_files.listing(folder)
    as_umask_says(folder)
    hashes = run_files.digests(folder, list(sizes), durable=True)
    if run_files.listing(folder) != sizes:
        raise StorageError(Problem(f"{folder}: somebody still writes into it"))
    files = {name: File(size, hashes[name]) for name, size in sizes.items()}
    manifest = Manifest(step, world_size, facts, files)
    run_files.write_durably(folder / MANIFEST, manifest.render())
    run_files.sync_folders(folder)
    return manifest


def verify(folder: Path) -> Manifest:
    """Check that a checkpoint is whole: its manifest, and the size and hash of each file; nothing more may be there.

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
        _compare(sizes, manifest.files)
        hashes = run_files.digests(folder, list(manifest.files), durable=False)
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


GROWTH = 1.2
"""A checkpoint is expected to need so much times the bytes of the one before."""

LEFTOVERS = (".staging-", ".deleted-", run_ranks.MARK)


@dataclass(frozen=True)
class Found:
    """The newest whole checkpoint."""

    path: Path | None
    """Its folder, or None where there is none."""
    step: int
    """Its step, or 0."""
    manifest: Manifest | None
    """What this rank's disk says of it (rank 0's, where another rank looks after the disk)."""
    skipped: tuple[tuple[str, str], ...]
    """Newer ones that are not whole, newest first: name of the folder and reason."""


class Store:
    """A folder of checkpoints.

    Args:
        folder: Made if need be. What a killed run left half-done in it is cleaned up.
        ranks: All of them make a store at the same time.
        keep: Newest checkpoints to keep, 1 or more.
        estimate: Bytes that the first checkpoint may need; 0 where nobody knows. Later ones are measured by it.

    Raises:
        StorageError: The folder can't be made or written, on every rank.
    """

    def __init__(self, folder: Path, ranks: Ranks, keep: int, estimate: int = 0) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}: at least one checkpoint must be kept")
        self.folder = folder
        self.ranks = ranks
        self.keep = keep
        self._needed = estimate
        self._damaged: set[int] = set()
        self._leaders = run_ranks.leaders(folder, ranks)
        """By rank, the rank that looks after its disk."""
        self._on_each_disk(self._clean)

    @property
    def is_writer(self) -> bool:
        """Whether this rank looks after its disk."""
        return self._leaders[self.ranks.rank] == self.ranks.rank

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is, or would be."""
        return self.folder / f"checkpoint-{step}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints on this rank's disk, whole or not, ascending."""
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
        try:
            self._on_each_disk(lambda: self._stage(staging))
            together(self.ranks, lambda: self._fill(staging, body))
            written = together(self.ranks, lambda: self._look(staging))
            hidden = together(self.ranks, lambda: self._hidden(staging, written))
            self._on_each_disk(lambda: self._seal(staging, step, facts, hidden))
            self._on_each_disk(lambda: self._commit(staging, step))
        except BaseException:
            if self.is_writer:
                with contextlib.suppress(OSError):  # the next start cleans up
                    discard(staging)
            raise
        self._needed = int(sum(written[self._leaders[self.ranks.rank]].values()) * GROWTH)
        # Not before every disk has committed: what is whole on all of them must never be less than one.
        self._on_each_disk(lambda: self._rotate(step, protect))
        return self.path(step)

    def newest(self) -> Found:
        """The newest checkpoint that is whole on every disk; all ranks find the same.

        Raises:
            StorageError: The folder can't be read.
        """
        with_steps = together(self.ranks, self._reported_steps)
        skipped: list[tuple[str, str]] = []
        for step in sorted(set().union(*with_steps), reverse=True):
            verdicts = together(self.ranks, partial(self._verdict, step))
            reasons = list(dict.fromkeys(verdict for verdict in verdicts if isinstance(verdict, str)))
            read = verdicts[self._leaders[self.ranks.rank]]
            if not reasons and isinstance(read, Manifest):
                self._needed = max(self._needed, int(read.size * GROWTH))
                return Found(self.path(step), step, read, tuple(skipped))
            self._damaged.add(step)
            skipped.append((self.path(step).name, "; ".join(reasons)))
        return Found(None, 0, None, tuple(skipped))

    def resume_point(self) -> Found:
        """The checkpoint to go on from; its path is None only where there is no checkpoint at all.

        Raises:
            CheckpointError: There are checkpoints, and none is whole.
            StorageError: The folder can't be read.
        """
        found = self.newest()
        if found.path is None and found.skipped:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in found.skipped)
            message = (
                f"{self.folder} holds no checkpoint that is whole ({reasons}); refusing to start from scratch: "
                f"give --restart to move the run aside and do so"
            )
            raise CheckpointError(Problem(message, key="output"))
        return found

    def _on_each_disk(self, action: Callable[[], None]) -> None:
        """Do something once a disk, on all disks or on none."""

        def act() -> None:
            if self.is_writer:
                with run_files.reported(self.folder, self._needed):
                    action()

        together(self.ranks, act)

    def _clean(self) -> None:
        """Finish what a killed run left half-done."""
        for path in list(self.folder.iterdir()):
            if path.name.startswith(LEFTOVERS):
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

    def _fill(self, staging: Path, body: Callable[[Path], None]) -> None:
        with run_files.reported(self.folder, self._needed):
            body(staging)

    def _look(self, staging: Path) -> dict[str, int]:
        """What whoever looks after this disk sees, once all have written."""
        if not self.is_writer:
            return {}
        with run_files.reported(self.folder, self._needed):
            return run_files.listing(staging)

    def _hidden(self, staging: Path, written: list[dict[str, int]]) -> list[str]:
        """What is there for this node, but not for the rank that looks after the disk.

        One rank a node looks, and tells only what is missing: hundreds of ranks that ask for the state of every file
        of all others, and send each other the lists, would keep a shared file system busy for minutes.
        """
        if self.ranks.local_rank != 0:
            return []
        with run_files.reported(self.folder, self._needed):
            return sorted(run_files.names(staging) - written[self._leaders[self.ranks.rank]].keys())

    def _seal(self, staging: Path, step: int, facts: Facts, hidden: list[list[str]]) -> None:
        sealed = seal(staging, step, self.ranks.world_size, facts)
        for rank, names in enumerate(hidden):
            # A network file system may show a file to others late: then it would be in no manifest.
            lost = set(names) - sealed.files.keys() if self._leaders[rank] == self.ranks.rank else ()
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
        # A newer one is damaged, or training would have gone on from it; it stays until its step is reached again.
        steps = [old for old in self.steps() if old <= step]
        whole = [old for old in steps if old not in self._damaged]
        spared = {*whole[-self.keep :], *protect}
        for old in steps:
            if old not in spared:
                run_files.delete(self.path(old))

    def _reported_steps(self) -> list[int]:
        if not self.is_writer:
            return []
        with run_files.reported(self.folder, self._needed):
            return self.steps()

    def _verdict(self, step: int) -> Manifest | str | None:
        """What is wrong with a checkpoint on this disk, or its manifest; None where another rank looks after it."""
        if not self.is_writer:
            return None
        if not self.path(step).exists():
            return f"it is missing on the disk of rank {self.ranks.rank}"
        try:
            return verify(self.path(step))
        except CheckpointError as error:
            return str(error)
