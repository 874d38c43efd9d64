"""Process 1 of a container: takes the place that was made for it, gives up its rights, and becomes the entry point.

Started by `container.py` in namespaces of its own, as root, with one argument: the order, as JSON.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

PIVOT_ROOT = 155
NO_NEW_PRIVILEGES, DROP_BOUND = 38, 24
CAPABILITIES = 41
"""Of Linux 6."""
DEVICES = ("null", "zero", "full", "random", "urandom")
libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True)


def loopback() -> None:
    """A network without any way out has this one, as with `--network none`."""
    with socket.socket() as probe:
        flags = struct.unpack("16sh", fcntl.ioctl(probe, 0x8913, struct.pack("16sh", b"lo", 0)))[1]
        fcntl.ioctl(probe, 0x8914, struct.pack("16sh", b"lo", flags | 1))


def furnish(root: Path, order: dict[str, Any]) -> None:
    """Mount everything below the read-only root."""
    mount("--make-rprivate", "/")
    mount("--bind", order["root"], str(root))
    for place, source in {**order["volumes"], **order["read_only"]}.items():
        (root / place[1:]).mkdir(parents=True, exist_ok=True)  # as an engine does, in the layer above the image
        mount("--bind", source, str(root / place[1:]))
    for place in order["read_only"]:
        mount("-o", "remount,bind,ro", str(root / place[1:]))
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")  # an engine brings its own
    mount("-t", "proc", "proc", str(root / "proc"))
    mount("-t", "sysfs", "-o", "ro", "sysfs", str(root / "sys"))
    mount("-t", "tmpfs", "-o", "mode=1777,size=512m", "tmpfs", str(root / "tmp"))
    mount("-t", "tmpfs", "-o", "mode=755,size=64k", "tmpfs", str(root / "dev"))
    for name in DEVICES:
        (root / "dev" / name).touch()
        mount("--bind", f"/dev/{name}", str(root / "dev" / name))
    (root / "dev/shm").mkdir()
    mount("-t", "tmpfs", "-o", f"mode=1777,size={order['shm']}", "tmpfs", str(root / "dev/shm"))
    mount("-o", "remount,bind,ro", str(root))


def enter(root: Path) -> None:
    """Make it the only root that there is."""
    os.chdir(root)
    checked(libc.syscall(PIVOT_ROOT, b".", b"."))
    checked(libc.umount2(b".", 2))
    os.chdir("/")


def give_up(user: int, group: int) -> None:
    """`--cap-drop ALL --security-opt no-new-privileges`, and the user."""
    for capability in range(CAPABILITIES):
        libc.prctl(DROP_BOUND, capability, 0, 0, 0)
    os.setgroups([])
    os.setgid(group)
    os.setuid(user)
    checked(libc.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))


def main() -> None:
    order: dict[str, Any] = json.loads(sys.argv[1])
    root = Path(order["place"])
    loopback()
    furnish(root, order)
    enter(root)
    give_up(order["user"], order["group"])
    os.umask(0o022)
    os.chdir(order["workdir"])
    os.execvpe(order["command"][0], order["command"], order["env"])


if __name__ == "__main__":
    main()
