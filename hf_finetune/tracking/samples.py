"""What the model writes: answers to fixed prompts at each evaluation, for people to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_finetune.tasks._generation import answer_together
from hf_finetune.terminal import warn

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_finetune.tasks.causal_lm import CausalLM
    from hf_finetune.tracking.board.board import Board


class Samples(TrainerCallback):
    """Writes generations into `samples.jsonl` and under TensorBoard's Text tab; all ranks generate, rank 0 writes.

    Args:
        task: Says which prompts, and how long answers may be.
        tokenizer: The model's tokenizer.
        rows: Raw validation rows.
        file: `samples.jsonl` of the run folder.
    """

    writes = False
    """Whether this is rank 0."""
    board: Board | None = None
    """Where the answers are shown as well."""

    def __init__(self, task: CausalLM, tokenizer: Any, rows: Dataset, file: Path) -> None:
        first = rows[: task.sample_prompts] if isinstance(task.sample_prompts, int) else {}
        self.task = task
        self.tokenizer = tokenizer
        self.prompts = task.samples(first, tokenizer)
        self.file = file
        self._step = -1
        self._is_lost = False

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Answer the prompts with the model as it is now; once a step, however many splits are evaluated."""
        if state.global_step == self._step:
            return
        self._step = state.global_step
        model = kwargs["model"]
        dtype = torch.bfloat16 if args.bf16 else torch.float16
        with torch.autocast(model.device.type, dtype=dtype, enabled=args.bf16 or args.fp16):
            limit = self.task.max_new_tokens
            answers = answer_together(model, self.tokenizer, self.prompts, max_new_tokens=limit)
        if not self.writes:
            return
        prompts = [self.tokenizer.decode(prompt) for prompt in self.prompts]
        lines = [
            {"step": state.global_step, "prompt": prompt, "answer": answer.text, "ended": answer.ended}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        self._write(lines)
        if self.board is not None:
            self.board.add_samples(lines, state.global_step)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        """Append to the file; a disk that can't be written is told once, and stops nothing."""
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        try:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(text)
        except OSError as error:
            if not self._is_lost:
                warn(f"{self.file} can't be written ({error.strerror}): answers are lost, training goes on")
            self._is_lost = True
