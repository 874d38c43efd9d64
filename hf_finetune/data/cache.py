"""The cache of tokenised data: one folder an entry, complete or absent, shared by ranks, runs and nodes.

An entry holds the encoded splits, the raw rows that are evaluated, the labels, the reports and the facts, so that a
second run and the other ranks need not read the raw data at all. Its place is

    data.cache, else $HF_FINETUNE_CACHE, else $XDG_CACHE_HOME/hf_finetune, else ~/.cache/hf_finetune

and under it `encoded/<key>`. Nothing deletes entries; `rm -r` of an entry, or of the whole folder, is always safe while
no run starts.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import datasets
from pydantic import TypeAdapter

from hf_finetune import device, errors
from hf_finetune.data.facts import Facts
from hf_finetune.data.splits import SplitReport
from hf_finetune.errors import FinetuneError, PeerError, Problem, StorageError
from hf_finetune.run.files import write_atomically
from hf_finetune.tasks.base import State

_FACTS = TypeAdapter(dict[str, Facts])
FORMAT = 7  # raised whenever what an entry holds changes
STARTED = time.time()  # time of the import. Ranks meet before they prepare data, so a failure of this launch is later
POLL_S = 0.5  # seconds between two looks of a rank that waits for an entry


@dataclass(frozen=True)
class Content:
    """The content of an entry, by split."""

    encoded: Mapping[str, datasets.Dataset]
    raw: Mapping[str, datasets.Dataset]  # of the splits that are evaluated
    targets: State
    reports: Mapping[str, SplitReport]
    facts: Mapping[str, Facts] = field(default_factory=dict)


def scratch(folder: Path, prefix: str) -> tempfile.TemporaryDirectory[str]:
    """Return a folder below the cache for what is not finished.

    Raises:
        StorageError: The cache can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(prefix=prefix, dir=folder, ignore_cleanup_errors=True)
    except OSError as error:
        message = f"can't write the cache: {error.strerror}; set data.cache to a folder that can be written"
        raise StorageError(Problem(message, file=str(folder))) from error


class Entry:
    """One set of tokenised data in the cache; its key is the SHA-256 of everything that determines the content."""

    def __init__(self, folder: Path, key: str) -> None:
        self.path = folder / "encoded" / key
        # Ranks of one launch share their parent process, and the launcher counts its restarts. In containers with a
        # common cache, host names and process ids repeat, so the launcher's port and run id count too.
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        launcher = [os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")]
        run = hashlib.sha256(repr(launcher).encode()).hexdigest()[:12]
        launch = f"{socket.gethostname()}-{os.getppid()}-{run}-{restart}"
        self.failure = self.path.parent / f".{key[:16]}-{launch}.failed"
        """Tells the other ranks of this node and launch that building failed, and why."""

    def read(self) -> Content | None:
        """Return the content, mapped from disk; None where the entry is absent or damaged."""
        try:
            meta = json.loads((self.path / "meta.json").read_text("utf-8"))
            if meta["format"] != FORMAT or meta["files"] != _sizes(self.path):
                return None
            return Content(
                encoded={name: datasets.load_from_disk(self.path / "encoded" / name) for name in meta["encoded"]},
                raw={name: datasets.load_from_disk(self.path / "raw" / name) for name in meta["raw"]},
                targets=State.from_json(meta["targets"]),
                reports={name: SplitReport(**report) for name, report in meta["reports"].items()},
                facts=_FACTS.validate_python(meta["facts"]),
            )
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def get(self, build: Callable[[Path], Content], *, builds: bool) -> Content:
        """Return the content; one rank of each node `builds` it where it is absent, the others wait.

        What `build` is given is a folder for its files, which is gone afterwards.

        Raises:
            FinetuneError: What `build` raised, on every rank of the node.
            StorageError: The cache can't be written.
        """
        if not builds:
            return self._wait()
        with suppress(FileNotFoundError, NotADirectoryError):
            self.failure.unlink()
        if (content := self.read()) is not None:
            return content
        try:
            self._build(build)
        except BaseException as error:
            self._note_failure(error)
            raise
        if (content := self.read()) is None:
            raise StorageError(Problem("an entry just written to the cache can't be read back", file=str(self.path)))
        return content

    def _build(self, build: Callable[[Path], Content]) -> None:
        with scratch(self.path.parent, f".{self.path.name[:16]}-") as place:
            work, entry = Path(place, "work"), Path(place, "entry")
            try:
                work.mkdir()
                _write(build(work), entry)
                if self.path.exists() and self.read() is None:
                    # Damaged: truncated or half deleted. Another run may do the same at this moment.
                    shutil.rmtree(self.path, ignore_errors=True)
                try:
                    # Atomic: others see a whole entry, or none.
                    entry.rename(self.path)
                except OSError:
                    if self.read() is None:  # else another run was faster, and its entry stays
                        raise
            except OSError as error:
                if isinstance(error, FinetuneError):
                    raise
                message = f"can't write the cache: {error.strerror or error}; free space or set data.cache"
                raise StorageError(Problem(message, file=str(self.path.parent))) from error

    def _note_failure(self, error: BaseException) -> None:
        problems = [Problem(f"the first rank of this node failed to prepare the data: {error!r}")]
        kind = PeerError.__name__
        if isinstance(error, FinetuneError):
            # The other ranks need the problems alone: of a kind that `errors` knows.
            names = (one.__name__ for one in type(error).__mro__)
            problems, kind = list(error.problems), next(name for name in names if hasattr(errors, name))
        text = json.dumps({"kind": kind, "problems": [asdict(one) for one in problems], "time": time.time()})
        with suppress(OSError):  # a cache that can't be written; the launcher ends the other ranks
            # A waiting rank must never read half of it.
            write_atomically(self.failure, text)

    def _wait(self) -> Content:
        # By polling, not by a collective: tokenising may take longer than a collective's timeout.
        limit = device.wait_timeout().total_seconds()
        deadline = time.monotonic() + limit
        while (content := self.read()) is None:
            with suppress(FileNotFoundError, NotADirectoryError):
                failed = json.loads(self.failure.read_text("utf-8"))
                # An older one is of a launch with the same names, such as the one before in this shell.
                if failed["time"] >= STARTED:
                    raise getattr(errors, failed["kind"])(Problem(**problem) for problem in failed["problems"])
            if time.monotonic() > deadline:
                message = f"the first rank of this node has not prepared the data within {limit / 3600:g} hours"
                raise PeerError(f"{message}; {device.WAIT} sets the limit in seconds")
            time.sleep(POLL_S)
        return content


def _write(content: Content, folder: Path) -> None:
    for kind, splits in (("encoded", content.encoded), ("raw", content.raw)):
        for name, rows in splits.items():
            rows.save_to_disk(folder / kind / name)
    folder.mkdir(exist_ok=True)
    meta = {
        "format": FORMAT,
        "about": "tokenised data of hf_finetune; may be deleted",
        "encoded": list(content.encoded),
        "raw": list(content.raw),
        "targets": content.targets.to_json(),
        "reports": {name: asdict(report) for name, report in content.reports.items()},
        "facts": {name: asdict(facts) for name, facts in content.facts.items()},
        "files": _sizes(folder),
    }
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), "utf-8")


def _sizes(folder: Path) -> dict[str, int]:
    """Return the size of each file of an entry, by its path in it; a cheap way to notice a truncated one."""
    return {
        str(file.relative_to(folder)): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != "meta.json"
    }
