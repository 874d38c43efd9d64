"""Callbacks of the Trainer that write numbers down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from hf_finetune.runfolder import Status
from hf_finetune.tracking import journal
from hf_finetune.tracking.journal import Entry


class MetricsCallback(TrainerCallback):
    """See every log as a line of metrics.jsonl."""

    def see(self, line: Entry, state: TrainerState) -> None:
        """Use a line."""
        raise NotImplementedError

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Pass the line on, if the log holds metrics."""
        line = journal.entry(logs or {}, state.global_step, state.epoch)
        if line is not None:
            self.see(line, state)


class Journal(MetricsCallback):
    """Write metrics.jsonl on rank 0, and keep its lines in memory on every rank.

    Args:
        file: `metrics.jsonl` of the run folder.
        writes: True on rank 0.
    """

    def __init__(self, file: Path, *, writes: bool) -> None:
        self.file = file
        self.writes = writes
        self.entries: list[Entry] = []
        self._appender = journal.Appender(file)

    def keep(self, lines: int) -> None:
        """Resume after so many lines; what an earlier process wrote after its last checkpoint comes again."""
        if self.writes:
            journal.keep_lines(self.file, lines)
            self.entries = journal.read(self.file)

    def add(self, line: Entry) -> None:
        """Append a line."""
        self.entries.append(line)
        if self.writes:
            self._appender.append(line)

    def see(self, line: Entry, state: TrainerState) -> None:
        """Write the line."""
        self.add(line)


class Progress(TrainerCallback):
    """Pass the number of finished steps to the heartbeat of status.json."""

    def __init__(self, status: Status) -> None:
        self.status = status

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note the step; the next heartbeat writes it."""
        self.status.step = state.global_step
