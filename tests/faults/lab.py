"""Runs that are killed, and run again: how they are started, watched, and compared with one that nobody touched."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forked import PATIENCE, ROOT, TESTS, Child, Server, ranks

__all__ = ["ROOT", "TESTS", "Child", "Ended", "Job", "Lab", "Server"]


RECIPE = """\
task: {{kind: text_classification, text: text, label: label}}
model: {{name: {model}}}
data: {{train: {train}, validation: {validation}, max_length: 32, workers: 1, cache: {cache}}}
adapter: {{kind: lora, r: 4, alpha: 8, dropout: 0.1, target_modules: all-linear}}
training:
  epochs: 2
  batch_size: 8
  micro_batch: 4
  learning_rate: 5e-3
  precision: fp32
  log_every: 1
  eval_every: 4
  group_by_length: false
checkpoints: {{every: 5, keep: 2}}
tracking: {{images: false, report: false}}
output: {output}
"""
STEPS = 26
"""Of this recipe: 101 rows make 13 global batches of 8, the last of 5 rows, which are micro-batches of 4 and 1."""


def rows(count: int, seed: int, words: Sequence[str]) -> str:
    """So many different sentences of different lengths, with their label, as csv."""
    draw = random.Random(seed)
    lines: dict[str, str] = {}
    while len(lines) < count:
        is_good = len(lines) % 2 == 0
        said = draw.choice(("good", "great", "fine", "lovely") if is_good else ("bad", "poor", "dull", "weak"))
        text = " ".join([*draw.choices(words, k=draw.randint(2, 18)), said])
        lines.setdefault(text, "positive" if is_good else "negative")
    return "text,label\n" + "".join(f"{text},{label}\n" for text, label in lines.items())


@dataclass
class Ended:
    """How a start ended."""

    codes: list[int]
    output: str

    @property
    def code(self) -> int:
        """That of rank 0, or of the launcher."""
        return self.codes[0]


@dataclass
class Job:
    """A recipe in a folder of its own, that is started again and again."""

    server: Server
    folder: Path
    recipe: Path
    overrides: list[str] = field(default_factory=list)
    ranks: int = 1
    env: dict[str, str] = field(default_factory=dict)

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / "run"

    @property
    def command(self) -> list[str]:
        """Arguments of the command line: always the same."""
        return [str(self.recipe), *self.overrides]

    def fork(self, *plugins: Any, more: Sequence[str] = ()) -> list[Child]:
        """Start it through the fork server; one child a rank."""
        env = {**os.environ, "PYTHONUNBUFFERED": "1", **self.env}
        own = ranks(self.ranks) if self.ranks > 1 else [{}]
        return [self.server.start(*self.command, *more, env=env | rank, plugins=plugins) for rank in own]

    def go(self, *plugins: Any, more: Sequence[str] = (), seconds: float = PATIENCE) -> Ended:
        """Start it and wait for its end; where a rank dies by SIGKILL, the others are killed too."""
        return self.end(self.fork(*plugins, more=more), seconds)

    def end(self, children: list[Child], seconds: float = PATIENCE) -> Ended:
        """Wait for all ranks."""
        codes = [child.wait(seconds) for child in children]
        return Ended(codes, "".join(child.output for child in children))

    def launch(self, *start: str, plugins: Sequence[Any] = (), **options: Any) -> subprocess.Popen[str]:
        """Start it as a person does: `launch("-m", "hf_finetune")`, or with a launcher before it."""
        path = os.pathsep.join([str(TESTS), str(ROOT)])
        environment = os.environ | {"PYTHONPATH": path, "FAULTS": json.dumps(list(plugins))} | self.env
        command = [*start, *self.command]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=environment, **{**pipe, **options})

    # ---- what it left ----

    def lines(self, phase: str = "") -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, of one phase or all."""
        text = self.run.joinpath("metrics.jsonl").read_text() if (self.run / "metrics.jsonl").exists() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        return [line for line in lines if phase in ("", line["phase"])]

    @property
    def status(self) -> dict[str, Any]:
        """status.json."""
        status: dict[str, Any] = json.loads((self.run / "status.json").read_text())
        return status

    @property
    def checkpoints(self) -> list[int]:
        """Steps of the committed checkpoints, ascending."""
        names = (path.name for path in (self.run / "checkpoints").glob("checkpoint-*"))
        return sorted(int(name.removeprefix("checkpoint-")) for name in names)

    def checkpoint(self, step: int) -> Path:
        """Folder of a checkpoint."""
        return self.run / "checkpoints" / f"checkpoint-{step}"

    def until(self, reached: Callable[[], Any], seconds: float = PATIENCE) -> None:
        """Watch from outside until something is true."""
        deadline = time.monotonic() + seconds
        while not reached():
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happened for {seconds:.0f} s; {self.folder}")
            time.sleep(0.005)

    def until_step(self, step: int) -> None:
        """Watch metrics.jsonl until a step is in it."""
        file = self.run / "metrics.jsonl"
        self.until(lambda: file.exists() and f'"step": {step},' in file.read_text())

    def keep(self) -> None:
        """Keep a copy of the run folder, for `back`."""
        shutil.copytree(self.run, self.folder / "kept", symlinks=True)

    def back(self) -> None:
        """Put the run folder back to where it was kept."""
        shutil.rmtree(self.run)
        shutil.copytree(self.folder / "kept", self.run, symlinks=True)


class Lab:
    """Makes jobs, and knows how each would have ended."""

    def __init__(self, server: Server, folder: Path, values: dict[str, str]) -> None:
        self.server = server
        self.folder = folder
        self.values = values
        self._references: dict[tuple[Any, ...], Job] = {}
        self._count = 0

    def job(self, *overrides: str, ranks: int = 1, **env: str) -> Job:
        """A new one."""
        self._count += 1
        folder = self.folder / f"job-{self._count}"
        folder.mkdir()
        recipe = folder / "recipe.yaml"
        recipe.write_text(RECIPE.format(output=folder / "run", **self.values))
        return Job(self.server, folder, recipe, list(overrides), ranks, env)

    def reference(self, overrides: Iterable[str], ranks: int = 1) -> Job:
        """The uninterrupted run of the same recipe."""
        key = (*sorted(overrides), ranks)
        if key not in self._references:
            job = self.job(*overrides, ranks=ranks)
            ended = job.go()
            assert ended.codes == [0] * ranks, ended.output
            self._references[key] = job
        return self._references[key]
