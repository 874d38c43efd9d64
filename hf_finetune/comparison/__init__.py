"""`hf-finetune compare`: runs side by side, from their folders alone; no torch, no model, no data."""

from __future__ import annotations

from collections.abc import Sequence

from hf_finetune.comparison.rendering import render
from hf_finetune.comparison.runs import Run, read
from hf_finetune.comparison.table import Comparison, put_together

__all__ = ["Comparison", "Run", "compare", "render"]


def compare(folders: Sequence[str], *, everything: bool = False) -> Comparison:
    """Put runs side by side.

    Args:
        folders: Run folders.
        everything: Every metric, e.g. those of each class; not only those that a run prints itself.

    Raises:
        RecipeError: A folder holds no run, or its recipe can't be read; all of them are told.
    """
    return put_together(read(folders), everything=everything)
