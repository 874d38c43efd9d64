"""What a person sees of training: one short line a log, and how far it is."""

from __future__ import annotations

import time
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_finetune import terminal
from hf_finetune.terminal import Message, Phase, clock
from hf_finetune.tracking.callbacks import MetricsCallback
from hf_finetune.tracking.journal import Entry


class Console(MetricsCallback):
    """Shows progress, on rank 0.

    Args:
        headline: Evaluation metrics to show, in this order, where the task has them.
    """

    def __init__(self, headline: tuple[str, ...]) -> None:
        self.headline = headline
        self._training = Phase("training", unit="steps", is_told=False)
        self._evaluating: Phase | None = None
        self._has_begun = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show training; a run that goes on does so where it was."""
        self._training.total = state.max_steps
        self._training.done = self._training.first = state.global_step
        terminal.begin(self._training)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """It is over."""
        self._end_evaluation()
        terminal.end(self._training)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock for the time left; an evaluation before the first step does not count."""
        if not self._has_begun:
            self._has_begun, self._training.started = True, time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the step; whoever shows it looks by itself."""
        self._training.done = state.global_step

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One more batch of an evaluation; after the last one come metrics and answers."""
        if self._evaluating is None:
            loader = kwargs.get("eval_dataloader")
            total = None if loader is None else len(loader)
            self._evaluating = terminal.begin(Phase("evaluating", total, "batches", is_told=False))
        self._evaluating.done += 1

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The evaluation is over."""
        self._end_evaluation()

    def _end_evaluation(self) -> None:
        if self._evaluating is not None:
            terminal.end(self._evaluating)
            self._evaluating = None

    def see(self, line: Entry, state: TrainerState) -> None:
        """Say a line of metrics.jsonl."""
        phase = line["phase"]
        if phase == "train":
            self._training.done = state.global_step
            values = self._values(line)
            self._training.detail = "  ".join(values)
            left = f"{clock(self._training.left() or 0.0)} left"
            text = "  ".join([f"step {line['step']}/{state.max_steps}", f"epoch {line['epoch']:.2f}", *values, left])
        else:
            text = self._scores(line)
            self._training.outcome = text.strip()
        terminal.tell(Message(text, phase, fields=line))

    def _values(self, line: Entry) -> list[str]:
        parts = [
            f"loss {line['loss']:.4f}",
            f"grad norm {line['grad_norm']:.3g}" if "grad_norm" in line else "",
            f"lr {line['learning_rate']:.2e}",
            f"{line['samples_per_second']:.1f} samples/s" if "samples_per_second" in line else "",
            f"{line['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in line else "",
        ]
        return [part for part in parts if part]

    def _scores(self, line: Entry) -> str:
        shown = [f"{name} {line[name]:.4f}" for name in self.headline if name in line]
        return "  ".join([f"{line['phase']:>4} at step {line['step']}", *shown])
