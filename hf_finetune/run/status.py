"""`status.json`: read it, tell by it whether a run is alive, and keep it true while one trains.

Imports nothing heavy: probes ask every half minute.
"""

from __future__ import annotations

import json
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from hf_finetune.run.files import write_atomically

State = Literal["running", "done", "failed", "preempted", "interrupted"]

HEARTBEAT_SECONDS = 5.0
# A run that says `running` and has not written a heartbeat for so long was killed, or its machine is gone.
LOST_SECONDS = 12 * HEARTBEAT_SECONDS


def read(file: Path) -> dict[str, Any]:
    """Return the object in `status.json`; an empty one if the file is missing, damaged or has no state."""
    try:
        status = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) and isinstance(status.get("state"), str) else {}


def silence(status: dict[str, Any], now: float | None = None) -> float:
    """Return the seconds since the last heartbeat; 0 if there is none that can be read.

    Args:
        status: See `read`.
        now: Seconds since the epoch.
    """
    try:
        heartbeat = datetime.fromisoformat(status["heartbeat"]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0.0
    return (time.time() if now is None else now) - heartbeat


def is_alive(status: dict[str, Any], now: float | None = None) -> bool:
    """Tell by the heartbeat whether a run goes on; arguments as of `silence`."""
    return status.get("state") == "running" and "heartbeat" in status and silence(status, now) <= LOST_SECONDS


class Status:
    """Keeps `status.json` true: a heartbeat while the run lives, the outcome when it ends. Rank 0 only.

    Args:
        file: `status.json` of the run folder.
        is_silent: Leave the file alone until `start`: a finished run stays finished until its extension begins.
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
        self._thread = threading.Thread(target=self._heartbeat, daemon=True, name="heartbeat")

    def start(self) -> None:
        """Say `running` and start the heartbeat; a checkpoint of an earlier process still counts."""
        self.is_silent = False
        earlier = read(self.file)
        name = str(earlier.get("checkpoint") or "")
        if name and (self.file.parent / name).is_dir():
            with suppress(KeyError, TypeError, ValueError):
                self.checkpoint, self.step = name, int(earlier["step"])
        self._write("running", exit_code=None, reason=None)
        self._thread.start()

    def reached(self, step: int, checkpoint: str | None) -> None:
        """Write at once where the run is, and the checkpoint to resume from."""
        self.step, self.checkpoint = step, checkpoint
        self._write(durable=True)

    def finish(self, state: State, exit_code: int, reason: str | None = None) -> None:
        """Stop the heartbeat and write how the run ended; only the first call counts."""
        if self._stop.is_set():
            return
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._write(state, exit_code=exit_code, reason=reason)

    def write_resumable(self, step: int, checkpoint: str) -> None:
        """Write `running` once, without a heartbeat, for a run that is about to resume from a checkpoint."""
        self.step, self.checkpoint = step, checkpoint
        self._write("running", exit_code=None, reason=None)

    def says_running(self) -> bool:
        """Tell whether the file is there and says that the run goes on."""
        return read(self.file).get("state") == "running"

    def _heartbeat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            self._write()

    def _write(
        self,
        state: State | None = None,
        *,
        exit_code: int | None = None,
        reason: str | None = None,
        durable: bool = False,
    ) -> None:
        """Write the file anew; without a state, with the last one. A new state is durable."""
        if self.is_silent:
            return
        with self._lock:
            if state is not None:
                self._fields = {"state": state, "exit_code": exit_code, "reason": reason}
            if not self._fields:
                return
            resumable = self.checkpoint is not None and self._fields["state"] != "done"
            now = datetime.now(UTC).isoformat(timespec="milliseconds")
            place = {"step": self.step, "resumable": resumable, "checkpoint": self.checkpoint, "heartbeat": now}
            text = json.dumps({**self._fields, **place}, indent=2) + "\n"
            # A full or read-only disk must not hide what went wrong; saving a checkpoint reports it.
            with suppress(OSError):
                if not self.file.parent.is_dir():
                    return
                try:
                    write_atomically(self.file, text, durable=durable or state is not None)
                except OSError:
                    # On a full disk the file's own block is still there: overwrite it in one call.
                    with self.file.open("r+", encoding="utf-8") as stream:
                        stream.write(text)
                        stream.truncate()
