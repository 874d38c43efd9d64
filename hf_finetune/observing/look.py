"""One evaluation as it is watched: what is collected on the way, and the records that come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import reduce

from hf_finetune.batching import lengths_of
from hf_finetune.observing import embeddings, predictions, tokens, weights
from hf_finetune.records import Record
from hf_finetune.tasks.causal_lm import CausalLM

if TYPE_CHECKING:
    from hf_finetune.observing.occasion import Occasion
    from hf_finetune.observing.predictions import Judged, Split
    from hf_finetune.schema.watching import Tracking
    from hf_finetune.tasks.base import Batch, Targets, Task

Array = np.ndarray[Any, Any]

LABEL_TEXT = 120
"""Characters of a text beside an embedding."""


@dataclass(frozen=True)
class Subject:
    """What is evaluated, and what of it is wanted."""

    task: Task
    targets: Targets
    tokenizer: Any
    tracking: Tracking
    model: Any
    """Not wrapped for distribution."""
    is_main: bool
    is_sharded: bool


class Look:
    """Watches one evaluation; every rank has one and calls it alike, rank 0 makes the records.

    Args:
        subject: What is evaluated.
        occasion: Which evaluation this is.
        split: Its rows.
        tell: Takes each record, on rank 0.
    """

    def __init__(self, subject: Subject, occasion: Occasion, split: Split, tell: Callable[[Record], None]) -> None:
        self.subject, self.occasion, self.split, self.tell = subject, occasion, split, tell
        self.by_position: torch.Tensor | None = None
        """Sums (2, T) that `Task.eval_rows` adds to; None where nobody wants them."""
        self._inputs = self._head_inputs()
        self._ids: Array = np.zeros(0, dtype=np.int64)
        self._rows: Array = np.zeros((0, 0), dtype=np.float32)
        self._token_rows: list[dict[str, Any]] = []
        if isinstance(subject.task, CausalLM) and occasion.is_due(subject.tracking.images):
            longest = int(lengths_of(split.encoded).max(initial=0))
            device = subject.model.device
            dtype = torch.float32 if device.type == "mps" else torch.float64
            self.by_position = torch.zeros(2, longest, dtype=dtype, device=device)

    def _head_inputs(self) -> embeddings.HeadInputs | None:
        subject, tracking = self.subject, self.subject.tracking
        if isinstance(subject.task, CausalLM) or subject.is_sharded or not self.occasion.is_due(tracking.embeddings):
            return None
        head = embeddings.find_head(subject.model, len(subject.targets.names))
        if head is None:
            return None
        rows = embeddings.chosen(len(self.split.encoded), tracking.embedding_rows)
        return embeddings.HeadInputs(head, rows, subject.model.config.pad_token_id)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the split is evaluated; the records are made where that comes to its end."""
        with nullcontext() if self._inputs is None else self._inputs.listening():
            yield
        self._conclude()

    def announce(self, batch: Batch) -> None:
        """Say which batch comes next, still on the CPU."""
        if self._inputs is not None:
            self._inputs.announce(batch["row_ids"], batch["input_ids"])

    def score(self, ids: Array, rows: Array, collate: Callable[[list[Any]], Batch]) -> dict[str, float]:
        """Take what was found of every row, in order; returns metrics that come of looking closer.

        Args:
            ids: (N,) numbers of the rows.
            rows: (N, K), what the task's metrics get.
            collate: Makes a batch of encoded rows.
        """
        self._ids, self._rows = ids, rows
        subject, tracking = self.subject, self.subject.tracking
        wanted = isinstance(subject.task, CausalLM) and self.occasion.is_due(tracking.examples)
        if not wanted or subject.is_sharded or not subject.is_main:
            return {}

        def forward(row: dict[str, Any]) -> torch.Tensor:
            device = subject.model.device
            batch = {key: value.to(device) for key, value in collate([row]).items() if key != "labels"}
            with torch.no_grad():
                logits: torch.Tensor = subject.model(**batch).logits
            return logits[0]

        self._token_rows = tokens.rows(forward, subject.tokenizer, self.split.encoded, tracking.example_rows)
        entropy = tokens.mean_entropy(self._token_rows)
        return {} if entropy is None else {"example_entropy": entropy}

    def _conclude(self) -> None:
        """Gather what each rank has, and make the records."""
        sums = None if self.by_position is None else reduce(self.by_position, reduction="sum")
        vectors = None if self._inputs is None else self._inputs.gather()
        if not self.subject.is_main or not len(self._ids):
            return
        subject, due, tracking = self.subject, self.occasion.is_due, self.subject.tracking
        is_classifier = not isinstance(subject.task, CausalLM)
        facts = predictions.facts(subject.task, subject.targets, self.split)
        self._tell("predictions", {"ids": self._ids, "rows": self._rows}, facts)
        if is_classifier and (due(tracking.examples) or vectors is not None):
            judged = predictions.judge(subject.task, subject.targets, self._ids, self._rows)
            if due(tracking.examples):
                self._tell("examples", {}, predictions.worst(subject.task, self.split, judged, tracking.example_rows))
            if vectors is not None and len(vectors[0]):
                self._tell("embeddings", *self._projected(*vectors, judged))
        if sums is not None and sums.numel():
            self._tell("positions", tokens.positions(sums.cpu().numpy()), {})
        if self._token_rows:
            self._tell("tokens", {}, {"rows": self._token_rows})
        # At other evaluations `WeightWatch` has seen the step before, too.
        of_nothing_else = self.occasion.phase == "final" or self.occasion.step == 0
        if of_nothing_else and self.occasion.phase != "test" and due(tracking.histograms) and not subject.is_sharded:
            held = weights.modules(subject.model)
            self.tell(weights.record(self.occasion.phase, self.occasion.step, held, None))

    def _projected(self, ids: Array, vectors: Array, judged: Judged) -> tuple[dict[str, Array], dict[str, Any]]:
        """Arrays and facts of the record `embeddings`; masked rows have no label and are left out."""
        truth = dict(zip(judged.places.tolist(), judged.truth, strict=True))
        kept = np.array([int(index) in truth for index in ids], dtype=bool)
        numbers = ids[kept].tolist()
        texts = self.split.texts(self.subject.task, numbers, LABEL_TEXT)
        facts = {"labels": [truth[number] for number in numbers], "texts": texts}
        return {"vectors": vectors[kept], "ids": ids[kept]}, facts

    def _tell(self, kind: str, arrays: dict[str, Array], facts: dict[str, Any]) -> None:
        self.tell(Record(kind, self.occasion.phase, self.occasion.step, arrays, facts))
