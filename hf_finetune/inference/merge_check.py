"""Real rows, of the run's data or of files, on which the merged model is compared with the run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import transformers

from hf_finetune.data import batches as data_batches
from hf_finetune.data import prepare
from hf_finetune.data.job import eval_batch
from hf_finetune.data.prepare import Wish
from hf_finetune.errors import DataError, ModelError
from hf_finetune.inference.merge_options import Options
from hf_finetune.log import phase, say, warn
from hf_finetune.models.pretrained import silence
from hf_finetune.tasks.base import Batch

if TYPE_CHECKING:
    from hf_finetune.inference.load import Finished

PROBED = 16
"""Rows whose logits are compared."""


@dataclass(frozen=True)
class Rows:
    """Encoded rows."""

    run: Finished
    encoded: Any
    """`input_ids`, `labels`, `length`, as `datasets` holds them."""
    split: str
    """Which split of the recipe they are, or `data` where files were given."""
    sources: tuple[dict[str, str], ...]
    """Name and SHA-256 of what they were read from."""
    whole: int
    """How many rows there are; those above are the first of them."""

    def batches(self) -> Iterator[Batch]:
        """All rows, of like length together."""
        recipe, machine = self.run.recipe, self.run.machine
        most = eval_batch(recipe, machine, self._vocabulary)
        division = data_batches.Division(most.rows, most.rows)
        rows = data_batches.Rows(self.encoded, recipe.task)
        tokens = most.budget(all_logits=True)
        yield from data_batches.eval_loader(
            rows, data_batches.lengths_of(self.encoded), division, self._collate, tokens
        )

    def probes(self) -> list[Batch]:
        """A few rows from short to long, without labels: padded together, but one by one where logits are large."""
        order: list[int] = data_batches.lengths_of(self.encoded).argsort(kind="stable").tolist()
        count = min(PROBED, len(order))
        chosen = [order[place * (len(order) - 1) // max(1, count - 1)] for place in range(count)]
        rows = data_batches.Rows(self.encoded, self.run.recipe.task)
        groups = [[index] for index in chosen] if self._vocabulary else [chosen]
        made = [self._collate([rows[index] for index in group]) for group in groups]
        return [self.run.recipe.task.inputs(batch) for batch in made]

    @property
    def _vocabulary(self) -> int:
        return self.run.recipe.task.vocabulary(self.run.tokenizer)

    def _collate(self, rows: list[Any]) -> Batch:
        return self.run.recipe.task.collate(rows, self.run.tokenizer, self.run.targets)


@contextmanager
def opened(run: Finished, options: Options) -> Iterator[Rows]:
    """Read and encode rows: of `--data`, else of the validation split, else of the training split.

    Raises:
        DataError: There are none that can be read.
    """
    split = None if options.data else "validation" if run.recipe.data.has_validation else "train"
    try:
        with prepare.opened(run.recipe, run.tokenizer, run.targets, Wish(split, options.data), phase) as found:
            for problem in found.warnings:
                warn(str(problem))
            encoded: Any = found.encoding.rows()
            used = min(len(encoded), options.rows)
            name = split or "data"
            if used < len(encoded):
                say(f"note: comparing on the first {used:,} of {len(encoded):,} {name} rows; --rows N takes more")
            sources = tuple({"name": Path(one["source"]).name, "sha256": one["sha256"]} for one in found.sources)
            yield Rows(run, encoded.select(range(used)), name, sources, len(encoded))
    except DataError as error:
        if options.data:
            raise
        hint = "; rows to compare on can also be given with --data FILE"
        raise DataError(replace(one, message=one.message + hint) for one in error.problems) from error


# How far two models' logits are apart, and what the task's metrics say of a model: whatever runs it.

Predict = Callable[["Batch"], dict[str, torch.Tensor]]
Logits = Callable[["Batch"], torch.Tensor]
"""A batch without labels -> logits (B, C) or (B, T, V)."""

POSITIONS = 64
"""Tokens of a row whose logits are compared: those of a whole row of a language model are gigabytes."""


def logits(model: Logits, probes: Sequence[Batch]) -> list[torch.Tensor]:
    """Logits of each probe in float32 on the CPU: (B, C), or (1, `POSITIONS` at most, V)."""
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
    """Stop where a difference is over its tolerance.

    Raises:
        ModelError: It is.
    """
    if not apart <= tolerance:
        reason = f"logits differ by {apart:.2g} of the largest, more than {tolerance:g}"
        raise ModelError(f"{what}: {reason}; nothing was written; {hint}")


def metrics(name: str, rows: Rows, predict: Predict) -> dict[str, float]:
    """The task's metrics on all rows.

    Args:
        name: What is evaluated, for the display.
        rows: On what.
        predict: Predictions of a batch, of the model that is evaluated.
    """
    with phase(f"evaluating {name}", len(rows.encoded), "rows") as shown:
        found = data_batches.predicted(rows.batches(), predict, shown)
    return rows.run.recipe.task.metrics(found, rows.run.targets)


def predictor(model: Logits, run: Finished) -> Predict:
    """Predictions of whatever gives logits."""
    task = run.recipe.task
    return lambda batch: task.predict(lambda **inputs: SimpleNamespace(logits=model(inputs)), batch, run.targets)


# The folder as anyone loads it: plain transformers, nothing of this project's own.

ROOM = 1.5
"""Memory that a GPU must have free, as a multiple of the weights: activations need some, too."""


def load(folder: Path, run: Finished, **options: Any) -> Any:
    """The model in the folder, in eval mode, on the run's device where it fits there.

    Args:
        folder: A model folder.
        run: Says which class, and where to put it.
        options: More of `from_pretrained`.

    Raises:
        ModelError: It does not load, or not from this folder alone.
    """
    auto = getattr(transformers, run.recipe.task.auto_model)
    with silence():
        try:
            network, info = auto.from_pretrained(
                str(folder),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
                **options,
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(f"what was written does not load in transformers: {reason}; report it") from error
    lost = sorted({*info["missing_keys"], *info["unexpected_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if lost:
        raise ModelError(f"what was written does not load whole in transformers, e.g. {lost[0]}; report it")
    return put(network, run.machine.device).eval()


def put(network: Any, device: str) -> Any:
    """Move a model to the device, or leave it on the CPU where a GPU has no room for it."""
    needed = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    if device == "cuda" and torch.cuda.mem_get_info()[0] <= ROOM * needed:
        return network.to("cpu")
    return network.to(device)


def logits_of(network: Any) -> Logits:
    """How a network gives logits: without gradients, in its own dtype, no cache kept."""
    options = {"use_cache": False} if hasattr(network.config, "use_cache") and _caches(network) else {}

    def run(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            inputs = {name: value.to(network.device) for name, value in batch.items()}
            logits: torch.Tensor = network(**inputs, **options).logits
            return logits

    return run


def predictor_plain(network: Any, run: Finished) -> Predict:
    """Predictions by a network."""
    logits, device = logits_of(network), network.device
    predict = predictor(logits, run)
    return lambda batch: predict({name: value.to(device) for name, value in batch.items()})


def _caches(network: Any) -> bool:
    """Whether it is a decoder, whose forward takes `use_cache`."""
    inner = network.get_base_model() if hasattr(network, "get_base_model") else network
    return bool(inner.can_generate())
