"""Scalars and texts for TensorBoard, through tensorboardX, on rank 0 only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_finetune.tracking.journal import entry

FLUSH_SECONDS = 10


class TensorBoard(TrainerCallback):
    """Writes `train/...`, `eval/...` and `test/...` scalars.

    Args:
        folder: `tensorboard/` of the run folder.
        texts: Tag -> markdown shown under the Text tab, e.g. the recipe.
    """

    def __init__(self, folder: Path, texts: dict[str, str]) -> None:
        self.folder = folder
        self.texts = texts
        self._writer: SummaryWriter | None = None

    @property
    def writer(self) -> SummaryWriter:
        """The tensorboardX writer, opened at its first use."""
        if self._writer is None:
            self._writer = SummaryWriter(logdir=str(self.folder), flush_secs=FLUSH_SECONDS)
            for tag, text in self.texts.items():
                self._writer.add_text(tag, text, 0)
        return self._writer

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write every number of this log."""
        line = entry(logs or {}, state)
        if line is None:
            return
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
