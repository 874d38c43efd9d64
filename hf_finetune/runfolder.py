"""The run folder: where everything is, who may write into it, and `status.json`, which is always true."""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

from hf_finetune import continuation
from hf_finetune.errors import CheckpointError, Problem, RecipeError, StorageError

State = Literal["running", "done", "failed", "preempted", "interrupted"]

HEARTBEAT_SECONDS = 5.0


@dataclass(frozen=True)
class Start:
    """What there is to do in a run folder."""

    kind: Literal["new", "resume", "done"]
    notes: tuple[str, ...] = ()
    """What changed since the run began, and is allowed to."""


class RunFolder:
    """Paths inside `output`."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.status = self.path / "status.json"
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.observations = self.path / "observations"
        self.report = self.path / "report.md"
        self.page = self.path / "report.html"
        self.plots = self.path / "plots"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.targets = self.path / "targets.json"
        self.run_lock = self.path / "run.lock.json"
        self.lock = self.path / ".lock"
        self._held: IO[str] | None = None

    @property
    def has_checkpoints(self) -> bool:
        """Whether there is anything to go on from, whole or not."""
        return any(self.checkpoints.glob("checkpoint-*"))

    def previous(self) -> dict[str, Any] | None:
        """`status.json` of the run that this folder holds, or None for a new or empty folder.

        Raises:
            RecipeError: The folder holds something that is no run.
        """
        try:
            if not self.path.exists() or not any(self.path.iterdir()):
                return None
            if not self.status.exists() and self.recipe.exists():
                return {"state": "failed", "reason": "it was killed while it started"}
            status: dict[str, Any] = json.loads(self.status.read_text(encoding="utf-8"))
        except NotADirectoryError:
            raise StorageError(Problem(f"{self.path} is a file; name a folder", key="output")) from None
        except FileNotFoundError:
            message = f"{self.path} holds files that are no run of hf_finetune; name another folder"
            raise RecipeError(Problem(message, key="output")) from None
        except json.JSONDecodeError:
            return {"state": "failed", "reason": "its status.json is damaged"}
        return status

    def look(self, recipe_yaml: str, *, restart: bool, allowed: Sequence[str] = ()) -> Start:
        """What a run would do here, without leaving a trace.

        Args:
            recipe_yaml: The resolved recipe; empty text where it has mistakes, and then its changes don't count.
            restart: An earlier run would be moved aside.
            allowed: Keys of the recipe that may differ from those of an earlier run.

        Raises:
            CheckpointError: The folder holds a run of a recipe that differs in more than `allowed`.
            RecipeError: The folder is in use, or holds something that is no run.
            StorageError: The folder can't be written.
        """
        previous = self.previous()
        if previous is not None and (who := _user(self.lock, previous)) is not None:
            message = f"{self.path} belongs to a run that is going on{who}; stop it, or name another folder"
            raise RecipeError(Problem(message, key="output"))
        start = Start("new")
        if previous is not None and recipe_yaml and not restart and not self._never_trained(previous):
            notes = continuation.refuse_changes(self._stored_recipe(), recipe_yaml, allowed)
            start = Start("done" if previous["state"] == "done" and not notes else "resume", tuple(notes))
        if start.kind != "done":
            self._probe()
        return start

    def claim(self, recipe_yaml: str, *, restart: bool, allowed: Sequence[str] = ()) -> Start:
        """Take the folder for a run, lock it, and write the resolved recipe; arguments, result and errors like `look`.

        Raises:
            RecipeError: See `look`; another run may also have been faster.
            StorageError: The folder can't be written.
        """
        start = self.look(recipe_yaml, restart=restart, allowed=allowed)
        if start.kind == "done":
            return start
        try:
            previous = self.previous()
            if previous is not None and start.kind == "new" and not self._never_trained(previous):
                self._set_aside()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock()
            self._sweep()
            write_atomically(self.recipe, recipe_yaml)
        except RecipeError:
            raise
        except OSError as error:
            raise StorageError(Problem(f"{self.path} can't be written: {error.strerror}", key="output")) from error
        return start

    def _stored_recipe(self) -> str:
        """The resolved recipe of the run that the folder holds.

        Raises:
            CheckpointError: It is not there.
        """
        try:
            return self.recipe.read_text(encoding="utf-8")
        except OSError as error:
            message = f"{self.recipe} of the earlier run can't be read ({error.strerror}); give --restart to start anew"
            raise CheckpointError(Problem(message, key="output")) from error

    def _probe(self) -> None:
        """Make and remove a folder where the run folder is or will be.

        Raises:
            StorageError: That fails.
        """
        place = nearest_existing(self.path)
        try:
            Path(tempfile.mkdtemp(prefix=".hf_finetune-", dir=place)).rmdir()
        except OSError as error:
            message = f"{self.path} can't be written: {place}: {error.strerror}; name another folder"
            raise StorageError(Problem(message, key="output")) from error

    def _lock(self) -> None:
        """Hold the folder until this process ends, however it ends.

        Raises:
            RecipeError: Another run was faster.
        """
        stream = self.lock.open("a+", encoding="utf-8")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            message = f"{self.path} was taken by another run at this moment; name another folder"
            raise RecipeError(Problem(message, key="output")) from None
        stream.truncate(0)
        stream.write(f"{os.getpid()} {socket.gethostname()}\n")
        stream.flush()
        self._held = stream

    def _sweep(self) -> None:
        """Remove what a run left that was killed inside of `write_atomically`; `peers` sweeps the marks of ranks."""
        for path in self.path.rglob(".*"):
            if TEMPORARY.fullmatch(path.name) and path.parent.name != RANKS:
                path.unlink(missing_ok=True)

    def release(self) -> None:
        """Let go of the folder."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def _never_trained(self, previous: dict[str, Any]) -> bool:
        """Whether an earlier run ended before its first step, most likely at a mistake that is mended now."""
        unfinished = previous["state"] != "done" and not previous.get("step")
        return unfinished and not self.metrics.exists() and not any(self.checkpoints.glob("*"))

    def _set_aside(self) -> None:
        """Rename an old run to a free name beside it, so that `--restart` loses nothing."""
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(target)


def _user(lock: Path, status: dict[str, Any]) -> str | None:
    """Who uses a run folder at this moment, for a message; None where nobody does.

    A lock that is free on the host that took it is proof that its run ended; elsewhere the heartbeat decides, for locks
    of some shared file systems hold on one host only.
    """
    try:
        with lock.open(encoding="utf-8") as stream:
            pid, _, host = stream.read().strip().partition(" ")
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return f" (process {pid})"
    except OSError:
        host = ""  # no such file, or a file system without locks
    return "" if host != socket.gethostname() and _is_alive(status) else None


def _is_alive(status: dict[str, Any]) -> bool:
    """Whether the heart of a run beat a moment ago."""
    if status.get("state") != "running" or "heartbeat" not in status:
        return False
    age = datetime.now(UTC) - datetime.fromisoformat(status["heartbeat"])
    return age.total_seconds() < 4 * HEARTBEAT_SECONDS


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


RANKS = ".ranks"
"""Folder in a run folder with the ranks' signs of life, which they write before anybody has claimed it."""
TEMPORARY = re.compile(r"\..+\.\d+")
"""Names of what `write_atomically` has not renamed yet: that of the file, and the process."""


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a whole file or nothing: a reader never sees half of it. Text is written as UTF-8."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _write_somehow(file: Path, text: str) -> None:
    """Write atomically; on a full disk into the file's own block, in one call."""
    try:
        write_atomically(file, text)
    except OSError:
        with file.open("r+", encoding="utf-8") as stream:
            stream.write(text)
            stream.truncate()


class Status:
    """Keeps `status.json` true: a heartbeat while the run lives, the outcome when it ends. Rank 0 only.

    Args:
        file: `status.json` of the run folder.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.step = 0
        self.checkpoint: str | None = None
        """The newest checkpoint that counts, as a path inside the run folder."""
        self._fields: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")

    def start(self) -> None:
        """Say `running` and start the heartbeat; what an earlier run left here to go on from, still counts."""
        with suppress(OSError, ValueError, AttributeError):
            earlier = json.loads(self.file.read_text(encoding="utf-8"))
            name = str(earlier.get("checkpoint") or "")
            if name and (self.file.parent / name).is_dir():
                self.checkpoint, self.step = name, int(earlier["step"])
        self._write("running", exit_code=None, reason=None)
        self._thread.start()

    def at(self, step: int, checkpoint: str | None) -> None:
        """Say at once where the run is, and what it could go on from."""
        self.step, self.checkpoint = step, checkpoint
        self._write()

    def finish(self, state: State, exit_code: int, reason: str | None = None) -> None:
        """Stop the heartbeat and say how the run ended; the first word on that is the last."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._write(state, exit_code=exit_code, reason=reason)

    def says_running(self) -> bool:
        """Whether the file is there and says that the run goes on."""
        with suppress(OSError, ValueError, AttributeError):
            return bool(json.loads(self.file.read_text(encoding="utf-8")).get("state") == "running")
        return False

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            self._write()

    def _write(self, state: State | None = None, *, exit_code: int | None = None, reason: str | None = None) -> None:
        """Write the file anew; without a state, with the one that was said last."""
        with self._lock:
            if state is not None:
                self._fields = {"state": state, "exit_code": exit_code, "reason": reason}
            if not self._fields:
                return
            now = datetime.now(UTC).isoformat(timespec="seconds")
            resumable = self.checkpoint is not None and self._fields["state"] != "done"
            told = {"step": self.step, "resumable": resumable, "checkpoint": self.checkpoint, "heartbeat": now}
            status = {**self._fields, **told}
            # A full or read-only disk must not hide what went wrong; whoever saves says so.
            with suppress(OSError):
                if self.file.parent.is_dir():
                    _write_somehow(self.file, json.dumps(status, indent=2) + "\n")
