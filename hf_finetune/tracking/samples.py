"""Answers of a language model to fixed prompts at each evaluation, for people to read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState, TrainingArguments

from hf_finetune.tasks._generation import answer_together
from hf_finetune.tasks.base import Prompts
from hf_finetune.tracking.journal import Appender
from hf_finetune.tracking.tensorboard import Board


class Samples(TrainerCallback):
    """Write answers into `samples.jsonl` and under TensorBoard's Text tab; all ranks generate, rank 0 writes.

    Args:
        prompts: What is answered, and how long answers may be.
        tokenizer: The model's tokenizer.
        file: `samples.jsonl` of the run folder.
        writes: True on rank 0.
        board: Shows the answers too.
    """

    def __init__(self, prompts: Prompts, tokenizer: Any, file: Path, *, writes: bool, board: Board | None) -> None:
        self.prompts, self.limit = prompts.prompts, prompts.max_new_tokens
        self.tokenizer, self.writes, self.board = tokenizer, writes, board
        self._appender = Appender(file)
        self._step = -1

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Answer the prompts with the model as it is now; once a step, however many splits are evaluated."""
        if state.global_step == self._step:
            return
        self._step = state.global_step
        model = kwargs["model"]
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast(model.device.type, dtype=dtype, enabled=args.bf16 or args.fp16):
            answers = answer_together(model, self.tokenizer, self.prompts, max_new_tokens=self.limit)
        if not self.writes:
            return
        lines = [
            {"step": self._step, "prompt": self.tokenizer.decode(prompt), "answer": answer.text, "ended": answer.ended}
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]
        self._appender.append(*lines)
        if self.board is not None:
            self.board.add_samples(lines, self._step)
