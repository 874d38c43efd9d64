"""Callbacks of the Trainer that write numbers into files, and show them on the terminal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from hf_finetune import log
from hf_finetune.log.lines import Message, Phase, clock
from hf_finetune.run import journal
from hf_finetune.run.journal import Entry
from hf_finetune.run.status import Status


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


class Console(MetricsCallback):
    """Show training on the terminal, on rank 0: one short line a log, and how far it is.

    Args:
        headline: Evaluation metrics to show, in this order, where the task has them.
    """

    def __init__(self, headline: tuple[str, ...]) -> None:
        self.headline = headline
        self._training = Phase("training", unit="steps", is_told=False)
        self._evaluating: Phase | None = None
        self._has_begun = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Show training; a resumed run starts where it was."""
        self._training.total = state.max_steps
        self._training.done = self._training.first = state.global_step
        log.begin(self._training)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the display away."""
        self._end_evaluation()
        log.end(self._training)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock for the time left; an evaluation before the first step does not count."""
        if not self._has_begun:
            self._has_begun, self._training.started = True, time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note the step; the display looks by itself."""
        self._training.done = state.global_step

    def on_prediction_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count a batch of an evaluation; after the last one come metrics and answers."""
        if self._evaluating is None:
            loader = kwargs.get("eval_dataloader")
            total = None if loader is None else len(loader)
            self._evaluating = log.begin(Phase("evaluating", total, "batches", is_told=False))
        self._evaluating.done += 1

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """End the evaluation's display."""
        self._end_evaluation()

    def _end_evaluation(self) -> None:
        if self._evaluating is not None:
            log.end(self._evaluating)
            self._evaluating = None

    def see(self, line: Entry, state: TrainerState) -> None:
        """Print a line of metrics.jsonl."""
        phase = line["phase"]
        if phase == "train":
            self._training.done = state.global_step
            formats = {
                "loss": "loss {:.4f}",
                "grad_norm": "grad norm {:.3g}",
                "learning_rate": "lr {:.2e}",
                "samples_per_second": "{:.1f} samples/s",
                "tokens_per_second": "{:.0f} tokens/s",
            }
            values = [shown.format(line[name]) for name, shown in formats.items() if name in line]
            self._training.detail = "  ".join(values)
            left = f"{clock(self._training.left() or 0.0)} left"
            text = "  ".join([f"step {line['step']}/{state.max_steps}", f"epoch {line['epoch']:.2f}", *values, left])
        else:
            scores = [f"{name} {line[name]:.4f}" for name in self.headline if name in line]
            text = "  ".join([f"{phase:>4} at step {line['step']}", *scores])
            self._training.outcome = text.strip()
        log.tell(Message(text, phase, fields=line))
