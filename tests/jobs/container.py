"""Runs an image as an engine would: `docker run --read-only --network none --cap-drop ALL ...`, by namespaces alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from jobs.image import Image

SPACES = ("--mount", "--pid", "--net", "--ipc", "--uts", "--fork", "--kill-child", "--propagation", "private")
PATIENCE = 180.0


@dataclass
class Container:
    """One image with its volumes; may be started again and again, by another user each time."""

    image: Image
    place: Path
    """An empty folder that becomes the root."""
    volumes: dict[str, str]
    """Folder in the container: folder here."""
    read_only: dict[str, str] = field(default_factory=dict)
    user: int = 1000
    group: int = 0
    env: dict[str, str] = field(default_factory=dict)

    def start(self, *words: str, entry: list[str] | None = None) -> Started:
        """Start its entry point with these arguments; `entry` replaces it."""
        config = self.image.config
        given = dict(variable.partition("=")[::2] for variable in config["Env"])
        order = {
            "root": str(self.image.root),
            "place": str(self.place),
            "volumes": self.volumes,
            "read_only": self.read_only,
            "shm": "64m",
            "user": self.user,
            "group": self.group,
            "workdir": config["WorkingDir"],
            "env": given | self.env,
            "command": [*(config["Entrypoint"] if entry is None else entry), *(words or config["Cmd"])],
        }
        command = ["unshare", *SPACES, sys.executable, str(Path(__file__).with_name("inside.py")), json.dumps(order)]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, text=True)
        return Started(process, order["env"], (self.user, self.group))

    def run(self, *words: str, entry: list[str] | None = None) -> Ended:
        """Start it and wait."""
        return self.start(*words, entry=entry).end()


@dataclass(frozen=True)
class Ended:
    """How it ended."""

    code: int
    output: str


@dataclass
class Started:
    """A container that runs."""

    process: subprocess.Popen[str]
    env: dict[str, str]
    ids: tuple[int, int]

    @property
    def first(self) -> int:
        """Process 1 of the container, by its number out here."""
        pid = self.process.pid
        return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])

    @property
    def has_begun(self) -> bool:
        """Whether process 1 is the entry point already, and no longer what makes its place."""
        try:
            return Path(f"/proc/{self.first}/cmdline").read_text().startswith("tini")
        except (IndexError, FileNotFoundError):
            return False

    def stop(self) -> None:
        """What `docker stop` and the kubelet do: SIGTERM to process 1."""
        os.kill(self.first, signal.SIGTERM)

    def end(self, seconds: float = PATIENCE) -> Ended:
        """Wait for the end; a container that goes on is killed.

        Raises:
            TimeoutError: It was.
        """
        try:
            output, _ = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            output, _ = self.process.communicate()
            raise TimeoutError(output) from None
        return Ended(self.process.returncode, output)

    def until(self, reached: Callable[[], bool], seconds: float = PATIENCE) -> None:
        """Watch from outside until something is true.

        Raises:
            TimeoutError: It does not become true, or the container ends before.
        """
        deadline = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.process.kill()
                raise TimeoutError(self.process.communicate()[0])
            time.sleep(0.01)

    def execute(self, *command: str) -> Ended:
        """What `docker exec` does."""
        enter = ["nsenter", "--target", str(self.first), "--mount", "--pid", "--net", "--ipc", "--root", "--wd"]
        user, group = self.ids
        enter += ["--setuid", str(user), "--setgid", str(group)]
        variables = [f"{name}={value}" for name, value in self.env.items()]
        done = subprocess.run(
            [*enter, "/usr/bin/env", "-i", *variables, *command],
            check=False,
            text=True,
            capture_output=True,
            timeout=60,
        )
        return Ended(done.returncode, done.stdout + done.stderr)
