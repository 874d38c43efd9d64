"""Real rows on which models of a merge are compared: by their logits on a few, by the task's metrics on all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from hf_finetune.data import batches, prepare
from hf_finetune.errors import DataError, ModelError
from hf_finetune.inference.load import Finished, Predict
from hf_finetune.log import phase, say, warn
from hf_finetune.tasks.base import Batch

# Rows whose logits are compared.
PROBED = 16
# Tokens of a row whose logits are compared: those of a whole row of a language model are gigabytes.
POSITIONS = 64

Logits = Callable[[Batch], torch.Tensor]  # a batch without labels -> logits (B, C) or (B, T, V)


@dataclass(frozen=True)
class Rows:
    """Encoded rows."""

    run: Finished
    encoded: Any
    split: str  # of the recipe, or `data` where files were given
    sources: tuple[dict[str, str], ...]  # name and SHA-256 of what they were read from
    whole: int  # how many rows there are; those above are the first of them

    def probes(self) -> list[Batch]:
        """A few rows from short to long, without labels: padded together, but one by one where logits are large."""
        task = self.run.recipe.task
        order: list[int] = batches.lengths_of(self.encoded).argsort(kind="stable").tolist()
        count = min(PROBED, len(order))
        chosen = [order[place * (len(order) - 1) // max(1, count - 1)] for place in range(count)]
        groups = [[index] for index in chosen] if task.vocabulary(self.run.tokenizer) else [chosen]
        rows = batches.Rows(self.encoded, task)
        return [task.inputs(self.run.collate([rows[index] for index in group])) for group in groups]


@contextmanager
def opened(run: Finished, files: Sequence[str], most: int) -> Iterator[Rows]:
    """Read and encode the first `most` rows of the files, else of the validation split, else of the training split."""
    split = None if files else "validation" if run.recipe.data.has_validation else "train"
    try:
        with prepare.opened(run.recipe, run.tokenizer, run.targets, split=split, files=files, phase=phase) as found:
            for problem in found.warnings:
                warn(str(problem))
            encoded: Any = found.encoding.rows()
            used = min(len(encoded), most)
            name = split or "data"
            if used < len(encoded):
                say(f"note: comparing on the first {used:,} of {len(encoded):,} {name} rows; --rows N takes more")
            sources = tuple({"name": Path(one["source"]).name, "sha256": one["sha256"]} for one in found.sources)
            yield Rows(run, encoded.select(range(used)), name, sources, len(encoded))
    except DataError as error:
        if files:
            raise
        hint = "; rows to compare on can also be given with --data FILE"
        raise DataError(replace(one, message=one.message + hint) for one in error.problems) from error


def logits_of(network: Any) -> Logits:
    """Make logits with a network: without gradients, in its own dtype, no cache kept."""
    inner = network.get_base_model() if hasattr(network, "get_base_model") else network
    options = {"use_cache": False} if hasattr(network.config, "use_cache") and inner.can_generate() else {}

    def run(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            inputs = {name: value.to(network.device) for name, value in batch.items()}
            logits: torch.Tensor = network(**inputs, **options).logits
            return logits

    return run


def logits(model: Logits, probes: Sequence[Batch]) -> list[torch.Tensor]:
    """Return the logits of each probe in float32 on the CPU: (B, C), or (1, `POSITIONS` at most, V)."""
    found = []
    for batch in probes:
        values = model(batch).detach().cpu()
        if values.ndim == 3:
            places = torch.linspace(0, values.shape[1] - 1, min(POSITIONS, values.shape[1])).round().long()
            values = values[:, places]
        found.append(values.float())
    return found


def difference(one: Sequence[torch.Tensor], two: Sequence[torch.Tensor]) -> float:
    """The largest difference of two logits, as a share of the largest logit of the first; infinite where one is NaN."""
    scale = max(max(float(values.abs().max()) for values in one), 1e-6)
    apart = max(float((a - b).abs().max()) for a, b in zip(one, two, strict=True)) / scale
    return apart if math.isfinite(apart) else math.inf


def refuse(apart: float, tolerance: float, what: str, hint: str) -> None:
    """Stop where a difference is over its tolerance."""
    if not apart <= tolerance:
        reason = f"logits differ by {apart:.2g} of the largest, more than {tolerance:g}"
        raise ModelError(f"{what}: {reason}; nothing was written; {hint}")


def predictor(model: Logits, run: Finished, device: Any = "cpu") -> Predict:
    """Predict with whatever gives logits on a device."""

    def predict(batch: Batch) -> dict[str, torch.Tensor]:
        moved = {name: value.to(device) for name, value in batch.items()}
        return run.recipe.task.predict(lambda **inputs: SimpleNamespace(logits=model(inputs)), moved, run.targets)

    return predict


def plain(network: Any, run: Finished) -> Predict:
    """Predict with a network as transformers runs it."""
    return predictor(logits_of(network), run, network.device)


def metrics(name: str, rows: Rows, predict: Predict) -> dict[str, float]:
    """Compute the task's metrics on all rows of the model called `name`."""
    with phase(f"evaluating {name}", len(rows.encoded), "rows") as shown:
        found = rows.run.predictions(rows.encoded, predict, shown, all_logits=True)
    return rows.run.recipe.task.metrics(found, rows.run.targets)
