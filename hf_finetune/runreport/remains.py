"""Data of one run for its reports: metrics, observations, sample answers and environment, read from its folder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hf_finetune import records
from hf_finetune.charts import runs
from hf_finetune.charts.drawing import Plot
from hf_finetune.recipe import Recipe
from hf_finetune.records import Record
from hf_finetune.runfolder import RunFolder
from hf_finetune.runreport import intervals
from hf_finetune.runreport.intervals import Intervals
from hf_finetune.tracking import journal
from hf_finetune.tracking.journal import Entry


@dataclass(frozen=True)
class RunData:
    """One run as its folder holds it."""

    folder: RunFolder
    recipe: Recipe
    lines: Sequence[Entry]
    """Of metrics.jsonl."""
    records: Mapping[tuple[str, str], Record] = field(default_factory=dict)
    """The newest of each kind and phase."""
    samples: Sequence[Mapping[str, Any]] = ()
    """Lines of samples.jsonl: step, prompt, answer, ended."""

    @classmethod
    def read(cls, folder: RunFolder, recipe: Recipe) -> RunData:
        """Read a folder; what is damaged or missing is left out."""
        samples = journal.read_samples(folder.samples)
        return cls(folder, recipe, journal.read(folder.metrics), records.newest(folder.observations), samples)

    @property
    def summary(self) -> Entry:
        """The line that closes metrics.jsonl; empty where there is none."""
        return next((line for line in reversed(self.lines) if line.get("phase") == "summary"), {})

    def of(self, phase: str) -> list[Entry]:
        """Select the lines of a phase."""
        return [line for line in self.lines if line.get("phase") == phase]

    @cached_property
    def phases(self) -> dict[str, str]:
        """Split -> the phase in which the saved model was evaluated on it.

        That of the validation split is `final`, or the last `eval` where that already saw these weights.
        """
        found = {}
        evaluations = [line for line in self.lines if line.get("phase") in ("eval", "final")]
        if evaluations:
            # A run that went on after its end has an older final line.
            found["validation"] = max(evaluations, key=lambda line: (line["step"], line["phase"] == "final"))["phase"]
        if self.of("test"):
            found["test"] = "test"
        return found

    @cached_property
    def scores(self) -> dict[str, dict[str, float]]:
        """Final metrics by split."""
        no_metrics = {"step", "epoch", "phase", "runtime", "time"}
        return {
            split: {
                name: value
                for name, value in self.of(phase)[-1].items()
                if name not in no_metrics and isinstance(value, int | float)
            }
            for split, phase in self.phases.items()
        }

    def record(self, kind: str, split: str) -> Record | None:
        """Find the record of the saved model on a split; None where it was not kept."""
        phase = self.phases.get(split)
        record = self.records.get((kind, phase)) if phase is not None else None
        return record if record is not None and record.step == self.of(record.phase)[-1]["step"] else None

    @cached_property
    def intervals(self) -> dict[str, Intervals]:
        """Confidence intervals by split, where its predictions were kept."""
        found = {split: self.record("predictions", split) for split in self.phases}
        return {
            split: intervals.estimate(record.arrays["rows"], record.facts)
            for split, record in found.items()
            if record is not None
        }

    @cached_property
    def weights(self) -> dict[str, float]:
        """`<measure>/<module>` -> how much each module learned; empty where nothing was measured."""
        records = [self.records.get(("weights", phase)) for phase in ("final", "eval")]
        found = [dict(record.facts.get("scalars") or {}) for record in records if record is not None]
        return next((scalars for scalars in found if runs.learned(scalars)), {})

    @cached_property
    def plots(self) -> list[Plot]:
        """The charts that the run has data for, in the order of the page."""
        records = {
            split: [found for kind in ("positions", "predictions") if (found := self.record(kind, split)) is not None]
            for split in self.phases
        }
        return runs.plots(self.lines, records, self.weights)

    @property
    def facts(self) -> Mapping[str, Any]:
        """See `Outcome.facts`; empty for a run that has not ended."""
        record = self.records.get(("report", "train"))
        return record.facts if record is not None else {}

    @property
    def missing(self) -> list[str]:
        """Say what a reader would look for in vain, and why."""
        lost = "kept (the disk may have been full)"
        found = [
            f"The predictions on {split} were not {lost}: there are no confidence intervals and no charts of them."
            for split in self.phases
            if self.record("predictions", split) is None
        ]
        if not self.recipe.data.has_validation and self.recipe.data.test is None:
            found.append("The recipe has no validation and no test split: there are no scores.")
        if not self.lines:
            found.append(f"metrics.jsonl was not {lost}: there are no curves.")
        if not self.environment:
            found.append(f"The environment was not {lost}.")
        return found

    @property
    def environment(self) -> list[tuple[str, str]]:
        """Versions and machine; empty where they were not kept."""
        record = self.records.get(("environment", "train"))
        table = record.facts.get("table") if record is not None else None
        return [(str(name), str(value)) for name, value in table.items()] if isinstance(table, dict) else []

    @property
    def resumed_at(self) -> int:
        """The step at which the last process resumed the run; 0 for a run in one piece."""
        record = self.records.get(("environment", "train"))
        return record.step if record is not None else 0

    @property
    def loading(self) -> str | None:
        """Python that loads the model, from its card; None where there is none."""
        try:
            card = (self.folder.adapter / "README.md").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
        return found[1] if found else None


Remains = RunData  # for callers that have not been renamed yet
