"""Processes of the command line that cost a second, not ten: the client's side of `forkserver.py`.

`server.run("check", recipe)` is `subprocess.run([python, "-m", "hf_finetune", "check", recipe], capture_output=True,
text=True)`, and `server.start(...)` is `Popen`. Start a real Python where a test is about what is imported, about how
long that takes, about a launcher, or about a variable that libraries read as they load (HF_ENDPOINT, HF_HOME, ...).
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

TESTS = Path(__file__).parent
ROOT = TESTS.parent
PATIENCE = 240.0
"""Seconds that anything may take."""
Stream = int | IO[Any] | None


def ranks(count: int) -> list[dict[str, str]]:
    """What a launcher adds to the environment of each of its processes."""
    port = str(free_port())
    of_all = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    return [of_all | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Child:
    """A process that the fork server made."""

    def __init__(self, connection: socket.socket, files: Sequence[Path]) -> None:
        self._stream = connection.makefile()
        self._connection = connection
        self.pid = int(self._stream.readline())
        self._files = files
        """Those of stdout and stderr that nobody gave."""
        self.code: int | None = None

    def poll(self) -> int | None:
        """Exit code, if it has ended."""
        return self.wait() if self.code is None and select.select([self._connection], [], [], 0)[0] else self.code

    def wait(self, seconds: float = PATIENCE) -> int:
        """Exit code; negative where a signal ended it.

        Raises:
            TimeoutError: It goes on for longer; it is killed.
        """
        if self.code is None:
            self._connection.settimeout(seconds)
            try:
                self.code = int(self._stream.readline())
            except TimeoutError:
                self.send(signal.SIGKILL)
                raise TimeoutError(f"process {self.pid} still runs after {seconds:.0f} s:\n{self.output}") from None
            finally:
                self._stream.close()
                self._connection.close()
        return self.code

    def send(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)

    @property
    def output(self) -> str:
        """All that it has printed."""
        return "".join(file.read_text(errors="replace") for file in self._files)


class Server:
    """Starts processes that have the libraries loaded."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "server"
        self.folder = folder
        # pyarrow's allocator would start a thread, and a process with threads is not safely forked.
        quiet = {"JE_ARROW_MALLOC_CONF": "background_thread:false", "ARROW_DEFAULT_MEMORY_POOL": "system"}
        environment = os.environ | {"PYTHONPATH": str(TESTS), **quiet}
        command = [sys.executable, "-m", "forkserver", str(self.path)]
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        self.count = 0

    def start(
        self,
        *argv: str,
        env: Mapping[str, str] | None = None,
        plugins: Sequence[Any] = (),
        cwd: Path = ROOT,
        streams: tuple[Stream, Stream, Stream] = (None, None, None),
    ) -> Child:
        """Run the command line in a new process.

        Args:
            argv: Words after `hf-finetune`.
            env: The whole environment; None takes this process's.
            plugins: Faults, see `faults.plugins`.
            cwd: Where it works.
            streams: Its stdin, stdout and stderr: pipes, files, terminals. None: no input, and files of their own.
        """
        self.count += 1
        files = [self.folder / f"{name}-{self.count}" for name in ("out", "err")]
        order = {"argv": argv, "env": dict(os.environ if env is None else env), "plugins": plugins, "cwd": str(cwd)}
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(str(self.path))
        opened: list[int] = []
        given: list[int] = []
        for stream, file in zip(streams, (Path(os.devnull), *files), strict=True):
            if stream is None:
                flags = os.O_RDONLY if file == Path(os.devnull) else os.O_WRONLY | os.O_CREAT | os.O_APPEND
                opened.append(os.open(file, flags))
                given.append(opened[-1])
            else:
                given.append(stream if isinstance(stream, int) else stream.fileno())
        socket.send_fds(connection, [b"3"], given)
        connection.sendall(json.dumps(order).encode() + b"\n")
        for number in opened:
            os.close(number)
        return Child(connection, [file for file, stream in zip(files, streams[1:], strict=True) if stream is None])

    def run(
        self, *argv: str, read: str | Path | None = None, timeout: float = PATIENCE, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run the command line to its end, as `subprocess.run` does.

        Args:
            argv: Words after `hf-finetune`.
            read: What it reads from stdin: text, or a file.
            timeout: Seconds; a TimeoutError then.
            options: Those of `start`; what goes to a stream that is given is not returned.
        """
        out, err = (self.folder / f"{name}-{self.count + 1}" for name in ("out", "err"))
        if read is None:
            child = self.start(*argv, **options)
        else:
            file = read if isinstance(read, Path) else self.folder / f"in-{self.count + 1}"
            if isinstance(read, str):
                file.write_text(read)
            with file.open() as stdin:
                child = self.start(*argv, **{"streams": (stdin, None, None), **options})
        code = child.wait(timeout)
        told = [path.read_text() if path.exists() else "" for path in (out, err)]
        return subprocess.CompletedProcess(["hf-finetune", *argv], code, *told)

    def close(self) -> None:
        """End the server."""
        self.process.kill()
        self.process.communicate()
