"""`metrics.jsonl`: the source of truth for metrics, one object a logged step and phase, on disk at once."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Entry = dict[str, Any]
"""One line: step, epoch, time (Unix seconds), phase (train | eval | final | test | summary), then the metrics."""

MEASURED = ("time", "seconds", "per_second", "memory", "matmul")
"""Words in the names of what the clock and the machine say: all that may differ between two equal runs."""

_NOISE = {"epoch", "total_flos", "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
_RATES = {"samples_per_second", "steps_per_second", "model_preparation_time"}


def entry(logs: dict[str, Any], state: TrainerState) -> Entry | None:
    """A line of metrics.jsonl from the Trainer's flat log, or None for a log that holds nothing of ours."""
    at = logs.setdefault("time", now())  # the same for everyone who sees this log
    head: Entry = {"step": state.global_step, "epoch": round(logs.get("epoch") or state.epoch or 0.0, 6), "time": at}
    for phase in ("eval", "final", "test"):
        found = of_phase(logs, phase)
        if found:
            return head | {"phase": phase} | found
    metrics = {key: value for key, value in logs.items() if key not in _NOISE}
    return head | {"phase": "train"} | metrics if "loss" in metrics else None


def now() -> float:
    """Unix seconds, to the millisecond."""
    return round(time.time(), 3)


def of_phase(logs: dict[str, Any], phase: str) -> dict[str, Any]:
    """What the Trainer's flat log holds of an evaluation, without the phase's prefix and the Trainer's own rates."""
    prefix = f"{phase}_"
    found = {key.removeprefix(prefix): value for key, value in logs.items() if key.startswith(prefix)}
    return {key: value for key, value in found.items() if key not in _RATES}


def read(file: Path) -> list[Entry]:
    """The lines of a metrics.jsonl; a last one that was cut off by a kill is left out."""
    if not file.exists():
        return []
    whole = file.read_text(encoding="utf-8").split("\n")[:-1]
    return [{key: _number(value) for key, value in json.loads(line).items()} for line in whole]


def keep_lines(file: Path, lines: int) -> None:
    """Cut a file off after so many lines; one that would be empty is removed."""
    if not file.exists():
        return
    with file.open("rb+") as stream:
        for _ in range(lines):
            stream.readline()
        stream.truncate(stream.tell())
    if not lines:
        file.unlink()


def _number(value: Any) -> Any:
    """NaN and infinity, which are kept as text."""
    return float(value) if value in ("nan", "inf", "-inf") else value


class Watcher(TrainerCallback):
    """A callback that sees every log as a line of metrics.jsonl."""

    def see(self, line: Entry, state: TrainerState) -> None:
        """Do something with a line."""
        raise NotImplementedError

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Hand the line on, where the log holds anything of ours."""
        line = entry(logs or {}, state)
        if line is not None:
            self.see(line, state)


class Journal(Watcher):
    """Writes metrics.jsonl on rank 0 and keeps the entries of this process in memory.

    Args:
        file: `metrics.jsonl` of the run folder.
        writes: Whether this is rank 0.
        complain: Says what is wrong, and stops nothing.
    """

    def __init__(self, file: Path, *, writes: bool, complain: Callable[[str], None]) -> None:
        self.file = file
        self.complain = complain
        self.writes = writes
        self.entries: list[Entry] = []
        self.lost = 0
        """Lines that could not be written."""

    def keep(self, lines: int) -> None:
        """Go on after so many lines of an earlier process; what it wrote after its last checkpoint comes again."""
        if self.writes:
            keep_lines(self.file, lines)
            self.entries = read(self.file)

    def add(self, line: Entry) -> None:
        """Append one line and flush it; NaN and infinity, which JSON can't hold, are written as text."""
        self.entries.append(line)
        if not self.writes:
            return
        plain = {key: str(v) if isinstance(v, float) and not isfinite(v) else v for key, v in line.items()}
        try:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")
        except OSError as error:
            self.lost += 1
            if self.lost == 1:
                self.complain(f"{self.file} can't be written ({error.strerror}): its lines are lost, training goes on")

    def see(self, line: Entry, state: TrainerState) -> None:
        """Write the line."""
        self.add(line)
