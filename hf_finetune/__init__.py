"""Fine-tune Hugging Face classifiers and LLMs from one YAML recipe.

>>> from hf_finetune import check, train
>>> check("recipe.yaml").problems
[]
>>> run = train("recipe.yaml")
>>> run.metrics["validation"]["accuracy"]
>>> run.predict(["what a lovely film"])
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_finetune.errors import FinetuneError, Problem
    from hf_finetune.pipeline.check import CheckResult, check
    from hf_finetune.pipeline.run import Run, evaluate, load_run, merge, predict, push
    from hf_finetune.pipeline.train import train
    from hf_finetune.recipe import Recipe

__version__ = "0.1.0"

__all__ = [
    "CheckResult",
    "FinetuneError",
    "Problem",
    "Recipe",
    "Run",
    "__version__",
    "check",
    "evaluate",
    "load_run",
    "merge",
    "predict",
    "push",
    "train",
]

_HOMES = {
    "CheckResult": "pipeline.check",
    "FinetuneError": "errors",
    "Problem": "errors",
    "Recipe": "recipe",
    "Run": "pipeline.run",
    "check": "pipeline.check",
    "evaluate": "pipeline.run",
    "load_run": "pipeline.run",
    "merge": "pipeline.run",
    "predict": "pipeline.run",
    "push": "pipeline.run",
    "train": "pipeline.train",
}


def __getattr__(name: str) -> Any:
    # Imported when somebody asks: `import hf_finetune` alone is instant, and torch takes seconds.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
