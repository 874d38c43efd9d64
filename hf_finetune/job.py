"""What is trained on what: the batches of a run, and the task and adapter that learn from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader, Dataset

from hf_finetune import batching

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from hf_finetune.adapters import Adapter
    from hf_finetune.hardware import EvalBatch
    from hf_finetune.tasks.base import Batch, Questions, Targets, Task

COUNTS = ("tokens", "squares", batching.STREAMED)
"""What the loader of training batches adds to them, and no model takes."""
SAMPLE_ROWS = 8
"""Rows of a batch that is looked at besides training."""


@dataclass(frozen=True)
class Job:
    """What is trained on what: everything the trainer needs besides the model and its arguments."""

    task: Task
    targets: Targets
    adapter: Adapter
    tokenizer: Any
    train: Dataset[Any]
    """`Rows`, `PackedRows` or `StreamedBatches`."""
    validation: Any
    """Encoded rows that are evaluated during training, or None."""
    batches: batching.GlobalBatches | None
    """Batch sampler of `train`; None for a stream."""
    division: batching.Division
    eval_batch: EvalBatch
    questions: Mapping[str, Questions | None]
    """What the model is asked when a split (`validation`, `test`) is evaluated."""
    packed: bool
    """Whether rows of `train` are lists of documents."""

    def loader(self, *, pin: bool = False) -> DataLoader[Any]:
        """Loader of this rank's micro-batches."""
        return batching.train_loader(
            self.train, self.batches, self.task.collator(self.tokenizer, packed=self.packed), pin=pin
        )

    def sample(self, device: torch.device) -> Iterator[Batch]:
        """Training batches on a device: the same on every rank, whatever the micro-batch."""
        division = batching.Division(SAMPLE_ROWS, SAMPLE_ROWS)
        batches = None if self.batches is None else batching.GlobalBatches(self.batches.lengths, division, seed=0)
        train = self.train
        if isinstance(train, batching.StreamedBatches):
            train = batching.StreamedBatches(train.stream, division, train.seed)
        collator = self.task.collator(self.tokenizer, packed=self.packed)
        for batch in batching.train_loader(train, batches, collator, pin=False):
            yield {key: value.to(device) for key, value in batch.items() if key not in COUNTS}

    def typical(self, device: torch.device, count: int) -> list[Batch]:
        """Micro-batches of this run on a device, from short rows to long ones: the same on every rank."""
        division = replace(self.division, rank=0)
        collator = self.task.collator(self.tokenizer, packed=self.packed)
        train: Any = self.train
        if self.batches is None:
            stream = batching.StreamedBatches(train.stream, division, train.seed)
            batches = list(islice(batching.train_loader(stream, None, collator, pin=False), count))
        else:
            first = batching.GlobalBatches(self.batches.lengths, division, self.batches.seed)
            shares = [division.share(batch)[0] for batch in first.spread(count)]
            batches = [collator([train[row] for row in rows]) for rows in shares]
        return [{key: value.to(device) for key, value in batch.items() if key not in COUNTS} for batch in batches]

    def probe(self, device: torch.device) -> Batch:
        """A few training rows as one plain batch, never packed: what any user of the saved model would feed it."""
        if not isinstance(self.train, batching.Rows | batching.PackedRows):
            return next(self.sample(device))
        rows = self.train if isinstance(self.train, batching.Rows) else self.train.rows
        batch = self.task.collator(self.tokenizer)([rows[index] for index in range(min(SAMPLE_ROWS, len(rows)))])
        return {key: value.to(device) for key, value in batch.items()}
