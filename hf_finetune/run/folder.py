"""The run folder: its paths, its lock, and `status.json`, which is always true."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

from hf_finetune.errors import CheckpointError, FinetuneError, Problem, PushError, RecipeError, Stopped, StorageError
from hf_finetune.log import say
from hf_finetune.run import continuation, invocation
from hf_finetune.run import status as run_status
from hf_finetune.run.files import discard, sync_file, sync_folder
from hf_finetune.run.store import MANIFEST, Manifest
from hf_finetune.tasks.base import State as State_of_base

State = Literal["running", "done", "failed", "preempted", "interrupted"]
"""Of `status.json`."""


@dataclass(frozen=True)
class Start:
    """The way a run begins in its folder."""

    kind: Literal["new", "resume", "extend", "done"]
    """`extend`: the folder holds results, and a changed recipe is to go on from the state behind them."""
    notes: tuple[str, ...] = ()
    """Changes since the run began that are allowed."""


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
        self.real = Path(os.path.realpath(path))
        """The folder itself, where `path` is a link to it."""
        self.successor = self.real.with_name(f".{self.real.name}.extended")
        """Takes the folder's place when a run is extended; see `extending`."""
        self._held: list[IO[str]] = []

    @property
    def has_checkpoints(self) -> bool:
        """Tell whether there is anything to resume from, whole or not."""
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
            if not self.status.exists():
                message = f"{self.path} holds files that are no run of hf_finetune; name another folder"
                raise RecipeError(Problem(message, key="output"))
        except NotADirectoryError:
            raise StorageError(Problem(f"{self.path} is a file; name a folder", key="output")) from None
        return run_status.read(self.status) or {"state": "failed", "reason": "its status.json is damaged"}

    def condition(self) -> tuple[str, str]:
        """Return the state of the run in this folder, and a reason or nothing.

        The state is that of `status.json`, except `lost` for one that says `running` and isn't (its process let go of
        the lock, or its heart stopped), and `unknown` where nothing can be read.
        """
        status = run_status.read(self.status)
        if status.get("state") == "running" and (_holder(self.lock)[1] or not run_status.is_alive(status)):
            last = status.get("heartbeat")
            return "lost", f"it was killed, or its machine is gone; its last heartbeat was at {last}"
        return status.get("state", "unknown"), str(status.get("reason") or "")

    def look(self, recipe_yaml: str, *, restart: bool, allowed: Sequence[str] = ()) -> Start:
        """Find out how a run would begin here, without leaving a trace.

        Args:
            recipe_yaml: The resolved recipe; empty text where it has mistakes, and then its changes don't count.
            restart: An earlier run would be moved aside.
            allowed: Keys of the recipe that may differ from those of an earlier run.

        Raises:
            CheckpointError: The folder holds a run of a recipe that differs in more than `allowed`.
            RecipeError: The folder is in use, or holds something that is no run.
            StorageError: The folder can't be written.
        """
        self._finish_extension()
        previous = self.previous()
        if previous is not None and (who := _user(self.lock, self.status)) is not None:
            message = f"{self.path} belongs to a run that is going on{who}; stop it, or name another folder"
            raise RecipeError(Problem(message, key="output"))
        start = Start("new")
        if previous is not None and recipe_yaml and not restart and not self._never_trained(previous):
            notes = tuple(self._allowed_changes(recipe_yaml, allowed))
            start = Start("resume", notes)
            if notes and (previous["state"] == "done" or self.adapter.exists()):
                self.last_state(previous)
                start = Start("extend", notes)
            elif previous["state"] == "done":
                start = Start("done")
        if start.kind != "done":
            refuse_unwritable(self.path, "output")
        return start

    def claim(self, recipe_yaml: str, *, restart: bool, allowed: Sequence[str] = ()) -> Start:
        """Take the folder for a run, lock it, and write the resolved recipe; arguments, result and errors like `look`.

        Raises:
            RecipeError: See `look`; another run may also have been faster.
            StorageError: The folder can't be written.
        """
        start = self.look(recipe_yaml, restart=restart, allowed=allowed)
        try:
            previous = self.previous()
            if start.kind == "done":
                if not continuation.is_whole(self._stored_recipe()):
                    write_atomically(self.recipe, recipe_yaml, durable=True)
                return start
            if previous is not None and start.kind == "new" and not self._never_trained(previous):
                self.real.rename(self.free_name())
                self.real.mkdir()  # `path` may be a link to it
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.hold(self.path)
            self._sweep()
            discard(self.successor)
            if start.kind != "extend":  # a finished run stays as it is until nothing can be wrong any more
                write_atomically(self.recipe, recipe_yaml, durable=True)
            sync_folder(self.real.parent)
        except RecipeError:
            raise
        except OSError as error:
            raise StorageError(Problem(f"{self.path} can't be written: {error.strerror}", key="output")) from error
        return start

    def _stored_recipe(self) -> str:
        """`recipe.yaml` of the run that the folder holds; nothing where it can't be read."""
        try:
            return self.recipe.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return ""

    def _allowed_changes(self, recipe_yaml: str, allowed: Sequence[str]) -> list[str]:
        """Return the changes since the run in this folder began that are allowed.

        Raises:
            CheckpointError: Something else changed, or nothing says what the run was.
        """
        from hf_finetune.run import lock as run_lock  # it imports this file

        stored, lock = self._stored_recipe(), None
        if not continuation.is_whole(stored):
            lock = run_lock.find(self.run_lock)
            if lock is None and self._was_made_from(recipe_yaml):
                return []
            if lock is None:
                message = (
                    f"{self.recipe} of the earlier run is missing or damaged, and neither {self.run_lock.name} nor a "
                    f"checkpoint shows that it was this recipe; bring the file back, or give --restart to start anew"
                )
                raise CheckpointError(Problem(message, key="output"))
        return continuation.refuse_changes(stored if lock is None else lock.recipe.whole, recipe_yaml, allowed)

    def _was_made_from(self, recipe_yaml: str) -> bool:
        """Tell whether a checkpoint says that it was made from this very recipe."""
        wanted = hashlib.sha256(recipe_yaml.encode()).hexdigest()
        for file in self.checkpoints.glob(f"checkpoint-*/{MANIFEST}"):
            with suppress(CheckpointError, OSError):
                if Manifest.parse(file.read_bytes()).facts.recipe == wanted:
                    return True
        return False

    def last_state(self, previous: dict[str, Any]) -> Path:
        """The checkpoint behind the results in this folder.

        Args:
            previous: What `previous` returned.

        Raises:
            CheckpointError: It was not kept.
        """
        steps = [int(path.name.partition("-")[2]) for path in self.checkpoints.glob("checkpoint-[0-9]*")]
        step = previous.get("step") if previous["state"] == "done" else max(steps, default=None)
        last = self.checkpoints / f"checkpoint-{step}"
        if not (last / MANIFEST).is_file():
            message = (
                f"{self.path} holds the results of a run whose last state was not kept ({last.name} is not there), so "
                f"that it can't go on; give --restart to train anew (this run is moved aside), or name another folder"
            )
            raise CheckpointError(Problem(message, key="output"))
        return last

    def hold(self, place: Path) -> None:
        """Hold the folder until this process ends, however it ends.

        Args:
            place: Where it is now: `path`, or `successor`, besides, before that takes its place.

        Raises:
            RecipeError: Another run was faster.
        """
        stream = (place / self.lock.name).open("a+", encoding="utf-8")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            message = f"{self.path} was taken by another run at this moment; name another folder"
            raise RecipeError(Problem(message, key="output")) from None
        stream.truncate(0)
        stream.write(f"{os.getpid()} {socket.gethostname()}\n")
        stream.flush()
        self._held.append(stream)

    def _sweep(self) -> None:
        """Remove what a run left that was killed inside of `write_atomically`; `peers` sweeps the marks of ranks."""
        for path in self.path.rglob(".*"):
            if TEMPORARY.fullmatch(path.name) and path.parent.name != RANKS:
                path.unlink(missing_ok=True)

    @contextmanager
    def status_kept(self, status: Status) -> Iterator[None]:
        """Keep status.json true while the body runs, however it ends, and then let go of the folder."""
        if not status.is_silent:
            status.start()
        try:
            yield
        except PushError as error:
            status.finish("done", error.exit_code, str(error))
            raise
        except FinetuneError as error:
            status.finish("failed", error.exit_code, str(error))
            raise
        except Stopped as stopped:
            status.finish(stopped.state, int(stopped.code or 0), stopped.reason)
            say(f"{stopped.reason} at step {status.step}; {self._how_to_resume(status)}")
            raise
        except BaseException as error:
            status.finish("failed", 1, f"{type(error).__name__}: {error}")
            raise
        else:
            status.finish("done", 0)
        finally:
            self.release()

    def _how_to_resume(self, status: Status) -> str:
        """Say what there is to resume from, and the command that does it."""
        command = invocation.resume_command()
        how = "run it again without restart" if command is None else f"run: {command}"
        if status.is_silent:
            return f"the finished run in {self.path} was not touched; to extend it, {how}"
        if status.checkpoint is None:
            return f"no checkpoint was written yet; to start again at step 0, {how}"
        lost = status.step - int(status.checkpoint.rpartition("-")[2])
        unsaved = f" (the last {lost} steps are not in it)" if lost > 0 else ""
        return f"to resume from {self.path / status.checkpoint}{unsaved}, {how}"

    def release(self) -> None:
        """Let go of the folder."""
        while self._held:
            self._held.pop().close()

    def _never_trained(self, previous: dict[str, Any]) -> bool:
        """Tell whether an earlier run ended before its first step, most likely at a mistake that is corrected now."""
        unfinished = previous["state"] != "done" and not previous.get("step")
        return unfinished and not self.metrics.exists() and not any(self.checkpoints.glob("*"))

    def free_name(self) -> Path:
        """Return a name to move an old run to, so that `--restart` and an extension lose nothing."""
        number = 1
        while (target := self.real.with_name(f"{self.real.name}.old-{number}")).exists():
            number += 1
        return target

    def _finish_extension(self) -> None:
        """Do what a process was killed before: see `extending`."""
        status = self.successor / self.status.name
        if status.is_file() and not self.real.exists() and _user(self.successor / self.lock.name, status) is None:
            self.successor.rename(self.real)
            sync_folder(self.real.parent)


def _user(lock: Path, status: Path) -> str | None:
    """Name the user of a run folder at this moment, for a message; None where there is none."""
    holder, is_free_here = _holder(lock)
    if holder is not None:
        return f" (process {holder})"
    # A lock that is free on the host that took it proves that its run ended. Locks of some shared file systems hold on
    # one host only: elsewhere the heartbeat decides. One that is young may be the last of a run that was killed a
    # moment ago, e.g. of a pod that this one replaces: a run that goes on writes the next one while this one waits.
    seen = run_status.read(status)
    end = time.monotonic() + run_status.LOST_SECONDS
    while not is_free_here and run_status.is_alive(latest := run_status.read(status)) and time.monotonic() < end:
        if latest["heartbeat"] != seen.get("heartbeat"):
            return ""
        time.sleep(0.5)
    return None


def _holder(lock: Path) -> tuple[str | None, bool]:
    """Return the holder of a lock, if any, and whether it is free for sure: taken on this host, and let go."""
    host = ""
    try:
        with lock.open(encoding="utf-8") as stream:
            pid, _, host = stream.read().strip().partition(" ")
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return pid, False
    except OSError:
        return None, False  # no such file, or a file system without locks
    return None, host == socket.gethostname()


def refuse_unwritable(folder: Path, key: str) -> None:
    """Make and remove a folder where this one is or will be.

    Args:
        folder: Need not exist.
        key: Of the recipe, to blame.

    Raises:
        StorageError: That fails.
    """
    place = nearest_existing(folder)
    try:
        Path(tempfile.mkdtemp(prefix=".hf_finetune-", dir=place)).rmdir()
    except OSError as error:
        message = f"{folder} can't be written: {place}: {error.strerror}; name another folder"
        raise StorageError(Problem(message, key=key)) from error


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest folder above it that is there."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


RANKS = ".ranks"
"""Folder in a run folder with the ranks' signs of life, which they write before anybody has claimed it."""
TEMPORARY = re.compile(r"\..+\.\d+")
"""Names of what `write_atomically` has not renamed yet: that of the file, and the process."""


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


def _write_somehow(file: Path, text: str, *, durable: bool) -> None:
    """Write atomically; on a full disk into the file's own block, in one call."""
    try:
        write_atomically(file, text, durable=durable)
    except OSError:
        with file.open("r+", encoding="utf-8") as stream:
            stream.write(text)
            stream.truncate()


class Status:
    """Keeps `status.json` true: a heartbeat while the run lives, the outcome when it ends. Rank 0 only.

    Args:
        file: `status.json` of the run folder.
        is_silent: Leave what it says until `start`: a finished run stays finished until its extension begins.
    """

    def __init__(self, file: Path, *, is_silent: bool = False) -> None:
        self.file = file
        self.is_silent = is_silent
        self.step = 0
        self.checkpoint: str | None = None
        """The newest checkpoint that counts, as a path inside the run folder."""
        self._fields: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")

    def start(self) -> None:
        """Say `running` and start the heartbeat; what an earlier run left here to go on from, still counts."""
        self.is_silent = False
        earlier = run_status.read(self.file)
        name = str(earlier.get("checkpoint") or "")
        if name and (self.file.parent / name).is_dir():
            with suppress(KeyError, TypeError, ValueError):
                self.checkpoint, self.step = name, int(earlier["step"])
        self._write("running", exit_code=None, reason=None)
        self._thread.start()

    def at(self, step: int, checkpoint: str | None) -> None:
        """Say at once where the run is, and what it could go on from."""
        self.step, self.checkpoint = step, checkpoint
        self._write(durable=True)

    def finish(self, state: State, exit_code: int, reason: str | None = None) -> None:
        """Stop the heartbeat and say how the run ended; the first word on that is the last."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._write(state, exit_code=exit_code, reason=reason)

    def note(self, step: int, checkpoint: str) -> None:
        """Say `running` once, for a run that is about to go on from a checkpoint."""
        self.step, self.checkpoint = step, checkpoint
        self._write("running", exit_code=None, reason=None)

    def says_running(self) -> bool:
        """Tell whether the file is there and says that the run goes on."""
        return run_status.read(self.file).get("state") == "running"

    def _beat(self) -> None:
        while not self._stop.wait(run_status.HEARTBEAT_SECONDS):
            self._write()

    def _write(
        self,
        state: State | None = None,
        *,
        exit_code: int | None = None,
        reason: str | None = None,
        durable: bool = False,
    ) -> None:
        """Write the file anew; without a state, with the one that was said last. A new state is durable."""
        if self.is_silent:
            return
        with self._lock:
            if state is not None:
                self._fields = {"state": state, "exit_code": exit_code, "reason": reason}
            if not self._fields:
                return
            now = datetime.now(UTC).isoformat(timespec="seconds")
            resumable = self.checkpoint is not None and self._fields["state"] != "done"
            place = {"step": self.step, "resumable": resumable, "checkpoint": self.checkpoint, "heartbeat": now}
            status = {**self._fields, **place}
            # A full or read-only disk must not hide what went wrong; the next checkpoint reports it.
            with suppress(OSError):
                if self.file.parent.is_dir():
                    text = json.dumps(status, indent=2) + "\n"
                    _write_somehow(self.file, text, durable=durable or state is not None)


# `targets.json` in a run folder: what the training data said about the labels, and where the run was started.
#
# With it a finished run is used without its training data: `adapter/` names the labels, this also has the values that
# stand for them in the data.

VERSION = 1


@dataclass(frozen=True)
class Kept:
    """The content of the file."""

    targets: State_of_base
    started_in: Path
    """The working directory of the run, to which relative paths of its recipe belong."""


def to_json(targets: State_of_base) -> dict[str, Any]:
    """Write the targets in a form that JSON keeps."""
    plain = {item.name: getattr(targets, item.name) for item in fields(targets)}
    if not targets.more:
        del plain["more"]  # version 0.1.0 does not know it
    # A list of pairs, as JSON would turn integer keys into text.
    return {**plain, "id_of": [[raw, index] for raw, index in targets.id_of.items()]}


def from_json(stored: dict[str, Any]) -> State_of_base:
    """Read the result of `to_json`.

    Raises:
        TypeError: It is something else.
        ValueError: It is something else.
        KeyError: Something is missing.
    """
    plain = {name: tuple(value) for name, value in stored.items() if name not in ("id_of", "more")}
    return State_of_base(**plain, id_of=dict(stored["id_of"]), more=stored.get("more", {}))


def write(file: Path, targets: State_of_base) -> None:
    """Write the file, whole or not at all.

    Raises:
        StorageError: The disk does not take it.
    """
    stored = {"version": VERSION, "targets": to_json(targets), "started_in": str(Path.cwd())}
    try:
        write_atomically(file, json.dumps(stored, indent=1, ensure_ascii=False) + "\n", durable=True)
    except OSError as error:
        raise StorageError(f"{file} can't be written: {error.strerror or error}") from error


def read_targetsfile(file: Path) -> Kept | None:
    """Read the file; None where there is none.

    Raises:
        CheckpointError: The file is damaged, or of a later version.
    """
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["version"] != VERSION:
            message = f"is of version {stored['version']}, this program knows {VERSION}; use the one that wrote it"
            raise CheckpointError(Problem(message, file=str(file)))
        return Kept(from_json(stored["targets"]), Path(stored["started_in"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"is damaged ({type(error).__name__}); the training command with --restart makes the run anew"
        raise CheckpointError(Problem(message, file=str(file))) from error
