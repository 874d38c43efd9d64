"""What the model writes: answers to fixed prompts at each evaluation, for people to read."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_finetune.language.generation import Generation, answer_together

if TYPE_CHECKING:
    from datasets import Dataset

    from hf_finetune.tasks.causal_lm import CausalLM
    from hf_finetune.tracking.tensorboard import TensorBoard


TAG = "samples"


def stored(file: Path) -> Iterator[tuple[int, str]]:
    """Step and markdown of each evaluation that `samples.jsonl` holds."""
    if not file.exists():
        return
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for step, group in itertools.groupby(lines, key=lambda line: int(line["step"])):
        pairs = [(line["prompt"], Generation(line["answer"], 0, ended=line["ended"])) for line in group]
        yield step, _table([prompt for prompt, _ in pairs], [answer for _, answer in pairs])


class Samples(TrainerCallback):
    """Writes generations into `samples.jsonl` and under TensorBoard's Text tab; all ranks generate, rank 0 writes.

    Args:
        task: Says which prompts, and how long answers may be.
        tokenizer: The model's tokenizer.
        rows: Raw validation rows.
        file: `samples.jsonl` of the run folder.
        board: Where the texts are shown; None on ranks that write nothing.
    """

    def __init__(self, task: CausalLM, tokenizer: Any, rows: Dataset, file: Path, board: TensorBoard | None) -> None:
        first = rows[: task.sample_prompts] if isinstance(task.sample_prompts, int) else {}
        self.task = task
        self.tokenizer = tokenizer
        self.prompts = task.samples(first, tokenizer)
        self.file = file
        self.board = board
        self._step = -1

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
        if self.board is None:
            return
        prompts = [self.tokenizer.decode(prompt) for prompt in self.prompts]
        with self.file.open("a", encoding="utf-8") as stream:
            for prompt, answer in zip(prompts, answers, strict=True):
                line = {"step": state.global_step, "prompt": prompt, "answer": answer.text, "ended": answer.ended}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.board.add_text(TAG, _table(prompts, answers), state.global_step)


def _table(prompts: list[str], answers: list[Generation]) -> str:
    """Prompts and answers as markdown; indented, so that nothing in them is read as markup."""
    parts = []
    for prompt, answer in zip(prompts, answers, strict=True):
        end = "(ended)" if answer.ended else "(cut off)"
        parts += ["**prompt**", _indented(prompt), f"**answer** {end}", _indented(answer.text), "---"]
    return "\n\n".join(parts)


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines() or [""])
