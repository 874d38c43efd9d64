"""The card's YAML header: what the Hub indexes, with every metric as it was measured."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCardData

from hf_finetune.card import licence
from hf_finetune.card.naming import hub_base, is_on_hub, sources, title
from hf_finetune.runreport import told
from hf_finetune.runreport.intervals import CONFIDENCE

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe
    from hf_finetune.runreport.remains import Remains
    from hf_finetune.runreport.told import Result, Score

PIPELINES = {"SEQ_CLS": "text-classification", "CAUSAL_LM": "text-generation"}
"""The Hub's name of a task, by PEFT's."""
METRICS = {
    "f1_macro": ("f1", {"average": "macro"}),
    "f1_micro": ("f1", {"average": "micro"}),
    "f1_weighted": ("f1", {"average": "weighted"}),
    "matthews": ("matthews_correlation", {}),
    "pearson": ("pearsonr", {}),
    "spearman": ("spearmanr", {}),
    "r2": ("r_squared", {}),
}
"""Our metric -> the Hub's, and what it is computed with; others have one name."""
UNPUBLISHED = "local"
"""`dataset_type` of data that are not on the Hub."""


def header(recipe: Recipe, run: Remains | None) -> ModelCardData:
    """Metadata of the card.

    Args:
        recipe: What was run.
        run: Its metrics; None where they are not known.
    """
    results = list(_results(recipe, run)) if run is not None else []
    return ModelCardData(
        base_model=hub_base(recipe),
        library_name="peft" if recipe.adapter.freezes_base else "transformers",
        pipeline_tag=PIPELINES.get(recipe.task.peft_type),
        datasets=list(dict.fromkeys(str(part.source) for part in sources(recipe))) or None,
        tags=["hf-finetune", recipe.adapter.kind],
        model_name=title(recipe) if results else None,
        eval_results=results or None,
        **licence.of_base(recipe),
    )


def _results(recipe: Recipe, run: Remains) -> Iterator[EvalResult]:
    for result in told.results(run):
        for score in result.scores:
            if math.isfinite(score.value):
                yield _result(recipe, result, score)


def _result(recipe: Recipe, result: Result, score: Score) -> EvalResult:
    data, kind = recipe.data, METRICS.get(score.name, (score.name, {}))
    on_hub = is_on_hub(data.source)
    cut = result.split == "validation" and data.validation_share is not None
    named = getattr(data, "train" if cut else result.split) if on_hub else None
    arguments: dict[str, Any] = dict(kind[1])
    if score.bounds is not None:
        arguments |= {"confidence_level": CONFIDENCE, "confidence_interval": list(score.bounds)}
        arguments["confidence_method"] = result.method
    return EvalResult(
        task_type=PIPELINES.get(recipe.task.peft_type, "other"),
        dataset_type=str(data.source) if on_hub else UNPUBLISHED,
        dataset_name=str(data.source) if on_hub else "data that are not published",
        dataset_config=data.subset if on_hub else None,
        dataset_revision=data.revision if on_hub else None,
        dataset_args=_part(recipe, cut=cut) or None,
        dataset_split=named if isinstance(named, str) else result.split,
        metric_type=kind[0],
        metric_name=score.name,
        metric_value=score.value,
        metric_args=arguments or None,
    )


def _part(recipe: Recipe, *, cut: bool) -> dict[str, Any]:
    """Which rows of a split were evaluated; empty where it was all of them.

    Args:
        recipe: What was run.
        cut: Whether they were cut off the training split.
    """
    data, found = recipe.data, {}
    if cut:
        found["share"] = data.validation_share
    if data.limit is not None:
        found["limit"] = data.limit
    return {**found, "seed": recipe.training.seed} if found else {}
