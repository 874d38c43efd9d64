"""Scalars and texts for TensorBoard, through tensorboardX, on rank 0 only."""

from __future__ import annotations

from pathlib import Path

from tensorboardX import SummaryWriter
from transformers import TrainerState

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
        self.purge_step: int | None = None
        """Readers drop earlier events from this step on: the run was resumed before it."""
        self._writer: SummaryWriter | None = None

    @property
    def writer(self) -> SummaryWriter:
        """The tensorboardX writer, opened at its first use."""
        if self._writer is None:
            self._writer = SummaryWriter(logdir=str(self.folder), flush_secs=FLUSH_SECONDS, purge_step=self.purge_step)
            for tag, text in self.texts.items() if self.purge_step is None else ():
                self._writer.add_text(tag, text, 0)
        return self._writer

    def see(self, line: Entry, state: TrainerState) -> None:
        """Write every number of a line."""
        for key, value in line.items():
            if key not in {"step", "phase"} and isinstance(value, int | float):
                self.writer.add_scalar(f"{line['phase']}/{key}", value, line["step"])

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Write a markdown text."""
        self.writer.add_text(tag, text, step)

    def close(self) -> None:
        """Flush and close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
