"""Charts of what a model learned: from numbers to a matplotlib figure, from a figure to PNG and SVG.

Pure functions: no pyplot, no state, the same bytes for the same numbers. Importing this is cheap; matplotlib, numpy and
scikit-learn wait until something is drawn. Rows are what `task.metrics` gets, see `Task.eval_rows`.
"""

from hf_finetune.charts.classes import confusion, precision_recall, predicted, reliability
from hf_finetune.charts.language import positions, strength, tokens
from hf_finetune.charts.paper import both, png, svg
from hf_finetune.charts.progress import curves, largest_modules, modules, seconds

__all__ = [
    "both",
    "confusion",
    "curves",
    "largest_modules",
    "modules",
    "png",
    "positions",
    "precision_recall",
    "predicted",
    "reliability",
    "seconds",
    "strength",
    "svg",
    "tokens",
]
