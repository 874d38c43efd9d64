"""What is written down while a model learns: metrics.jsonl, tensorboardX, the terminal. One callback a file."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback, TrainerCallback

from hf_finetune.tasks.causal_lm import CausalLM
from hf_finetune.tracking import samples
from hf_finetune.tracking.console import Console, say, warn
from hf_finetune.tracking.journal import Entry, Journal, keep_lines
from hf_finetune.tracking.progress import Progress
from hf_finetune.tracking.samples import Samples
from hf_finetune.tracking.tensorboard import TensorBoard

if TYPE_CHECKING:
    from hf_finetune.data import Prepared
    from hf_finetune.hardware import Machine
    from hf_finetune.recipe import Recipe
    from hf_finetune.runfolder import RunFolder, Status


class Observers:
    """Everyone who watches a run.

    Args:
        recipe: Shown under TensorBoard's Text tab.
        folder: Where metrics and events go.
        status: Learns the current step.
        machine: Only rank 0 writes.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, status: Status, machine: Machine) -> None:
        self.recipe = recipe
        self.folder = folder
        self.status = status
        self.machine = machine
        self.journal = Journal(folder.metrics, writes=machine.is_main, complain=warn)
        self.board = (
            TensorBoard(folder.tensorboard, {"recipe": f"```yaml\n{recipe.dump()}```"}) if machine.is_main else None
        )

    def callbacks(self, prepared: Prepared, tokenizer: Any) -> list[TrainerCallback]:
        """Callbacks for the Trainer, in the order in which they must hear of a log."""
        callbacks: list[TrainerCallback] = [self.journal]
        stopping = self.recipe.training.early_stopping
        if stopping is not None:
            callbacks.append(EarlyStoppingCallback(stopping.patience, stopping.min_delta))
        if self.board is not None:
            callbacks += [self.board, Console(self.recipe.task.headline), Progress(self.status)]
        return callbacks + self._samples(prepared, tokenizer)

    def _samples(self, prepared: Prepared, tokenizer: Any) -> list[TrainerCallback]:
        task, raw = self.recipe.task, prepared.raw_validation
        if not isinstance(task, CausalLM) or not task.sample_prompts or raw is None:
            return []
        if self.machine.is_sharded:
            if self.machine.is_main:
                say("no sample answers: the weights are sharded (FSDP, ZeRO-3)")
            return []
        return [Samples(task, tokenizer, raw, self.folder.samples, self.board)]

    def keep(self, lines: dict[str, int], step: int) -> None:
        """Go on where a checkpoint ends.

        Args:
            lines: Of each journal, by file name.
            step: The checkpoint's; 0 to begin anew.
        """
        self.journal.keep(lines.get(self.folder.metrics.name, 0))
        if self.machine.is_main:
            keep_lines(self.folder.samples, lines.get(self.folder.samples.name, 0))
            # A kill takes unflushed events with it, and leaves some that come again: the journals have the truth.
            shutil.rmtree(self.folder.tensorboard, ignore_errors=True)
        if self.board is not None and step:
            for line in self.journal.entries:
                self.board.add(line)
            for at, text in samples.stored(self.folder.samples):
                self.board.add_text(samples.TAG, text, at)

    def conclude(self, summary: Entry) -> None:
        """Write the summary row and close the event file."""
        self.journal.add(summary)
        self.close()

    def close(self) -> None:
        """Close the event file; later calls do nothing."""
        if self.board is not None:
            self.board.close()
