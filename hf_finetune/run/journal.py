"""`metrics.jsonl`, the source of truth for metrics: one object a logged step and phase. Needs no torch."""

from __future__ import annotations

import json
import time
from math import isfinite
from pathlib import Path
from typing import Any

from hf_finetune.log import warn

# One line: step, epoch, time (Unix seconds), phase (train | eval | final | test | summary), then the metrics.
Entry = dict[str, Any]

# Words in the names of what the clock and the machine say: all that may differ between two equal runs.
MEASURED = ("time", "seconds", "per_second", "memory", "matmul")

_NOISE = {"epoch", "total_flos", "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
_RATES = {"samples_per_second", "steps_per_second", "model_preparation_time"}


def entry(logs: dict[str, Any], step: int, epoch: float | None) -> Entry | None:
    """Make a line from the Trainer's flat log; None for a log without loss or metrics."""
    at = logs.setdefault("time", now())  # the same for every callback that sees this log
    head: Entry = {"step": step, "epoch": round(logs.get("epoch") or epoch or 0.0, 6), "time": at}
    for phase in ("eval", "final", "test"):
        found = of_phase(logs, phase)
        if found:
            return head | {"phase": phase} | found
    # The Trainer's closing log has `train_loss` and rates, but no `loss`: the summary line says it better.
    metrics = {key: value for key, value in logs.items() if key not in _NOISE}
    return head | {"phase": "train"} | metrics if "loss" in metrics else None


def now() -> float:
    """Unix seconds, to the millisecond."""
    return round(time.time(), 3)


def of_phase(logs: dict[str, Any], phase: str) -> dict[str, Any]:
    """Take an evaluation's metrics from the Trainer's flat log, without prefix and without the Trainer's own rates."""
    prefix = f"{phase}_"
    found = {key.removeprefix(prefix): value for key, value in logs.items() if key.startswith(prefix)}
    return {key: value for key, value in found.items() if key not in _RATES}


class Appender:
    """Append lines to metrics.jsonl or samples.jsonl; a disk that can't be written costs one warning, never the run."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lost = 0

    def append(self, *lines: Entry) -> None:
        """Append lines and flush them."""
        text = ""
        for line in lines:
            # JSON has no NaN and no infinity: they become text, which `read` turns back.
            plain = {key: str(v) if isinstance(v, float) and not isfinite(v) else v for key, v in line.items()}
            text += json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(text)
        except OSError as error:
            if not self.lost:
                warn(f"{self.file} can't be written ({error.strerror}): its lines are lost, training goes on")
            self.lost += len(lines)


def read(file: Path) -> list[Entry]:
    """Read metrics.jsonl; damaged lines are left out, with one warning."""
    return [_as_numbers(line) for line in _lines(file, "phase")]


def parse(text: bytes) -> Entry | None:
    """Read one line of metrics.jsonl; None for one that is damaged."""
    line = _entry(text, "phase")
    return None if line is None else _as_numbers(line)


def _as_numbers(line: Entry) -> Entry:
    special = {"nan", "inf", "-inf"}
    return {key: float(value) if isinstance(value, str) and value in special else value for key, value in line.items()}


def read_samples(file: Path) -> list[Entry]:
    """Read samples.jsonl (step, prompt, answer, ended, reference); damaged lines are left out, with one warning."""
    return _lines(file, "answer")


def keep_lines(file: Path, lines: int) -> None:
    """Cut a file off after so many lines; remove it if it would be empty."""
    if not file.exists():
        return
    with file.open("rb+") as stream:
        # As bytes, so that damaged lines and all kinds of line ends count as they did when the checkpoint was written.
        for _ in range(lines):
            stream.readline()
        stream.truncate(stream.tell())
    if not lines:
        file.unlink()


def _lines(file: Path, needed: str) -> list[Entry]:
    """Read objects that have a step and the needed key."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        warn(f"{file} can't be read ({error.strerror}); going on without it")
        return []
    found: list[Entry] = []
    damaged: list[int] = []
    # Not `splitlines`: a label or a text may hold U+2028, which JSON does not escape.
    lines = content.split(b"\n")
    for number, text in enumerate(lines, 1):
        line = _entry(text, needed)
        if line is not None:
            found.append(line)
        elif text.strip() and number < len(lines):  # a kill leaves half of the last line: nothing to warn about
            damaged.append(number)
    if damaged:
        many = f"{len(damaged)} damaged lines are" if len(damaged) > 1 else "a damaged line is"
        warn(f"{file}:{damaged[0]}: {many} left out")
    return found


def _entry(text: bytes, needed: str) -> Entry | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and isinstance(line.get("step"), int) and needed in line else None
