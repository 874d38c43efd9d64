"""Scalars and texts for TensorBoard, through tensorboardX, on rank 0 only."""

from __future__ import annotations

import atexit
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from transformers import TrainerState

from hf_finetune.tracking.console import warn
from hf_finetune.tracking.journal import Entry, Watcher

FLUSH_SECONDS = 10


class TensorBoard(Watcher):
    """Writes `train/...`, `eval/...` and `test/...` scalars.

    Args:
        folder: `tensorboard/` of the run folder.
        texts: Tag -> markdown shown under the Text tab, e.g. the recipe.
    """

    def __init__(self, folder: Path, texts: dict[str, str]) -> None:
        self.folder = folder
        self.texts = texts
        self._writer: SummaryWriter | None = None
        self._is_broken = False

    @property
    def writer(self) -> SummaryWriter:
        """The tensorboardX writer, opened at its first use."""
        if self._writer is None:
            self._writer = SummaryWriter(logdir=str(self.folder), flush_secs=FLUSH_SECONDS)
            for tag, text in self.texts.items():
                self._writer.add_text(tag, text, 0)
        return self._writer

    def see(self, line: Entry, state: TrainerState) -> None:
        """Write every number of a line."""
        self.add(line)

    def add(self, line: Entry) -> None:
        """Write every number of a line."""
        if not self._works():
            return
        for key, value in line.items():
            if key not in {"step", "phase"} and isinstance(value, int | float):
                self.writer.add_scalar(f"{line['phase']}/{key}", value, line["step"])

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Write a markdown text."""
        if self._works():
            self.writer.add_text(tag, text, step)

    def _works(self) -> bool:
        """Whether events still reach the disk.

        On a full disk the thread of tensorboardX 2.6 that writes them dies, and whoever hands it anything waits forever
        (in tensorboard: https://github.com/tensorflow/tensorboard/issues/6167).
        """
        if self._is_broken:
            return False
        worker: Any = self.writer.file_writer.event_writer._worker
        if worker.is_alive():
            return True
        self._is_broken = True
        atexit.unregister(self.writer.close)
        warn(f"{self.folder} can't be written: TensorBoard shows nothing from here on, training goes on")
        return False

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None and self._works():
            self._writer.close()
            self._writer = None
