"""The workload `preference` of `benchmarks.tasks`: dialogues of which one answer is preferred, by DPO with a LoRA."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PAIRS, HELD_OUT, TURNS, DPO_ROWS, DPO_RATE, BETA = 480, 200, 192, 16, 1e-3, 0.1


def prepare(folder: Path, shared: Path) -> None:
    """Write the dialogues as prompt and answers, those that fit into the tokens of a row."""
    from transformers import AutoTokenizer

    from hf_finetune.tasks._preferences import Reader

    shutil.copytree(shared / "models" / "reviews-llama-12m", folder / "model")
    tokenizer, reader = AutoTokenizer.from_pretrained(folder / "model"), Reader(None, ("chosen", "rejected"), None)
    for name, split, most in (("train", "train", PAIRS), ("validation", "validation", HELD_OUT)):
        found: list[str] = []
        for line in (shared / "data" / "hh-rlhf" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            prompt, chats = reader.chats(json.loads(line))
            answers = [chat.messages[len(prompt.messages) :] for chat in chats]
            render: Any = tokenizer.apply_chat_template
            sizes = [len(render(chat.messages, return_dict=True)["input_ids"]) for chat in chats]
            is_said = all(turn["content"].strip() for chat in chats for turn in chat.messages)
            if is_said and max(sizes) <= TURNS and answers[0] != answers[1] and len(found) < most:
                row = {"prompt": prompt.messages, "chosen": answers[0], "rejected": answers[1]}
                found.append(json.dumps(row) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(found), encoding="utf-8")


def recipe(folder: Path) -> dict[str, Any]:
    """Our recipe."""
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
    return {
        "task": {"kind": "preference", **columns, "beta": BETA, "sample_prompts": 0},
        "model": {"name": str(folder / "model")},
        "data": {"train": str(folder / "train.jsonl"), "max_length": TURNS},
        "adapter": {"kind": "lora", "r": 16, "alpha": 32},
        "training": {"epochs": 1, "batch_size": DPO_ROWS, "learning_rate": DPO_RATE, "warmup_ratio": 0.1},
    }


def by_trl(*more: str) -> Callable[[Path, Path, int], list[str]]:
    """Return the command line of `benchmarks/dpo_trainer.py` with the same settings."""

    def command(folder: Path, output: Path, seed: int) -> list[str]:
        words = {"--folder": folder, "--output": output, "--seed": seed, "--batch-size": DPO_ROWS, "--beta": BETA}
        words |= {"--learning-rate": DPO_RATE, "--max-length": TURNS}
        script = str(Path(__file__).with_name("dpo_trainer.py"))
        return [sys.executable, script, *(str(word) for pair in words.items() for word in pair), *more]

    return command


def score(folder: Path, saved: Path) -> dict[str, float]:
    """Compare a saved adapter with the base on the held-out pairs; before training the accuracy is 50 %, and KL 0."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_finetune.tasks._preferences import divergences
    from hf_finetune.tasks.base import IGNORE, State
    from hf_finetune.tasks.preference import Preference

    auto: Any = AutoModelForCausalLM
    base = auto.from_pretrained(folder / "model", dtype=torch.float32)
    model, tokenizer = (
        PeftModel.from_pretrained(base, str(saved)).eval(),
        AutoTokenizer.from_pretrained(folder / "model"),
    )
    task = Preference(kind="preference", prompt="prompt", chosen="chosen", rejected="rejected")
    rows = [json.loads(line) for line in (folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()]
    right = margin = kl = tokens = 0.0
    for row in rows:
        features = task.features({name: [cell] for name, cell in row.items()}, tokenizer, State(), TURNS)
        batch = task.collate(features, tokenizer, State())
        labels = batch["labels"].flatten(0, 1)[:, 1:]
        counted = labels != IGNORE
        with torch.no_grad():
            own = model(**task.inputs(batch)).logits[:, :-1][counted]
            with model.disable_adapter():
                start = model(**task.inputs(batch)).logits[:, :-1][counted]
        wanted = labels[counted][:, None]
        ratio = (own.log_softmax(-1) - start.log_softmax(-1)).gather(1, wanted)[:, 0]
        chosen = counted.nonzero()[:, 0] == 0
        difference = float(ratio[chosen].sum() - ratio[~chosen].sum())
        right, margin = right + (difference > 0) + 0.5 * (difference == 0), margin + BETA * difference
        kl, tokens = kl + float(divergences(own, start).sum()), tokens + len(ratio)
    return {"accuracy, %": 100 * right / len(rows), "margin": margin / len(rows), "KL, nats a token": kl / tokens}
