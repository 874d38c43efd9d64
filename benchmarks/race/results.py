"""What is kept: one JSON file a measurement. What is there is not measured again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


def plan(workload: str, digest: str, systems: tuple[str, ...], seeds: int) -> list[Measurement]:
    """All measurements of a workload, in the order in which they are made: every second round backwards."""
    found = []
    for seed in range(1, seeds + 1):
        order = systems if seed % 2 else systems[::-1]
        found += [Measurement(workload, digest, system, seed) for system in order]
    return found
