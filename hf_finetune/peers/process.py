"""One process of one machine: whether it still lives, and when it began."""

from __future__ import annotations

import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

_LINUX = sys.platform == "linux"
_IMPORTED = time.monotonic()
_STATE, _STARTED = 0, 19
"""Fields of `/proc/<pid>/stat` after the name, from 0 (proc(5) counts `state` as 3 and `starttime` as 22)."""


@dataclass(frozen=True)
class Process:
    """A process; its number alone would name another one some time later."""

    host: str
    """For people."""
    machine: str
    """Boot and process namespace: where this is equal, process numbers mean the same."""
    pid: int
    started: int
    """Clock ticks after boot; 0 where the system does not tell."""

    @classmethod
    def own(cls) -> Process:
        """This process."""
        host = socket.gethostname()
        if not _LINUX:
            return cls(host, host, os.getpid(), 0)
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = Path("/proc/self/ns/pid").readlink()
        return cls(host, f"{boot} {namespace}", os.getpid(), int(_stat(os.getpid())[_STARTED]))

    def is_gone(self) -> bool:
        """Whether it has ended; ask only on its machine."""
        if not _LINUX:
            return not _answers(self.pid)
        fields = _stat(self.pid)
        return not fields or fields[_STATE] in "ZX" or int(fields[_STARTED]) != self.started

    def is_stopped(self) -> bool:
        """Whether a signal (SIGSTOP) or a debugger holds it; ask only on its machine."""
        return _LINUX and (_stat(self.pid) or " ")[_STATE] in "Tt"


def uptime() -> float:
    """Seconds since a moment that all processes of a machine share."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if _LINUX else time.monotonic()


def born() -> float:
    """When this process began, by `uptime`; where the system does not tell, when this module was imported."""
    return int(_stat(os.getpid())[_STARTED]) / os.sysconf("SC_CLK_TCK") if _LINUX else _IMPORTED


def _stat(pid: int) -> list[str]:
    """What the kernel says about a process, after its name; empty if there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return text.rpartition(")")[2].split()  # a name may hold spaces and brackets


def _answers(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
