"""Scalars and texts for TensorBoard, through tensorboardX, on rank 0 only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from transformers import TrainerState

from hf_finetune.tracking.console import warn
from hf_finetune.tracking.journal import Entry, Watcher

FLUSH_SECONDS = 10
QUEUE = 10_000
"""Events that may wait for the disk before training does."""


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
            self._writer = SummaryWriter(logdir=str(self.folder), flush_secs=FLUSH_SECONDS, max_queue=QUEUE)
            self._shield(self._writer)
            for tag, text in self.texts.items():
                self._writer.add_text(tag, text, 0)
        return self._writer

    def see(self, line: Entry, state: TrainerState) -> None:
        """Write every number of a line."""
        self.add(line)

    def add(self, line: Entry) -> None:
        """Write every number of a line."""
        for key, value in line.items():
            if key not in {"step", "phase"} and isinstance(value, int | float):
                self.writer.add_scalar(f"{line['phase']}/{key}", value, line["step"])

    def add_text(self, tag: str, text: str, step: int) -> None:
        """Write a markdown text."""
        self.writer.add_text(tag, text, step)

    def _shield(self, writer: SummaryWriter) -> None:
        """Keep a disk that can't be written from doing any harm.

        On a full disk the thread of tensorboardX 2.6 that writes events dies, and whoever hands it the next ones waits
        for ever (the same in tensorboard: https://github.com/tensorflow/tensorboard/issues/6167).
        """
        records: Any = writer.file_writer.event_writer._ev_writer

        def shielded(method: Callable[..., None]) -> Callable[..., None]:
            def call(*arguments: Any) -> None:
                try:
                    method(*arguments)
                except (OSError, ValueError) as error:  # ValueError: closed after it failed
                    if not self._is_broken:
                        reason = getattr(error, "strerror", None) or error
                        warn(f"{self.folder} can't be written ({reason}): events are lost, training goes on")
                    self._is_broken = True

            return call

        for name in ("write_event", "flush", "close"):
            setattr(records, name, shielded(getattr(records, name)))

    def close(self) -> None:
        """Flush and close the event file; later calls do nothing."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
