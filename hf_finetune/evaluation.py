"""The metrics that count: of the model that is saved, on the validation and the test split."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_finetune.data import Prepared
    from hf_finetune.trainer import FinetuneTrainer


def final(trainer: FinetuneTrainer, prepared: Prepared) -> dict[str, dict[str, float]]:
    """Evaluate the model as it will be saved.

    The validation split is not evaluated again where the last evaluation already saw these very weights; a best
    checkpoint that was loaded back is.

    Returns:
        Split -> metrics; a split that the recipe does not have is left out.
    """
    scores = {}
    if prepared.validation is not None:
        scores["validation"] = _last(trainer) or _evaluate(trainer, "validation", prepared)
    if prepared.test is not None:
        scores["test"] = _evaluate(trainer, "test", prepared)
    return scores


def _last(trainer: FinetuneTrainer) -> dict[str, float] | None:
    """Metrics of an evaluation after the last step, unless the weights were changed since."""
    if trainer.state.best_model_checkpoint is not None:
        return None
    for logs in reversed(trainer.state.log_history):
        if logs["step"] == trainer.state.global_step and "eval_loss" in logs:
            return _named(logs, "eval_")
    return None


def _evaluate(trainer: FinetuneTrainer, split: str, prepared: Prepared) -> dict[str, float]:
    prefix = "final" if split == "validation" else split
    return _named(trainer.evaluate_split(split, getattr(prepared, split), prefix), f"{prefix}_")


def _named(logs: dict[str, float], prefix: str) -> dict[str, float]:
    speed = {"runtime", "samples_per_second", "steps_per_second", "model_preparation_time"}
    found = {key.removeprefix(prefix): value for key, value in logs.items() if key.startswith(prefix)}
    return {key: value for key, value in found.items() if key not in speed}
