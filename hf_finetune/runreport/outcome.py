"""What a run came to, as the process knows it that trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_finetune.errors import Problem
from hf_finetune.recipe import Recipe
from hf_finetune.runfolder import RunFolder
from hf_finetune.runreport.lines import data_lines

if TYPE_CHECKING:
    from hf_finetune.data import Prepared
    from hf_finetune.hardware import Machine


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    recipe: Recipe
    machine: Machine
    folder: RunFolder
    prepared: Prepared
    parameters: tuple[int, int]
    """Trained parameters, all parameters."""
    steps: int
    seconds: float
    """Wall-clock seconds of training since it began or was resumed, evaluations in between included."""
    rates: dict[str, float] = field(default_factory=dict)
    """Whole-run samples and tokens per second, share of padding."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Final metrics per split."""
    warnings: tuple[Problem, ...] = ()
    peak_memory: int | None = None
    """Most bytes that rank 0 had on its device (CPU: resident); None where that can't be known."""
    reload_difference: float | None = 0.0
    """Largest difference between the logits in memory and those of the saved model, relative to the largest logit.

    None where a second model would not fit (divided or quantised weights): every bit of the saved weights was compared.
    """
    probe_seconds: float = 0.0
    """Wall-clock seconds before training that went into choosing fast paths."""
    resumed_at: int = 0
    """The step from which this process went on; 0 if it began the run."""
    not_taken: int = 0
    """Steps that the optimiser did not take, because loss or gradient was not finite."""

    def facts(self) -> dict[str, Any]:
        """Collect what the report tells and no other file of the run folder does, as JSON holds it."""
        splits, levels = self.prepared.facts, self.recipe.data.checks.model_dump()
        struck = [name for name in levels if any(name in found.tallies for found in splits.values())]
        counts = {
            name: {split: found.tallies[name].count if name in found.tallies else 0 for split, found in splits.items()}
            for name in struck
        }
        return {
            "fingerprint": self.prepared.fingerprint,
            "rows": data_lines(self.prepared),
            "findings": [[name, str(levels[name]), counts[name]] for name in struck],
            "warnings": [str(problem) for problem in self.warnings],
        }
