"""The uploading process, from the side of the run: started, listened to, ended."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

from hf_finetune.hub import secrets
from hf_finetune.hub.order import Answer, Order
from hf_finetune.terminal import say

GRACE = 15.0
"""Seconds that the process has for starting and for ending by itself, beyond what its order allows."""
LOOK = 0.5
"""Seconds between two looks, so that a signal is noticed."""
PACKAGES = str(Path(__file__).parent.parent.parent)
SETTINGS = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


class Sending:
    """An upload that goes on in a process of its own.

    Args:
        order: What to upload.
    """

    def __init__(self, order: Order) -> None:
        self._ends = time.monotonic() + order.timeout + GRACE
        self._late = Answer("failed", f"not done within {order.timeout:g} s")
        path = os.pathsep.join(part for part in (PACKAGES, os.environ.get("PYTHONPATH", "")) if part)
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hf_finetune.hub.upload"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | SETTINGS | {"PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the run, which ends this
        )
        self._answers: queue.Queue[Answer | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True, name="upload").start()
        self._write(order.line())

    def poll(self) -> Answer | None:
        """How it ended; None while it goes on."""
        return self._next(0.0)

    def wait(self) -> Answer:
        """Wait for its end, and say what is tried again."""
        try:
            while True:
                answer = self._next(LOOK)
                if answer is not None and answer.event != "again":
                    return answer
                if answer is not None:
                    say(f"note: {answer.reason}")
        finally:
            self.stop()

    def stop(self) -> None:
        """End it, wherever it is; a commit is made whole or not at all."""
        self._process.kill()
        self._process.wait()
        if self._process.stdin is not None:
            self._process.stdin.close()

    def _next(self, seconds: float) -> Answer | None:
        """The next answer; None where there is none yet."""
        try:
            answer = self._answers.get(timeout=seconds) if seconds else self._answers.get_nowait()
        except queue.Empty:
            return self._late if time.monotonic() > self._ends else None
        return answer or Answer("failed", f"the uploading process ended: {self._last_words()}")

    def _listen(self) -> None:
        stream = self._process.stdout
        for line in stream or ():
            answer = Answer.read(line)
            if answer is not None:
                self._answers.put(answer)
        self._answers.put(None)

    def _write(self, line: str) -> None:
        stream = self._process.stdin
        if stream is not None:
            try:
                stream.write(line)
                stream.flush()
            except BrokenPipeError:
                return  # it ended at once, which `_next` says

    def _last_words(self) -> str:
        """The last line of its stderr, without secrets."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return secrets.hide(lines[-1])[:400] if lines else "without a word"
