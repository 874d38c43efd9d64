"""Small recipes, machines and base models for the tests of adapters, model and export."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from hf_finetune.adapters.base import Setting
from hf_finetune.device import Machine, Precision
from hf_finetune.models import load, pretrained
from hf_finetune.models.load import LoadedModel
from hf_finetune.recipe import Recipe
from hf_finetune.tasks.base import Batch, State

TWO = State(names=("negative", "positive"), counts=(5, 5), id_of={"negative": 0, "positive": 1})
FOUR = State(names=("bad", "fine", "good", "<b>|x`"), counts=(1, 2, 3, 4))
CLASSIFIER = {"kind": "text_classification", "text": "text", "label": "label"}
LANGUAGE_MODEL = {"kind": "causal_lm", "text": "text"}


def recipe(name: str, adapter: dict[str, Any], task: dict[str, Any] = CLASSIFIER, **model_keys: Any) -> Recipe:
    """A recipe for the model folder `name`."""
    return Recipe.model_validate(
        {
            "task": task,
            "model": {"name": name, **model_keys},
            "data": {"train": "unused.csv", "max_length": 32},
            "adapter": adapter,
            "training": {"steps": 10, "batch_size": 4, "learning_rate": 1e-3},
            "output": "unused",
        }
    )


def machine(precision: Precision = "fp32") -> Machine:
    """One CPU process."""
    return Machine("cpu", 0, 0, 1, 1, 1, precision, "eager")


def batch(tokenizer: PreTrainedTokenizerBase, rows: int = 4) -> Batch:
    """A padded batch of random tokens with labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(8, len(tokenizer), (rows, 10), generator=generator)
    ids[0, 0] = int(tokenizer.get_vocab()["film"])
    mask = torch.ones_like(ids)
    mask[1, 6:], ids[1, 6:] = 0, int(tokenizer.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 2}


def loaded(made: Recipe, targets: State = TWO, precision: Precision = "fp32") -> LoadedModel:
    """The recipe's base, always with the same head."""
    set_seed(1)
    return load.load(made, targets, machine(precision), pretrained.load_tokenizer(made.model))


def build(made: Recipe, targets: State = TWO, precision: Precision = "fp32", steps: int = 10) -> Any:
    """The recipe's adapted model."""
    base = loaded(made, targets, precision)
    tokenizer = pretrained.load_tokenizer(made.model)
    set_seed(2)
    setting = Setting(
        peft_type=made.task.peft_task,
        tokenizer=tokenizer,
        total_steps=steps,
        head_modules=base.head_modules,
        labels=targets.names,
        batches=lambda: [batch(tokenizer, 8)],
    )
    return load.build(made, base, setting)


def train(adapted: Any, made: Recipe, steps: int = 3) -> None:
    """A few real optimiser steps, large ones, with the adapter's own optimiser, penalty and callbacks."""
    inputs = batch(pretrained.load_tokenizer(made.model))
    labels = inputs.pop("labels")
    options: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.0}
    trained = [p for p in adapted.parameters() if p.requires_grad]
    optimizer = made.adapter.optimizer(adapted, torch.optim.AdamW, options) or torch.optim.AdamW(trained, **options)
    callbacks: list[Any] = list(made.adapter.callbacks())
    adapted.train()
    for step in range(steps):
        logits = adapted(**inputs).logits.float()
        logits = logits if logits.ndim == 2 else logits[:, -1]
        loss: Any = torch.nn.functional.cross_entropy(logits, labels)
        penalty = made.adapter.penalty(adapted)
        (loss if penalty is None else loss + penalty).backward()
        optimizer.step()
        for callback in callbacks:
            state: Any = type("State", (), {"global_step": step})
            callback.on_optimizer_step(None, state, None, model=adapted)
        optimizer.zero_grad()
    adapted.eval()


def logits(network: Any, made: Recipe) -> torch.Tensor:
    """Logits of the fixed batch in eval mode."""
    inputs = batch(pretrained.load_tokenizer(made.model))
    inputs.pop("labels")
    network.eval()
    with torch.no_grad():
        output: torch.Tensor = network(**inputs).logits
    return output.float()
