"""Records: arrays of what was seen of a model at one evaluation, on disk. Charts and reports are drawn from these.

    observations/<kind>/<phase>-<step>.npz

`metrics.jsonl` has the numbers, records have predictions, histograms, losses of tokens. A record is written in one step
and has its place by kind, phase and step, so that a resumed run replaces it. TensorBoard's events can be made again
from both at any time.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hf_finetune.run.files import write_atomically

Array = np.ndarray[Any, Any]
_FACTS = "facts.json"


@dataclass(frozen=True)
class Record:
    """One kind of observation at one step."""

    kind: str
    """`predictions`, `weights`, `tokens`, `data`, ..."""
    phase: str
    """As in metrics.jsonl: eval, final or test; `train` for records that do not belong to an evaluation."""
    step: int
    arrays: Mapping[str, Array] = field(default_factory=dict)
    """By name; of numbers or bools."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Everything else; JSON holds it."""

    def write(self, folder: Path) -> None:
        """Write it below `observations/`; an earlier one of the same kind, phase and step is replaced.

        Raises:
            OSError: The disk is full, or can't be written.
        """
        stream = io.BytesIO()
        text = json.dumps(self.facts, ensure_ascii=False)
        np.savez_compressed(stream, allow_pickle=False, **{_FACTS: np.array(text)}, **self.arrays)
        file = folder / self.kind / f"{self.phase}-{self.step:08}.npz"
        # Without `parents`: a run folder that somebody deleted stays deleted.
        folder.mkdir(exist_ok=True)
        file.parent.mkdir(exist_ok=True)
        write_atomically(file, stream.getvalue())

    @classmethod
    def read(cls, file: Path) -> Record | None:
        """Read a record; None if it is damaged or missing."""
        phase, _, step = file.stem.rpartition("-")
        try:
            with np.load(file, allow_pickle=False) as stored:
                arrays = {name: stored[name] for name in stored.files}
            facts = json.loads(str(arrays.pop(_FACTS)))
            return cls(file.parent.name, phase, int(step), arrays, facts)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None


def files(folder: Path, kind: str = "*") -> list[Path]:
    """List the files of records below `observations/`, by kind, then step."""
    found = [file for file in folder.glob(f"{kind}/*-*.npz") if file.stem.rpartition("-")[2].isdecimal()]
    return sorted(found, key=lambda file: (file.parent.name, step_of(file), file.name))


def step_of(file: Path) -> int:
    """Read the step in a record's file name."""
    return int(file.stem.rpartition("-")[2])


def stored(folder: Path, kind: str = "*") -> Iterator[Record]:
    """Read the records below `observations/`, by kind, then step; damaged ones are left out."""
    for file in files(folder, kind):
        record = Record.read(file)
        if record is not None:
            yield record


def newest(folder: Path) -> dict[tuple[str, str], Record]:
    """Read the newest record of each kind and phase; damaged ones are left out."""
    last = {(file.parent.name, file.stem.rpartition("-")[0]): file for file in files(folder)}
    found = {place: Record.read(file) for place, file in last.items()}
    return {place: record for place, record in found.items() if record is not None}


def forget_after(folder: Path, step: int) -> None:
    """Remove records of later steps, and those of a run's end, which come again when it continues from this step."""
    for file in files(folder):
        if step_of(file) > step or file.stem.partition("-")[0] in ("final", "test"):
            file.unlink(missing_ok=True)
