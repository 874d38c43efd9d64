"""`hf-finetune compare`: runs side by side, from their folders alone; no torch, no model, no data."""

from hf_finetune.comparison.rendering import render
from hf_finetune.comparison.runs import Comparison, compare

__all__ = ["Comparison", "compare", "render"]
