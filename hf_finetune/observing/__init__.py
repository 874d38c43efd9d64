"""What is observed in training and evaluation, as records; see `hf_finetune.records`.

Observing changes nothing: no random number is drawn, no mode of the model is left changed, and what a run computes has
the same bits with and without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune.observing import data, embeddings
from hf_finetune.observing.look import Look, Subject
from hf_finetune.observing.occasion import Occasion
from hf_finetune.observing.predictions import Split
from hf_finetune.observing.weights import WeightWatch
from hf_finetune.records import Record
from hf_finetune.tasks.causal_lm import CausalLM

if TYPE_CHECKING:
    from hf_finetune.data import Prepared
    from hf_finetune.hardware import Machine
    from hf_finetune.recipe import Recipe
    from hf_finetune.trainer import FinetuneTrainer

__all__ = ["Look", "Observing"]


@dataclass(frozen=True)
class Observing:
    """Everything of a run that is looked at besides its metrics."""

    recipe: Recipe
    prepared: Prepared
    machine: Machine
    folder: Path
    """`observations/` of the run folder."""
    record: Callable[[Record], None]
    """Takes each record on rank 0, e.g. `Observers.record`."""

    def attend(self, trainer: FinetuneTrainer, say: Callable[[str], None]) -> None:
        """Watch a trainer from now on.

        Args:
            trainer: Not started yet.
            say: Tells what can't be shown.
        """
        trainer.observing = self
        for line in self._missing(trainer):
            say(line)
        if not self.machine.is_main:
            return
        if not trainer.steps_done():
            self.record(data.record(self.prepared))
        tracking = self.recipe.tracking

        def due(step: int) -> bool:
            if not trainer.evaluates_at(step):
                return False
            occasion = Occasion.of("eval", step, trainer.state, keeps_best=trainer.keeps_best)
            return occasion.is_due(tracking.histograms)

        if tracking.histograms is not False and not self.machine.is_sharded:
            trainer.add_callback(WeightWatch(trainer.bare_model, due, self.record))

    def _missing(self, trainer: FinetuneTrainer) -> list[str]:
        """What the recipe asks for and can't have, a line each."""
        tracking, is_lm = self.recipe.tracking, isinstance(self.recipe.task, CausalLM)
        wanted = {
            "weight histograms": tracking.histograms,
            "losses of single tokens": tracking.examples if is_lm else False,
            "embeddings": False if is_lm else tracking.embeddings,
        }
        found = []
        if self.machine.is_sharded and any(wanted.values()):
            names = ", ".join(name for name, often in wanted.items() if often)
            found.append(f"no {names}: the weights are sharded (FSDP, ZeRO-3)")
        elif wanted["embeddings"] and embeddings.find_head(trainer.bare_model, len(trainer.job.targets.names)) is None:
            found.append("no embeddings: this model's head does not end in a linear layer")
        return found

    def look(self, trainer: FinetuneTrainer, phase: str, split: str, encoded: Any) -> Look:
        """Watch the evaluation that comes next.

        Args:
            trainer: Evaluates.
            phase: eval, final or test.
            split: validation or test.
            encoded: Its rows.
        """
        job, machine = trainer.job, self.machine
        raw = self.prepared.raw_test if split == "test" else self.prepared.raw_validation
        subject = Subject(
            task=job.task,
            targets=job.targets,
            tokenizer=job.tokenizer,
            tracking=self.recipe.tracking,
            model=trainer.bare_model,
            is_main=machine.is_main,
            is_sharded=machine.is_sharded,
        )
        occasion = Occasion.of(phase, trainer.state.global_step, trainer.state, keeps_best=trainer.keeps_best)
        return Look(subject, occasion, Split(split, encoded, raw), self._told(occasion))

    def _told(self, occasion: Occasion) -> Callable[[Record], None]:
        """Takes records; of predictions only those that images or histograms are made of are kept, and the newest."""
        tracking = self.recipe.tracking
        keeps = occasion.is_due(tracking.images) or occasion.is_due(tracking.histograms)

        def tell(record: Record) -> None:
            if record.kind != "predictions":
                self.record(record)
                return
            earlier = sorted((self.folder / record.kind).glob(f"{record.phase}-*.npz"))
            self.record(Record(record.kind, record.phase, record.step, record.arrays, {**record.facts, "kept": keeps}))
            for file in [file for file in earlier if int(file.stem.rpartition("-")[2]) < record.step][-1:]:
                before = Record.read(file)
                if before is not None and not before.facts.get("kept", True):
                    file.unlink(missing_ok=True)

        return tell
