"""The folder and the workers that encode rows, and their progress, which other processes make."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_finetune.data.splits import Split
from hf_finetune.terminal import Phases, unseen


@dataclass(frozen=True)
class Workplace:
    """Folder, workers and progress display of an encoding."""

    scratch: Path
    """Folder for files that the result is mapped from."""
    workers: int | None = None
    """Processes; None is one a core."""
    phase: Phases = unseen

    @contextmanager
    def tallied(self, split: Split) -> Iterator[Path]:
        """Show how many rows of a split are encoded; gives the file that `note` takes."""
        tally = self.scratch / f"{split.name}.tally"

        def count() -> int:
            try:
                return int(np.fromfile(tally, ">u4").sum())
            except OSError:
                return 0  # not begun, or over

        with self.phase(f"tokenising {split.name}", len(split.rows), "rows") as shown:
            shown.count = count
            yield tally


def note(tally: Path, rows: int) -> None:
    """Note that a batch of so many rows is encoded; any process may, at any time."""
    with tally.open("ab") as stream:
        stream.write(rows.to_bytes(4))
