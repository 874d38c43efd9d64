"""Write down what happens while a model learns: metrics.jsonl, records, TensorBoard, the terminal.

Importing this is cheap: a report or a comparison needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_finetune.recipe import Recipe
from hf_finetune.runfolder import RunFolder, Status
from hf_finetune.terminal import say, warn
from hf_finetune.tracking import journal

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from hf_finetune.data import Prepared
    from hf_finetune.hardware import Machine
    from hf_finetune.records import Record


class Observers:
    """Everything that watches a run.

    Args:
        recipe: Says what is shown.
        folder: Where metrics, records and events go.
        status: Learns the current step.
        machine: Only rank 0 writes.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, status: Status, machine: Machine) -> None:
        from hf_finetune.tracking.callbacks import Journal
        from hf_finetune.tracking.events import EventWriter
        from hf_finetune.tracking.logdir import LogDir
        from hf_finetune.tracking.tensorboard import Board

        self.recipe = recipe
        self.folder = folder
        self.status = status
        self.machine = machine
        self.journal = Journal(folder.metrics, writes=machine.is_main)
        has_board = machine.is_main and recipe.tracking.tensorboard
        self.board = Board(recipe, folder, EventWriter(LogDir.of(recipe, folder))) if has_board else None
        self._is_recordless = False

    def callbacks(self, prepared: Prepared, tokenizer: Any) -> list[TrainerCallback]:
        """List the callbacks for the Trainer, in the order in which they must hear of a log."""
        from transformers import EarlyStoppingCallback

        from hf_finetune.tracking.callbacks import Progress
        from hf_finetune.tracking.console import Console
        from hf_finetune.tracking.samples import Samples

        task, raw = self.recipe.task, prepared.raw_validation
        # The journal is first: what is on disk is the truth, and it sets the time that the others show.
        found: list[TrainerCallback] = [self.journal]
        stopping = self.recipe.training.early_stopping
        if stopping is not None:
            found.append(EarlyStoppingCallback(stopping.patience, stopping.min_delta))
        if self.board is not None:
            found.append(self.board)
        if self.machine.is_main:
            found += [Console(task.headline), Progress(self.status)]
        prompts = task.samples(raw, tokenizer)
        if prompts is not None:
            # Generating takes a forward pass a token, each of which would gather all weights.
            if not self.machine.is_sharded:
                writes, board = self.machine.is_main, self.board
                found.append(Samples(prompts, tokenizer, self.folder.samples, writes=writes, board=board))
            elif self.machine.is_main:
                say("no sample answers: the weights are sharded (FSDP, ZeRO-3)")
        return found

    def keep(self, lines: dict[str, int], step: int) -> None:
        """Continue where a checkpoint ends.

        Args:
            lines: Of each journal, by file name.
            step: The checkpoint's; 0 to begin anew.
        """
        from hf_finetune import records
        from hf_finetune.observing.data import environment

        self.journal.keep(lines.get(self.folder.metrics.name, 0))
        if not self.machine.is_main:
            return
        journal.keep_lines(self.folder.samples, lines.get(self.folder.samples.name, 0))
        records.forget_after(self.folder.observations, step if step else -1)
        # After `forget_after`: one of each process stays, at the step where it began.
        self._write(environment(self.machine, step))
        if self.board is not None:
            # A kill takes unflushed events with it, and leaves some that come again: the journals have the truth.
            logdir = self.board.writer.place
            try:
                logdir.clear()
            except OSError as error:
                warn(f"{logdir.folder} can't be cleared ({error.strerror}): TensorBoard shows some steps twice")
            self.board.replay(self.journal.entries)

    def locked(self) -> None:
        """Show `run.lock.json`, which exists now."""
        if self.board is not None:
            self.board.add_lock()

    def record(self, record: Record) -> None:
        """Keep and draw a record of the model, on rank 0.

        Args:
            record: Its kind, phase and step say where it belongs; an earlier one of the same is replaced.
        """
        if self.machine.is_main:
            self._write(record)
            if self.board is not None:
                self.board.draw(record)

    def _write(self, record: Record) -> None:
        try:
            record.write(self.folder.observations)
        except OSError as error:
            if not self._is_recordless:
                where = self.folder.observations
                warn(f"{where} can't be written ({error.strerror}): records are lost, training goes on")
            self._is_recordless = True

    def conclude(self, summary: journal.Entry) -> None:
        """Write the summary row and close the event file."""
        line = {**summary, "time": journal.now()}
        self.journal.add(line)
        if self.board is not None:
            self.board.conclude(line)
        self.close()

    def close(self, *, is_stopped: bool = False) -> None:
        """Close the event file; later calls do nothing.

        Args:
            is_stopped: The run was preempted or interrupted, which is no failure.
        """
        if self.board is not None:
            self.board.close("unknown" if is_stopped else "failure")
