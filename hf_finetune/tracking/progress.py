"""Tells `status.json` how far training is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

if TYPE_CHECKING:
    from hf_finetune.runfolder import Status


class Progress(TrainerCallback):
    """Hands the number of finished steps to the status file's heartbeat."""

    def __init__(self, status: Status) -> None:
        self.status = status

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Note the step; the next heartbeat writes it."""
        self.status.step = state.global_step
