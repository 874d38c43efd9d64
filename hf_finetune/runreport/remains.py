"""What a run left in its folder: lines of metrics.jsonl, records, sample answers. Reports are made of these."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune.charts import runs
from hf_finetune.charts.drawing import Plot
from hf_finetune.records import Record
from hf_finetune.runreport import intervals
from hf_finetune.runreport.intervals import Intervals
from hf_finetune.tracking import journal

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe
    from hf_finetune.runfolder import RunFolder
    from hf_finetune.runreport.outcome import Outcome
    from hf_finetune.tracking.journal import Entry

SPLITS = ("validation", "test")
NOT_METRICS = {"step", "epoch", "phase", "runtime", "time"}


@dataclass(frozen=True)
class Remains:
    """One run, as its folder tells it."""

    folder: RunFolder
    recipe: Recipe
    lines: Sequence[Entry]
    """Of metrics.jsonl."""
    records: Mapping[tuple[str, str], Record] = field(default_factory=dict)
    """The newest of each kind and phase."""
    samples: Sequence[Mapping[str, Any]] = ()
    """Lines of samples.jsonl: step, prompt, answer, ended."""
    outcome: Outcome | None = None
    """What only the process knows that trained: what became of the rows, and the machine."""

    @classmethod
    def read(cls, folder: RunFolder, recipe: Recipe, outcome: Outcome | None = None) -> Remains:
        """Read what a folder holds; what is damaged or not there is left out."""
        return cls(
            folder,
            recipe,
            journal.read(folder.metrics),
            newest(folder.observations),
            journal.read_samples(folder.samples),
            outcome,
        )

    @property
    def summary(self) -> Entry:
        """The line that closes metrics.jsonl; empty where there is none."""
        return next((line for line in reversed(self.lines) if line.get("phase") == "summary"), {})

    def of(self, phase: str) -> list[Entry]:
        """Lines of a phase."""
        return [line for line in self.lines if line.get("phase") == phase]

    @cached_property
    def phases(self) -> dict[str, str]:
        """Split -> the phase in which the model that is saved was evaluated on it.

        The validation split's is `final`, or the last `eval` where that already saw these weights.
        """
        found = {}
        watched = [line for line in self.lines if line.get("phase") in ("eval", "final")]
        if watched:
            # A run that went on after its end has an older final line.
            found["validation"] = max(watched, key=lambda line: (line["step"], line["phase"] == "final"))["phase"]
        if self.of("test"):
            found["test"] = "test"
        return found

    @cached_property
    def scores(self) -> dict[str, dict[str, float]]:
        """Final metrics by split."""
        if self.outcome is not None:
            return self.outcome.scores
        return {
            split: {
                name: value
                for name, value in self.of(phase)[-1].items()
                if name not in NOT_METRICS and isinstance(value, int | float)
            }
            for split, phase in self.phases.items()
        }

    def record(self, kind: str, split: str) -> Record | None:
        """The record of the model that is saved, on a split; None where it was not kept."""
        phase = self.phases.get(split)
        if phase is None:
            return None
        record = self.records.get((kind, phase))
        return record if record is not None and record.step == self.of(phase)[-1]["step"] else None

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

    @cached_property
    def missing(self) -> list[str]:
        """What a reader would look for and not find, and why not."""
        told = []
        for split in self.phases:
            if self.record("predictions", split) is None:
                told.append(
                    f"The predictions on {split} were not kept (the disk may have been full): there are no confidence "
                    "intervals and no charts of them."
                )
        if not self.recipe.data.has_validation and self.recipe.data.test is None:
            told.append("The recipe has no validation and no test split: there are no scores.")
        if not self.lines:
            told.append("metrics.jsonl was not kept (the disk may have been full): there are no curves.")
        if not self.environment:
            told.append("The environment was not kept (the disk may have been full).")
        return told

    @property
    def environment(self) -> list[tuple[str, str]]:
        """Versions and machine; empty where they were not kept."""
        record = self.records.get(("environment", "train"))
        table = record.facts.get("table") if record is not None else None
        return [(str(name), str(value)) for name, value in table.items()] if isinstance(table, dict) else []

    @property
    def went_on_at(self) -> int:
        """Step at which the last process went on with the run; 0 for a run in one piece."""
        record = self.records.get(("environment", "train"))
        return record.step if record is not None else 0

    @property
    def loading(self) -> str | None:
        """Python that loads what was saved, from its model card; None where there is none."""
        try:
            card = (self.folder.adapter / "README.md").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None
        found = re.search(r"```python\n(.*?)```", card, re.DOTALL)
        return found[1] if found else None


def newest(folder: Path) -> dict[tuple[str, str], Record]:
    """The newest record of each kind and phase below `observations/`; damaged ones are left out."""
    files: dict[tuple[str, str], Path] = {}
    for file in sorted(folder.glob("*/*-*.npz")):
        phase, _, step = file.stem.rpartition("-")
        if step.isdecimal():
            files[file.parent.name, phase] = max(file, files.get((file.parent.name, phase), file), key=_step)
    found = {key: Record.read(file) for key, file in files.items()}
    return {key: record for key, record in found.items() if record is not None}


def _step(file: Path) -> int:
    return int(file.stem.rpartition("-")[2])


def mean(lines: Iterable[Mapping[str, Any]], name: str) -> float | None:
    """Mean of a quantity over the lines that have it; None where none has."""
    values = [line[name] for line in lines if isinstance(line.get(name), int | float) and isfinite(line[name])]
    return sum(values) / len(values) if values else None
