"""The sign of life of one rank: a small file, `<run folder>/.ranks/<rank>.json`, that it renews every second.

Where there are more than fifty ranks, each does so less often.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from hf_finetune.peers.process import Process
from hf_finetune.runfolder import write_atomically

State = Literal["running", "done", "stopped", "failed"]
"""`stopped`: by a signal, as was agreed or on its own."""

_LAUNCH = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
_BUFFERS = "_distributed_broadcast_coalesced"
"""Where DDP, before a forward pass, waits for the buffers of rank 0."""
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")  # noqa: PTH118  # compared with text


@dataclass(frozen=True)
class Failure:
    """Why a run ends on this rank: what happened to another."""

    rank: int
    """Whom it happened to."""
    reason: str
    """A sentence that names the rank; several lines where its error has several problems."""
    exit_code: int
    """10 where the rank died or hangs; else that of its own error, or 128 + signal."""


@dataclass(frozen=True)
class Beat:
    """What a rank says about itself."""

    launch: str
    rank: int
    process: Process
    count: int
    """Grows with every beat. Readers measure by their own clock for how long it has not."""
    written: float
    """By the `uptime` of its machine."""
    step: int = 0
    phase: str = "starting"
    idle: float = 0.0
    """Seconds without progress of its main thread."""
    allowed: float = 0.0
    """Seconds that the present phase may take without progress, where that is more than the usual limit."""
    waits: bool = False
    """Whether an idle main thread is inside a collective."""
    place: str = ""
    """Where an idle main thread is: `file.py:line (function)`."""
    speaks: bool = False
    """Whether it prints its own errors: the first rank of a node does."""
    state: State = "running"
    failure: Failure | None = None
    """Why it ends: its own error, or what happened to another rank."""
    has_said: bool = False
    """Whether it prints that failure of another rank."""

    def write(self, file: Path) -> bool:
        """Write it in one step, or on a full disk over the old one; False where that is impossible too."""
        text = json.dumps(asdict(self))
        try:
            write_atomically(file, text)
        except OSError:
            try:
                with file.open("r+", encoding="utf-8") as stream:
                    stream.write(text)
                    stream.truncate()
            except OSError:
                return False
        return True

    @classmethod
    def read(cls, file: Path) -> Beat | None:
        """What a rank wrote last; None where there is nothing that this version can read."""
        try:
            told = json.loads(file.read_text(encoding="utf-8"))
            failure = told["failure"] and Failure(**told["failure"])
            return cls(**told | {"process": Process(**told["process"]), "failure": failure})
        except (OSError, ValueError, KeyError, TypeError):
            return None


def launch() -> str:
    """What the ranks of one launch have in common, as far as its launcher tells."""
    return hashlib.sha256(repr([os.environ.get(name) for name in _LAUNCH]).encode()).hexdigest()[:12]


def look_at(thread: int) -> tuple[bool, str]:
    """Whether a thread is inside a collective, and where it is: `Beat.waits` and `Beat.place`."""
    frame = sys._current_frames().get(thread)
    if frame is None:
        return False, ""
    code = frame.f_code
    waits = code.co_filename.endswith(_COLLECTIVES) or code.co_name == _BUFFERS
    return waits, f"{Path(code.co_filename).name}:{frame.f_lineno} ({code.co_name})"
