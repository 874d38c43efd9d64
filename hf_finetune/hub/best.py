"""`hub.every: best`: upload each checkpoint that is the best so far while training goes on, which never waits for it.

Rank 0 writes a copy of the adapter, which takes as long as saving it, and another process uploads it. While one upload
is under way only the newest later copy is kept. Failures are counted; they end no run.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_finetune import log
from hf_finetune.errors import FinetuneError, Problem
from hf_finetune.hub import push
from hf_finetune.hub.worker import Order
from hf_finetune.inference import saving
from hf_finetune.run.folder import RunFolder
from hf_finetune.training.trainer import FinetuneTrainer

PREFIX = ".upload-"


@contextmanager
def uploaded(trainer: FinetuneTrainer, folder: RunFolder) -> Iterator[BestUploads]:
    """Upload best checkpoints from rank 0 while the body trains; an upload under way at the end is broken off.

    Args:
        trainer: Not started yet.
        folder: The run.
    """
    uploads, hub, machine = BestUploads(trainer, folder), trainer.job.recipe.hub, trainer.job.machine
    is_wanted = hub is not None and hub.every is not None and machine.is_main
    if is_wanted and machine.is_sharded:
        log.say("no uploads of the best checkpoint: the weights are sharded (FSDP, ZeRO-3)")
    if not is_wanted or machine.is_sharded:
        yield uploads
        return
    for abandoned in folder.path.glob(f"{PREFIX}*"):  # by a killed process
        shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=folder.path, ignore_cleanup_errors=True) as staging:
        uploads.staging = Path(staging)
        trainer.add_callback(uploads)
        try:
            yield uploads
        finally:
            # The finished adapter comes next, so nobody needs the rest.
            uploads.waiting = None
            uploads.proceed()
            if uploads.current is not None:
                uploads.current[0].stop()


class BestUploads(TrainerCallback):
    """Upload a copy of the adapter whenever a saved checkpoint is the best so far.

    Args:
        trainer: Holds the model and its job.
        folder: The run.
    """

    def __init__(self, trainer: FinetuneTrainer, folder: RunFolder) -> None:
        self.trainer, self.folder = trainer, folder
        self.staging = folder.path
        self.hub = trainer.job.recipe.hub
        self.begun = 0
        self.failures: list[str] = []
        self.current: tuple[push.Upload, Path] | None = None  # with the folder of its copy
        self.waiting: tuple[Order, Path] | None = None

    @property
    def problems(self) -> list[Problem]:
        """Failures, for the report."""
        if not self.failures:
            return []
        counted = f"{len(self.failures)} of {self.begun} uploads of the best checkpoint so far failed"
        return [Problem(f"{counted}, the last one: {self.failures[-1]}", key="hub.every")]

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Upload the checkpoint that was just saved if it is the best so far."""
        if state.best_global_step != state.global_step or self.trainer.stopped:
            return
        if self.waiting is not None:
            shutil.rmtree(self.waiting[1], ignore_errors=True)
            self.waiting = None
        copy = self.staging / str(state.global_step)
        try:
            self.waiting = self.copied(state.global_step, copy), copy
        except (FinetuneError, OSError) as error:
            self.begun += 1
            self.failed(str(error))
        self.proceed()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Look after the upload under way."""
        self.proceed()

    def proceed(self) -> None:
        """Note how the last upload ended, and begin the next one."""
        if self.current is not None and (result := self.current[0].poll()) is not None:
            if result.failure:
                self.failed(result.failure)
            self.current[0].stop()
            shutil.rmtree(self.current[1], ignore_errors=True)
            self.current = None
        if self.current is not None or self.waiting is None:
            return
        (order, copy), self.waiting = self.waiting, None
        self.begun += 1
        refusal = push.why_not()
        if refusal is not None:
            self.failed(refusal)
        else:
            self.current = push.Upload(order), copy

    def failed(self, reason: str) -> None:
        """Count a failure, and warn."""
        self.failures.append(reason)
        log.warn(f"the best checkpoint so far was not uploaded: {reason}")

    def copied(self, step: int, copy: Path) -> Order:
        """Copy the adapter as it is now.

        Raises:
            FinetuneError: The disk does not take it.
        """
        if self.hub is None:
            raise AssertionError("called for a recipe with hub.every alone")
        job, edited = self.trainer.job, copy / "edited"
        edited.mkdir(parents=True)
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        saving.save(model, job.recipe, job.targets, job.tokenizer, copy / "adapter")
        files, _ = push.gather(copy / "adapter", self.hub.repo, edited)
        return push.make_order(self.hub, files, f"Run {push.run_id(self.folder)}, best checkpoint so far, step {step}")
