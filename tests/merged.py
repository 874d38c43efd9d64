"""Finished runs of every kind without a training run, and their merged folders, for the tests of merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from models import batch, build, machine, train

from hf_finetune.device import Precision
from hf_finetune.inference import saving, weights
from hf_finetune.inference.load import Finished
from hf_finetune.models import pretrained
from hf_finetune.recipe import Recipe
from hf_finetune.run.folder import RunFolder
from hf_finetune.tasks.base import State


def finished(made: Recipe, targets: State, place: Path, precision: Precision = "fp32") -> Finished:
    """A model of the recipe, trained for a few steps and saved, as a run that is done."""
    adapted = build(made, targets, precision)
    train(adapted, made)
    tokenizer = pretrained.load_tokenizer(made.model)
    saving.save(adapted, made, targets, tokenizer, place / "adapter")
    return Finished(RunFolder(str(place)), made, machine(precision), targets, tokenizer)


def rows(run: Finished) -> Any:
    """Rows of random tokens, of several lengths."""
    made = batch(run.tokenizer, 8)["input_ids"].tolist()
    ids = [row[: 3 + index] for index, row in enumerate(made)]
    language = run.recipe.task.predicts_next_token
    labels: Any = ids if language else [index % max(1, len(run.targets.names)) for index in range(len(ids))]
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": labels, "size": [len(row) for row in ids]})


def written(run: Finished, place: Path, dtype: Precision = "fp32", shard_size: str = "5GB") -> tuple[Any, str]:
    """The run's merged folder, its model in memory, and what the adapter was merged into."""
    adapted, into = weights.adapted(run)
    network = weights.merged(adapted)
    place.mkdir(parents=True)
    weights.write(network, run, dtype, shard_size, place)
    return network, into


def plain(place: Path, made: Recipe, **options: Any) -> Any:
    """The folder as anyone loads it."""
    network = getattr(transformers, made.task.auto_model).from_pretrained(place, **options)
    return network.eval()


def logits(network: Any, run: Finished) -> torch.Tensor:
    """Of the first probe of `rows`."""
    probe = weights.probes(run, rows(run))[0]
    with torch.no_grad():
        found: torch.Tensor = network(**probe).logits.float()
    return found
