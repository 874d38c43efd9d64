"""Real rows, of the run's data or of files, on which the merged model is compared with the run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune import batching, hardware
from hf_finetune.data import onesplit
from hf_finetune.data.onesplit import Wish
from hf_finetune.errors import DataError
from hf_finetune.terminal import phase, say, warn

if TYPE_CHECKING:
    from hf_finetune.finished import Finished
    from hf_finetune.merging.options import Options
    from hf_finetune.tasks.base import Batch

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
        most = hardware.eval_batch(recipe, machine, self._vocabulary)
        division = batching.Division(most.rows, most.rows)
        rows = batching.Rows(self.encoded, recipe.task)
        tokens = most.budget(all_logits=True)
        yield from batching.eval_loader(rows, batching.lengths_of(self.encoded), division, self._collate, tokens)

    def probes(self) -> list[Batch]:
        """A few rows from short to long, without labels: padded together, but one by one where logits are large."""
        order: list[int] = batching.lengths_of(self.encoded).argsort(kind="stable").tolist()
        count = min(PROBED, len(order))
        chosen = [order[place * (len(order) - 1) // max(1, count - 1)] for place in range(count)]
        rows = batching.Rows(self.encoded, self.run.recipe.task)
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
        with onesplit.opened(run.recipe, run.tokenizer, run.targets, Wish(split, options.data), phase) as found:
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
