"""The `tracking` block: pictures, examples and records for people to look at, made at evaluations.

Numbers always go to metrics.jsonl and TensorBoard; they cost nothing.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from hf_finetune.plugins import Section

Often = Literal[False, "final"] | Annotated[int, Field(ge=1, le=1_000_000)]
"""At every n-th evaluation of a run and at its end; `final`: only at its end; false: never."""


class Tracking(Section):
    """Pictures, examples and records of the model, made at evaluations."""

    tensorboard: bool = True
    """Write TensorBoard events; `hf-finetune tensorboard RUN --rebuild` makes them later from the run folder."""
    folder: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Folder of the events; null means `tensorboard/` in the run folder.

    Another folder, or what tensorboardX can write to: `s3://`, `gs://` with its client installed.
    """
    histograms: Often = 1
    """Adapter weights, gradients, size of the updates, logits and confidence."""
    images: Often = 1
    """Confusion matrix and reliability diagram; PR curves and loss by position."""
    examples: Often = 1
    """Rows as text: the most confidently wrong ones of a classifier, the loss of each token of an LLM."""
    embeddings: Often = "final"
    """Input of a classifier's head for each evaluated row, for the projector."""
    report: bool = True
    """Draw `report.html` and `plots/` at the end of a run; `report.md` is always written."""
    example_rows: Annotated[int, Field(ge=1, le=1000)] = 8
    """Number of rows that `examples` shows."""
    embedding_rows: Annotated[int, Field(ge=3, le=100_000)] = 1000
    """Number of rows that `embeddings` keeps."""

    @model_validator(mode="after")
    def _folder_is_not_ignored(self) -> Self:
        if self.folder is not None and not self.tensorboard:
            raise ValueError("folder would be ignored: tensorboard is false; remove one of them")
        return self


def is_due(often: int | str | bool, evaluation: int, *, last: bool) -> bool:
    """Tell if something is made at the n-th evaluation, from 1; `last` is that of the model that is saved."""
    return often is not False and (last or (isinstance(often, int) and evaluation % often == 0))
