"""`hub.every: best`: each checkpoint that is the best so far is uploaded while training goes on, and never waited for.

Rank 0 writes a copy of the adapter, which takes as long as saving it, and a process of its own uploads it. While one is
on its way, later ones wait, and only the newest of them is sent. Failures are counted; they end no run.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from hf_finetune import export, terminal
from hf_finetune.errors import FinetuneError, Problem
from hf_finetune.hub import outgoing, secrets
from hf_finetune.hub.order import Order
from hf_finetune.hub.push import run_id
from hf_finetune.hub.sending import Sending

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from hf_finetune.learning import Learner
    from hf_finetune.runfolder import RunFolder
    from hf_finetune.schema.hub import Hub
    from hf_finetune.trainer import FinetuneTrainer

PREFIX = ".upload-"
"""Of a folder in the run folder, for copies."""


@dataclass
class Uploads:
    """What became of them."""

    begun: int = 0
    failures: list[str] = field(default_factory=list)
    """Why, one each."""

    @property
    def problems(self) -> list[Problem]:
        """For the report: nothing where all went well."""
        if not self.failures:
            return []
        told = f"{len(self.failures)} of {self.begun} uploads of the best checkpoint so far failed"
        return [Problem(f"{told}, the last one: {self.failures[-1]}", key="hub.every")]


@contextmanager
def uploaded(trainer: FinetuneTrainer, learner: Learner, folder: RunFolder) -> Iterator[Uploads]:
    """Upload best checkpoints while the body trains; what is on its way at the end is broken off.

    Args:
        trainer: Not started yet.
        learner: Names the recipe; only rank 0 uploads.
        folder: The run.
    """
    uploads, hub = Uploads(), learner.recipe.hub
    if hub is None or hub.every is None or not learner.machine.is_main:
        yield uploads
        return
    if learner.machine.is_sharded:
        terminal.say("no uploads of the best checkpoint: the weights are sharded (FSDP, ZeRO-3)")
        yield uploads
        return
    for left in folder.path.glob(f"{PREFIX}*"):  # by a kill
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder.path, ignore_cleanup_errors=True) as place:
        watcher = _Watcher(trainer, learner, hub, _Place(folder, Path(place)), uploads)
        trainer.add_callback(watcher)
        try:
            yield uploads
        finally:
            watcher.end()


@dataclass(frozen=True)
class _Place:
    folder: RunFolder
    staging: Path


class _Watcher(TrainerCallback):
    """Hears of checkpoints."""

    def __init__(self, trainer: FinetuneTrainer, learner: Learner, hub: Hub, place: _Place, uploads: Uploads) -> None:
        self.trainer, self.learner, self.hub, self.place, self.uploads = trainer, learner, hub, place, uploads
        self.sending: tuple[Sending, Path] | None = None
        self.waiting: tuple[Order, Path] | None = None
        """The next one, and the folder that its files are in."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Upload what was just saved, if it is the best so far."""
        if state.best_global_step != state.global_step or self.trainer.stopped:
            return
        self._forget()
        staging = self.place.staging / str(state.global_step)
        try:
            self.waiting = self._order(state.global_step, staging), staging
        except (FinetuneError, OSError) as error:
            self.uploads.begun += 1
            self._failed(str(error))
        self._go_on()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """See whether the last one is done."""
        self._go_on()

    def end(self) -> None:
        """Break off what is on its way: the finished adapter comes next, or nothing."""
        self._forget()
        self._go_on()
        if self.sending is not None:
            self.sending[0].stop()

    def _forget(self) -> None:
        """Nobody needs the one that waits any more."""
        if self.waiting is not None:
            shutil.rmtree(self.waiting[1], ignore_errors=True)
        self.waiting = None

    def _go_on(self) -> None:
        """Hear how the last one ended, and begin with the next."""
        while self.sending is not None and (answer := self.sending[0].poll()) is not None:
            if answer.event == "failed":
                self._failed(answer.reason)
            if answer.event != "again":
                self.sending[0].stop()
                shutil.rmtree(self.sending[1], ignore_errors=True)
                self.sending = None
        if self.sending is not None or self.waiting is None:
            return
        (order, staging), self.waiting = self.waiting, None
        self.uploads.begun += 1
        refusal = secrets.why_not()
        if refusal is not None:
            self._failed(refusal)
        else:
            self.sending = Sending(order), staging

    def _failed(self, reason: str) -> None:
        self.uploads.failures.append(reason)
        terminal.warn(f"the best checkpoint so far was not uploaded to {self.hub.repo}: {reason}")

    def _order(self, step: int, staging: Path) -> Order:
        """A copy of the adapter as it is now.

        Raises:
            FinetuneError: The disk does not take it.
        """
        recipe, changed = self.learner.recipe, staging / "changed"
        changed.mkdir(parents=True)
        adapter = staging / "adapter"
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        export.save(model, recipe, self.learner.prepared.targets, self.learner.tokenizer, adapter)
        found = outgoing.gather(adapter, self.hub.repo, changed)
        return Order(
            repo=self.hub.repo,
            private=self.hub.private,
            as_pr=False,
            files={name: str(file) for name, file in found.files.items()},
            message=f"Run {run_id(self.place.folder)}, best checkpoint so far, step {step}",
            timeout=self.hub.timeout,
        )
