"""Whether a run may go on from a checkpoint: what was changed since, and what of that is safe."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml
from pydantic import ValidationError

from hf_finetune.errors import CheckpointError, Problem
from hf_finetune.recipe import Recipe
from hf_finetune.schema.expectations import shown

FREE = (
    "output",
    "version",
    "require_pinned",
    "checkpoints",
    "checkpoints.*",
    "data.cache",
    "data.workers",
    "data.checks.*",
    "hub",
    "hub.*",
    "task.sample_prompts*",
    "training.activation_checkpointing",
    "training.log_every",
    "training.loss_spike*",
    "training.max_skipped",
    "training.micro_batch",
    "training.on_nonfinite",
    "training.eval_batch",
    "tracking.*",
)
"""Keys that change nothing of what is learned."""

ALLOWED = (
    "data.test",
    "data.validation",
    "model.attention",
    "model.dropout",
    "speed.*",
    "task.answer_pattern",
    "task.generate_rows",
    "task.max_new_tokens",
    "training.best_metric",
    "training.beta*",
    "training.deterministic",
    "training.early_stopping*",
    "training.epochs",
    "training.eval_*",
    "training.learning_rate",
    "training.max_grad_norm",
    "training.precision",
    "training.schedule",
    "training.steps",
    "training.warmup_*",
    "training.weight_decay",
)
"""Keys that may change where `--allow-change` names them: training goes on, but is not the one that was begun."""


def differences(before: str, now: str, free: Iterable[str] = FREE) -> dict[str, tuple[Any, Any]]:
    """Dotted keys with another value than in an earlier resolved recipe: what it was, what it is.

    Args:
        before: `recipe.yaml` of the run folder.
        now: The resolved recipe that is to go on, as YAML.
        free: Patterns of keys that may differ.
    """
    old, new = _flat(_resolved(before)), _flat(_resolved(now))
    changed = {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)}
    return {key: (old.get(key), new.get(key)) for key in sorted(changed) if not _among(key, free)}


def refuse_changes(before: str, now: str, allowed: Sequence[str]) -> list[str]:
    """Compare a recipe with that of the run that it would go on with.

    Args:
        before: `recipe.yaml` of the run folder.
        now: The resolved recipe that is to go on, as YAML.
        allowed: Keys given by `--allow-change`.

    Returns:
        A sentence for each change that is allowed and was made.

    Raises:
        CheckpointError: Something else changed; it carries one problem a key.
    """
    problems, notes = [], []
    for key, (old, new) in differences(before, now).items():
        told = f"was {shown(old, plain=True)}, is {shown(new, plain=True)}"
        if key in allowed and _among(key, ALLOWED):
            notes.append(f"{key} {told}, as --allow-change says: from here on this is another training")
            continue
        can = f"give --allow-change {key} to go on with it, " if _among(key, ALLOWED) else ""
        message = f"{told} in the run that this folder holds; change it back, {can}or --restart to start anew"
        problems.append(Problem(message, key=key))
    if problems:
        raise CheckpointError(problems)
    return notes


def is_whole(text: str) -> bool:
    """Whether this may be a whole `recipe.yaml`: a power failure leaves nothing, zeros, or a part."""
    try:
        return text.endswith("\n") and isinstance(yaml.safe_load(text), dict)
    except yaml.YAMLError:
        return False


def refuse_unknown(allowed: Iterable[str]) -> None:
    """Check the keys of `--allow-change`.

    Raises:
        CheckpointError: One may never change within a run.
    """
    wrong = [key for key in allowed if not _among(key, (*ALLOWED, *FREE))]
    if any(key.startswith("lock.") for key in wrong):
        raise CheckpointError(
            Problem("is about a lock; give --locked RUN/run.lock.json too", key=key)
            for key in wrong
            if key.startswith("lock.")
        )
    if wrong:
        message = "may not change within a run; start anew with --restart, or in another output folder"
        raise CheckpointError(Problem(message, key=key) for key in wrong)


def _resolved(text: str) -> dict[str, Any]:
    """A recipe with every default, also of keys that are younger than the file; as it stands if it can't be read."""
    tree = yaml.safe_load(text) or {}
    try:
        return Recipe.model_validate(tree, by_alias=True, by_name=False).model_dump(mode="json")
    except ValidationError:
        return dict(tree)


def _among(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            found |= _flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner
    return found
