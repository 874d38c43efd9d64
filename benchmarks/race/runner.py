"""One run of one contestant: started, watched from outside until it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LOOK = 0.02
"""Seconds between two looks at the file in which a run says what it does."""
MEMORY_LOOK = 0.1

Seen = list[tuple[float, str]]
"""Lines of a file, and when each was first seen, in seconds since the epoch."""
Event = dict[str, Any]


@dataclass(frozen=True)
class Launch:
    """How a contestant is started, and where it says what it does."""

    command: list[str]
    watched: Path | None
    """File that grows while it runs; None is what it prints."""
    events: Callable[[Seen], list[Event]]
    adapter: Path
    """Folder, or a pattern for one, of the adapter that it saves."""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Watched:
    """What was seen."""

    exit_code: int
    began: float
    wall: float
    events: list[Event]
    peak_rss: int | None
    """Bytes of the largest process of the run, where the system tells."""
    log: str
    cpu: float
    """CPU seconds of the whole run: what is left of the truth on a busy machine."""
    others: float | None
    """Share of all cores' time that other processes used meanwhile; None where the system does not tell."""
    timed_out: bool = False


def run(launch: Launch, log: Path, folder: Path, timeout: float) -> Watched:
    """Start, watch, wait.

    Args:
        launch: What to start.
        log: File for what it prints.
        folder: Its working directory.
        timeout: Seconds after which it is ended.
    """
    environment = {**os.environ, **launch.environment, "PYTHONUNBUFFERED": "1"}
    with log.open("w") as stream:
        began, busy, own = time.time(), _busy(), _spent()
        process = subprocess.Popen(
            launch.command, stdout=stream, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment,
            cwd=folder, start_new_session=True,
        )  # fmt: skip
        tail, peak, looked, timed_out = _Tail(launch.watched or log), 0, 0.0, False
        while process.poll() is None:
            tail.look()
            if time.monotonic() - looked > MEMORY_LOOK:
                peak, looked = max(peak, _largest(process.pid)), time.monotonic()
            if time.time() - began > timeout and not timed_out:
                timed_out = True
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(LOOK)
        wall = time.time() - began
    cpu = _spent() - own
    others = None if busy is None else _busy_since(busy, own) / (wall * (os.cpu_count() or 1))
    tail.look()
    text = log.read_text(errors="replace")
    return Watched(
        process.returncode, began, wall, launch.events(tail.seen), peak or None, text, cpu, others, timed_out
    )


def _busy() -> float | None:
    """Seconds that all cores together have worked since the system was started."""
    file = Path("/proc/stat")
    if not file.exists():
        return None
    user, nice, system = (int(word) for word in file.read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _spent() -> float:
    """CPU seconds of this process and of those that it waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _busy_since(busy: float, own: float) -> float:
    return max(0.0, (_busy() or 0.0) - busy - (_spent() - own))


class _Tail:
    """Follows a file that may not be there yet."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seen: Seen = []
        self._place = 0
        self._rest = ""

    def look(self) -> None:
        """Take the lines that are new and whole."""
        if not self.file.exists() or self.file.stat().st_size <= self._place:
            return
        with self.file.open(errors="replace") as stream:
            stream.seek(self._place)
            text = self._rest + stream.read()
            self._place = stream.tell()
        *lines, self._rest = text.replace("\r", "\n").split("\n")
        self.seen += [(time.time(), line) for line in lines if line]


def _largest(pid: int) -> int:
    """Most resident bytes, so far, of any one process below and including this one."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = [file.read_text().split() for file in Path(f"/proc/{pid}/task").glob("*/children")]
    except OSError:  # it ended, or there is no /proc
        return 0
    own = next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")), 0)
    return max([own, *(_largest(int(child)) for group in children for child in group)])
