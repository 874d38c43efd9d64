"""A root folder of the service with runs that are finished, and a real server on it."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_finetune.service.store import DEFAULT_PROJECT, Store, now


class Served:
    """A server process on finished runs.

    Args:
        root: Its folder.
        runs: Run folders by the suffix of the name that their models get.
        more: Arguments of `serve`.
    """

    def __init__(self, root: Path, runs: Mapping[str, Path], *more: str) -> None:
        self.root, self.more = root, more
        root.mkdir()
        (root / "models.yaml").write_text("tiny: nowhere\n")
        self.store = Store(root)
        self.names = {suffix: self._add(suffix, run) for suffix, run in runs.items()}
        self.key = self.store.create_key(DEFAULT_PROJECT, "tests")
        self.start()

    def _add(self, suffix: str, run: Path) -> str:
        """Let a run be that of a job which has ended."""
        job, name = f"ftjob-{suffix}", f"ft:tiny:default:{suffix}:{suffix}"
        shutil.copytree(run, self.root / "runs" / job / "run")
        fields = ("validation_file", "error", "metadata", "recipe", "job_type", "handle")
        document: dict[str, Any] = {
            **dict.fromkeys(fields),
            **{"id": job, "project": DEFAULT_PROJECT, "model": "tiny", "training_file": "file-0", "suffix": suffix},
            **{"created_at": now(), "finished_at": now(), "digest": "", "state": "succeeded", "wanted": "run"},
            **{"told": False, "attempts": 0, "overrides": [], "hyperparameters": {}, "priority": 0, "seed": 1},
            **{"base": {"name": "nowhere"}, "chosen": {}, "numbers": {}, "fine_tuned_model": name, "kind": "train"},
        }
        self.store.add_job(document)
        return name

    def start(self) -> None:
        """Start the server, and make a client for it."""
        import openai

        command = [sys.executable, "-m", "hf_finetune", "serve", "--root", str(self.root), "--port", "0", *self.more]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        found = None
        while found is None:
            line = self.process.stdout.readline()
            assert line, "the server has ended"
            found = re.search(r"http://127.0.0.1:\d+/v1", line)
        self.url = found[0]
        self.client: Any = openai.OpenAI(base_url=self.url, api_key=self.key)

    def run(self, suffix: str) -> Path:
        """Give the run folder of a model."""
        return self.root / "runs" / f"ftjob-{suffix}" / "run"

    def close(self) -> None:
        """End the server as Ctrl-C does."""
        self.process.send_signal(signal.SIGINT)
        self.process.wait(30)


def post(served: Served, path: str, **body: Any) -> Any:
    """Ask what OpenAI's client has no method for."""
    return served.client.post(path, body=body, cast_to=object)
