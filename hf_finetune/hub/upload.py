"""An upload in a process of its own: started, polled and stopped from here; `worker` is what runs there.

The process reads one `Order` as JSON from its stdin and writes JSON lines to its stdout: notes, and at last a `Result`.
The token is in neither: huggingface_hub takes it from HF_TOKEN or the login store.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_finetune import terminal
from hf_finetune.hub import secrets

GRACE = 15.0  # seconds for starting and ending, beyond what the order allows


@dataclass(frozen=True)
class Order:
    """Files to upload."""

    repo: str
    private: bool
    as_pr: bool
    files: dict[str, str]
    """Name in the repository -> file on this machine."""
    message: str
    """Of the commit; a pull request is found again by it."""
    timeout: float
    """Seconds in all."""
    tag: str | None = None
    is_tag_fixed: bool = False
    """Refuse a tag that another version has; otherwise it gets a number."""


@dataclass(frozen=True)
class Result:
    """An upload that was done, or `failure`: why it was not, and what to do."""

    url: str = ""
    commit: str = ""
    is_new: bool = False
    """False where the repository already held the same content."""
    tag: str | None = None
    failure: str = ""


class Upload:
    """Start an upload.

    Args:
        order: Files to upload.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self._deadline = time.monotonic() + order.timeout + GRACE
        self._seen = 0
        # Files and not pipes, so that neither side ever waits for the other.
        self._output, self._errors = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        search = os.pathsep.join(filter(None, (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))))
        settings = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": search}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hf_finetune.hub.worker"],
            stdin=subprocess.PIPE,
            stdout=self._output,
            stderr=self._errors,
            env=os.environ | settings,
            start_new_session=True,  # Ctrl-C is for this process, which then stops the other one
        )
        # Stays open: the worker ends when it is closed, even by a SIGKILL of this process. A worker that has ended
        # already is reported by `poll`.
        with suppress(BrokenPipeError):
            os.write(self._process.stdin.fileno(), json.dumps(asdict(order)).encode() + b"\n")  # type: ignore[union-attr]

    def poll(self) -> Result | None:
        """Pass on what is new; return the result once there is one."""
        has_ended = self._process.poll() is not None
        # The two processes share the position in the file, so it must not be moved by reading.
        lines = os.pread(self._output.fileno(), 1 << 20, 0).split(b"\n")[:-1]
        fresh, self._seen = lines[self._seen :], len(lines)
        for line in fresh:
            try:
                fields = json.loads(line)
                if "note" not in fields:
                    return Result(**fields)
                terminal.say(f"note: {self.order.repo}: {fields['note']}")
            except (ValueError, TypeError):
                continue  # some library's own output
        if has_ended:
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
            reason = secrets.hide(last[0])[:400] if last else f"with exit code {self._process.returncode}"
            return Result(failure=f"the uploading process ended: {reason}")
        if time.monotonic() > self._deadline:
            return Result(failure=f"not done within {self.order.timeout:g} s")
        return None

    def wait(self) -> Result:
        """Wait for the result; whatever ends the waiting also ends the upload."""
        try:
            while (result := self.poll()) is None:
                time.sleep(0.1)
            return result
        finally:
            self.stop()

    def stop(self) -> None:
        """End the process; a commit is made whole or not at all."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._output, self._errors):
            if stream is not None and not stream.closed:
                stream.close()
