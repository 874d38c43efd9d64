"""The metrics that count: of the model that is saved, on the validation and the test split."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_finetune.tracking.journal import of_phase

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
            return _scores(logs, "eval")
    return None


def _evaluate(trainer: FinetuneTrainer, split: str, prepared: Prepared) -> dict[str, float]:
    phase = "final" if split == "validation" else split
    return _scores(trainer.evaluate_split(split, getattr(prepared, split), phase), phase)


def _scores(logs: dict[str, float], phase: str) -> dict[str, float]:
    return {name: value for name, value in of_phase(logs, phase).items() if name != "runtime"}
