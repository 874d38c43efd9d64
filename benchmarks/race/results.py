"""What is kept: one JSON file a measurement. What is there is not measured again."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = "hf_finetune"
Result = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """One system on one workload with one seed."""

    workload: str
    digest: str
    """Of the workload's settings and data; other settings are another measurement."""
    system: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.workload}/{self.system}-seed{self.seed}-{self.digest}"


@dataclass(frozen=True)
class Store:
    """A folder of results."""

    folder: Path

    def file(self, measurement: Measurement) -> Path:
        """Where its result is, or will be."""
        return self.folder / f"{measurement.name}.json"

    def log(self, measurement: Measurement) -> Path:
        """Where its output goes."""
        file = self.folder / f"{measurement.name}.log"
        file.parent.mkdir(parents=True, exist_ok=True)
        return file

    def get(self, measurement: Measurement) -> Result | None:
        """The result, or None where it was not measured."""
        file = self.file(measurement)
        if not file.exists():
            return None
        found: Result = json.loads(file.read_text(encoding="utf-8"))
        return found

    def put(self, measurement: Measurement, result: Result) -> None:
        """Write the result; whole or not at all."""
        file = self.file(measurement)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        temporary.replace(file)

    def forget(self, measurement: Measurement) -> None:
        """So that it is measured again."""
        self.file(measurement).unlink(missing_ok=True)


def plan(workloads: Sequence[tuple[str, str, tuple[str, ...]]], seeds: int) -> list[Measurement]:
    """All measurements in the order in which they are made: round after round, every second one backwards.

    In a round the workloads take turns, so that each has had its first systems before any has its last.

    Args:
        workloads: Name, digest, systems.
        seeds: Rounds.
    """
    found = []
    for seed in range(1, seeds + 1):
        columns = [
            [Measurement(name, digest, system, seed) for system in systems] for name, digest, systems in workloads
        ]
        order = [found for row in itertools.zip_longest(*columns) for found in row if found is not None]
        found += order if seed % 2 else order[::-1]
    return found
