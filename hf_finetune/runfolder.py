"""The run folder: where everything is, who may write into it, and `status.json`, which is always true."""

from __future__ import annotations

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

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

    def claim(self, recipe_yaml: str, *, restart: bool) -> bool:
        """Take the folder for a run and write the resolved recipe.

        Args:
            recipe_yaml: The resolved recipe.
            restart: Move an earlier run aside.

        Returns:
            False where the folder holds this very run, finished: there is nothing to do.

        Raises:
            RecipeError: The folder holds another or an unfinished run, and `restart` was not given.
            StorageError: The folder can't be written.
        """
        previous = self.previous()
        if previous is not None and _is_alive(previous):
            message = f"{self.path} belongs to a run that is going on; stop it, or name another folder"
            raise RecipeError(Problem(message, key="output"))
        if previous is not None and not restart:
            same = self.recipe.is_file() and self.recipe.read_text(encoding="utf-8") == recipe_yaml
            if same and previous["state"] == "done":
                return False
            what = f"an earlier run ({previous['state']})" if same else "a run of another recipe"
            message = (
                f"{self.path} holds {what}; give --restart to move it aside and start anew, or name another folder"
            )
            raise RecipeError(Problem(message, key="output"))
        try:
            if previous is not None:
                self._set_aside()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomically(self.recipe, recipe_yaml)
        except OSError as error:
            raise StorageError(Problem(f"{self.path} can't be written: {error.strerror}", key="output")) from error
        return True

    def _set_aside(self) -> None:
        """Rename an old run to a free name beside it, so that `--restart` loses nothing."""
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.old-{number}")).exists():
            number += 1
        self.path.rename(target)


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
