"""The card's YAML header: what the Hub indexes, with every metric as it was measured, and the licence of the base."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResult,
    ModelCard,
    ModelCardData,
    constants,
    get_session,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # exported lazily

from hf_finetune.card.naming import hub_base, hub_sources, is_on_hub, title
from hf_finetune.hubreach import HTTP_ERROR
from hf_finetune.recipe import Recipe
from hf_finetune.runreport import content
from hf_finetune.runreport.content import Result
from hf_finetune.runreport.intervals import CONFIDENCE
from hf_finetune.runreport.remains import RunData
from hf_finetune.schema.modelfolder import resolve

# Our metric -> the Hub's, and what it is computed with; the others have the same name.
METRICS: dict[str, tuple[str, dict[str, str]]] = {
    "f1_macro": ("f1", {"average": "macro"}),
    "f1_micro": ("f1", {"average": "micro"}),
    "f1_weighted": ("f1", {"average": "weighted"}),
    "matthews": ("matthews_correlation", {}),
    "pearson": ("pearsonr", {}),
    "spearman": ("spearmanr", {}),
    "r2": ("r_squared", {}),
}


def header(recipe: Recipe, run: RunData | None) -> ModelCardData:
    """Collect the metadata of a card.

    Args:
        recipe: Of the run.
        run: With its metrics; None where they are not known.
    """
    found = [
        _eval_result(recipe, result, name)
        for result in (content.results(run) if run is not None else ())
        for name, value in result.overall.items()
        if math.isfinite(value)
    ]
    return ModelCardData(
        base_model=hub_base(recipe),
        library_name="peft" if recipe.adapter.freezes_base else "transformers",
        pipeline_tag=recipe.task.pipeline,
        datasets=hub_sources(recipe) or None,
        tags=["hf-finetune", recipe.adapter.kind],
        model_name=title(recipe) if found else None,
        eval_results=found or None,
        **licence_of_base(recipe),
    )


def _eval_result(recipe: Recipe, result: Result, name: str) -> EvalResult:
    data, (kind, given) = recipe.data, METRICS.get(name, (name, {}))
    on_hub = is_on_hub(data.source)
    # Rows that were cut off the training split are no validation split of the Hub.
    is_cut = result.split == "validation" and data.validation_share is not None
    named = getattr(data, "train" if is_cut else result.split) if on_hub else None
    part = {"share": data.validation_share} if is_cut else {}
    part |= {"limit": data.limit} if data.limit is not None else {}
    arguments: dict[str, Any] = dict(given)
    if name in result.bounds:
        arguments |= {"confidence_level": CONFIDENCE, "confidence_interval": list(result.bounds[name])}
        arguments["confidence_method"] = result.method
    return EvalResult(
        task_type=recipe.task.pipeline,
        dataset_type=str(data.source) if on_hub else "local",
        dataset_name=str(data.source) if on_hub else "data that are not published",
        dataset_config=data.subset if on_hub else None,
        dataset_revision=data.revision if on_hub else None,
        dataset_args={**part, "seed": recipe.training.seed} if part else None,
        dataset_split=named if isinstance(named, str) else result.split,
        metric_type=kind,
        metric_name=name,
        metric_value=result.scores[name],
        metric_args=arguments or None,
    )


def licence_of_base(recipe: Recipe) -> dict[str, Any]:
    """Read `license`, `license_name` and `license_link` from the card of the base: they hold for this model too.

    A card that is missing, damaged or out of reach says nothing.
    """
    repo = hub_base(recipe)
    try:
        if repo is None:
            text: str | None = (Path(resolve(recipe.model.name)) / "README.md").read_text(encoding="utf-8")
        else:
            text = _hub_card(repo, recipe.model.revision)
        data: Any = ModelCard(text or "", ignore_metadata_errors=True).data
        card = data.to_dict()
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        return {}
    keys = ("license", "license_name", "license_link")
    found = {key: card[key] for key in keys if isinstance(card.get(key), str) and len(card[key]) <= 200}
    link = found.get("license_link", "")
    if link and not link.startswith("https://"):
        # A file beside the base's card; the path in a local folder leads nowhere else.
        found.pop("license_link")
        if repo is not None:
            found["license_link"] = f"https://huggingface.co/{repo}/blob/main/{link}"
    return found


@cache  # asked for once a process, and without retries, because training waits for it
def _hub_card(repo: str, revision: str | None) -> str | None:
    try:
        cached = try_to_load_from_cache(repo, "README.md", revision=revision)
        if isinstance(cached, str):
            return Path(cached).read_text(encoding="utf-8")
        if constants.HF_HUB_OFFLINE:
            return None
        address = hf_hub_url(repo, "README.md", revision=revision)
        answer = get_session().get(address, headers=build_hf_headers(), timeout=10.0, follow_redirects=True)
        return answer.content.decode("utf-8") if answer.status_code == 200 else None
    except (HTTP_ERROR, OSError, ValueError):  # out of reach, refused, or no text
        return None
