"""The run folder: where everything is, who may write into it, and `status.json`, which is always true."""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Literal

from hf_finetune.errors import Problem, RecipeError, StorageError

State = Literal["running", "done", "failed", "preempted", "interrupted"]

HEARTBEAT_SECONDS = 5.0


class RunFolder:
    """Paths inside `output`."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.status = self.path / "status.json"
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.report = self.path / "report.md"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.lock = self.path / ".lock"
        self._held: IO[str] | None = None

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

    def look(self, recipe_yaml: str, *, restart: bool) -> bool:
        """Whether a run could start here, without leaving a trace.

        Args:
            recipe_yaml: The resolved recipe.
            restart: An earlier run would be moved aside.

        Returns:
            False where the folder holds this very run, finished: there is nothing to do.

        Raises:
            RecipeError: The folder is in use, or holds another or an unfinished run and `restart` was not given.
            StorageError: The folder can't be written.
        """
        previous = self.previous()
        if previous is not None and (pid := _holder(self.lock) or _is_alive(previous)):
            who = f" (process {pid})" if pid is not True else ""
            message = f"{self.path} belongs to a run that is going on{who}; stop it, or name another folder"
            raise RecipeError(Problem(message, key="output"))
        if previous is not None and not restart and not self._never_trained(previous):
            same = self.recipe.is_file() and self.recipe.read_text(encoding="utf-8") == recipe_yaml
            if same and previous["state"] == "done":
                return False
            what = f"an earlier run ({previous['state']})" if same else "a run of another recipe"
            message = (
                f"{self.path} holds {what}; give --restart to move it aside and start anew, or name another folder"
            )
            raise RecipeError(Problem(message, key="output"))
        self._probe()
        return True

    def claim(self, recipe_yaml: str, *, restart: bool) -> bool:
        """Take the folder for a run, lock it, and write the resolved recipe; arguments and result like `look`.

        Raises:
            RecipeError: See `look`; another run may also have been faster.
            StorageError: The folder can't be written.
        """
        if not self.look(recipe_yaml, restart=restart):
            return False
        try:
            previous = self.previous()
            if previous is not None and not self._never_trained(previous):
                self._set_aside()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self._lock()
            write_atomically(self.recipe, recipe_yaml)
        except RecipeError:
            raise
        except OSError as error:
            raise StorageError(Problem(f"{self.path} can't be written: {error.strerror}", key="output")) from error
        return True

    def _never_trained(self, previous: dict[str, Any]) -> bool:
        """Whether an earlier run ended before its first step, most likely at a mistake that is mended now."""
        unfinished = previous["state"] != "done" and not previous.get("step")
        return unfinished and not self.metrics.exists() and not any(self.checkpoints.glob("*"))

    def _probe(self) -> None:
        """Make and remove a folder where the run folder is or will be.

        Raises:
            StorageError: That fails.
        """
        place = next(parent for parent in (self.path.absolute(), *self.path.absolute().parents) if parent.exists())
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
        stream.write(f"{os.getpid()}\n")
        stream.flush()
        self._held = stream

    def release(self) -> None:
        """Let go of the folder."""
        if self._held is not None:
            self._held.close()
            self._held = None

    def _set_aside(self) -> None:
        """Rename an old run to a free name beside it, so that `--restart` loses nothing."""
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(target)


def _holder(lock: Path) -> int | None:
    """The process that holds a lock, if one does."""
    try:
        with lock.open("r+", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(lock.read_text(encoding="utf-8").strip() or 0)
    except OSError:
        return None  # no such file, or a file system without locks: the heartbeat decides
    return None


def _is_alive(status: dict[str, Any]) -> bool:
    """Whether the heart of a run beat a moment ago."""
    if status.get("state") != "running" or "heartbeat" not in status:
        return False
    age = datetime.now(UTC) - datetime.fromisoformat(status["heartbeat"])
    return age.total_seconds() < 4 * HEARTBEAT_SECONDS


def write_atomically(file: Path, text: str) -> None:
    """Write a whole file or nothing: a reader never sees half of it."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


class Status:
    """Keeps `status.json` true: a heartbeat while the run lives, the outcome when it ends. Rank 0 only.

    Args:
        file: `status.json` of the run folder.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.step = 0
        self._fields: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True, name="heartbeat")

    def start(self) -> None:
        """Say `running` and start the heartbeat."""
        self._write("running", exit_code=None, reason=None)
        self._thread.start()

    def finish(self, state: State, exit_code: int, reason: str | None = None) -> None:
        """Stop the heartbeat and say how the run ended."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._write(state, exit_code=exit_code, reason=reason)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            with self._lock:
                fields = dict(self._fields)
            self._write(**fields)

    def _write(self, state: State, *, exit_code: int | None, reason: str | None) -> None:
        with self._lock:
            self._fields = {"state": state, "exit_code": exit_code, "reason": reason}
            now = datetime.now(UTC).isoformat(timespec="seconds")
            status = {**self._fields, "step": self.step, "resumable": False, "checkpoint": None, "heartbeat": now}
            if self.file.parent.is_dir():
                write_atomically(self.file, json.dumps(status, indent=2) + "\n")
