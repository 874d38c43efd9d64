"""What the micro-batches of a run hold: rows, tokens, padding; the largest of them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from hf_finetune.batching import lengths_of
from hf_finetune.memory import Shapes

if TYPE_CHECKING:
    from hf_finetune.preflight.heavy import Ready

BATCHES_LOOKED_AT = 2_000
"""Global batches of the first epoch from which padding and the largest micro-batch are read."""


@dataclass(frozen=True)
class Load:
    """What the micro-batches of an epoch hold."""

    tokens: int
    """Without padding."""
    cells: int
    """With padding."""
    largest: tuple[int, int]
    """Rows and tokens of the micro-batch with most cells."""

    @property
    def padding(self) -> float:
        """Share of the cells that is padding."""
        return 1.0 - self.tokens / self.cells if self.cells else 0.0


def load(ready: Ready) -> Load:
    """Count rows and padding of the first epoch's micro-batches on every rank; of a stream only what is the most."""
    job, lengths = ready.assignment.job, ready.assignment.lengths
    if job.batches is None or lengths is None:
        return Load(0, 0, (job.division.micro_batch, ready.recipe.data.max_length))
    ranks = [replace(job.division, rank=rank) for rank in range(job.division.world_size)]
    tokens = cells = 0
    largest = (0, 0)
    for batch in itertools.islice(job.batches.global_batches(), BATCHES_LOOKED_AT):
        for rows in itertools.chain.from_iterable(division.share(batch) for division in ranks):
            held: list[int] = lengths[[row for row in rows if row >= 0] or [~rows[0]]].tolist()
            tokens += sum(held)
            cells += len(held) * max(held)
            largest = max(largest, (len(held), max(held)), key=lambda shape: shape[0] * shape[1])
    return Load(tokens, cells, largest)


def shapes(ready: Ready, of: Load) -> Shapes:
    """The largest batches that the model will see."""
    evaluated = [rows for rows in (ready.prepared.validation, ready.prepared.test) if rows is not None]
    most = max((len(rows) for rows in evaluated), default=0)
    longest = max((int(lengths_of(rows).max(initial=0)) for rows in evaluated), default=0)
    all_logits = ready.machine.is_sharded or not ready.recipe.speed.fused_loss
    rows = ready.assignment.job.eval_batch.rows_of(longest, all_logits=all_logits)
    return Shapes(train=of.largest, evaluation=(min(rows, most), longest))
