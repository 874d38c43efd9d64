"""What a person sees on the terminal: one short line a log, on rank 0 only."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_finetune.tracking.journal import Entry, Watcher


def say(text: str) -> None:
    """Print one line at once; where nobody reads any more (`| head`), the run goes on in silence."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except (BrokenPipeError, ValueError, AttributeError):  # closed while running, or from the start
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - for the rest of the process


def warn(text: str) -> None:
    """Say on stderr that something is wrong that stops nothing."""
    with suppress(BrokenPipeError, ValueError, AttributeError):
        sys.stderr.write(f"hf_finetune: warning: {text}\n")


class Console(Watcher):
    """Prints progress.

    Args:
        headline: Evaluation metrics to show, in this order, where the task has them.
    """

    def __init__(self, headline: tuple[str, ...]) -> None:
        self.headline = headline
        self._started = 0.0

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock for the time left; an evaluation before the first step does not count."""
        self._started = self._started or time.perf_counter()

    def see(self, line: Entry, state: TrainerState) -> None:
        """Print a line."""
        say(self._train(line, state) if line["phase"] == "train" else self._scores(line))

    def _train(self, line: Entry, state: TrainerState) -> str:
        left = (time.perf_counter() - self._started) * (state.max_steps / max(state.global_step, 1) - 1)
        parts = [
            f"step {line['step']}/{state.max_steps}",
            f"epoch {line['epoch']:.2f}",
            f"loss {line['loss']:.4f}",
            f"grad norm {line['grad_norm']:.3g}" if "grad_norm" in line else "",
            f"lr {line['learning_rate']:.2e}",
            f"{line['samples_per_second']:.1f} samples/s" if "samples_per_second" in line else "",
            f"{line['tokens_per_second']:.0f} tokens/s" if "tokens_per_second" in line else "",
            f"{clock(left)} left",
        ]
        return "  ".join(part for part in parts if part)

    def _scores(self, line: Entry) -> str:
        shown = [f"{name} {line[name]:.4f}" for name in self.headline if name in line]
        return "  ".join([f"{line['phase']:>4} at step {line['step']}", *shown])


def clock(seconds: float) -> str:
    """`75` -> `1:15`, `3675` -> `1:01:15`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
