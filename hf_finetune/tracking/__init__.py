"""What is written down while a model learns: metrics.jsonl, records, TensorBoard, the terminal. One callback a file.

Importing this is cheap: whoever only looks at a run needs no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_finetune.terminal import say, warn

if TYPE_CHECKING:
    from transformers import TrainerCallback

    from hf_finetune.data import Prepared
    from hf_finetune.hardware import Machine
    from hf_finetune.recipe import Recipe
    from hf_finetune.records import Record
    from hf_finetune.runfolder import RunFolder, Status
    from hf_finetune.tracking.board.board import Board
    from hf_finetune.tracking.journal import Entry


class Observers:
    """Everyone who watches a run.

    Args:
        recipe: Says what is shown.
        folder: Where metrics, records and events go.
        status: Learns the current step.
        machine: Only rank 0 writes.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, status: Status, machine: Machine) -> None:
        from hf_finetune.tracking.callbacks import Journal

        self.recipe = recipe
        self.folder = folder
        self.status = status
        self.machine = machine
        self.journal = Journal(folder.metrics, writes=machine.is_main)
        self.board = self._board() if machine.is_main and recipe.tracking.tensorboard else None
        self._is_recordless = False

    def _board(self) -> Board:
        from hf_finetune.tracking.board.board import Board
        from hf_finetune.tracking.board.events import Events
        from hf_finetune.tracking.board.place import Place

        return Board(self.recipe, self.folder, Events(Place.of(self.recipe, self.folder), warn))

    def callbacks(self, prepared: Prepared, tokenizer: Any) -> list[TrainerCallback]:
        """Callbacks for the Trainer, in the order in which they must hear of a log."""
        from transformers import EarlyStoppingCallback

        from hf_finetune.tracking.callbacks import Progress
        from hf_finetune.tracking.console import Console

        callbacks: list[TrainerCallback] = [self.journal]
        stopping = self.recipe.training.early_stopping
        if stopping is not None:
            callbacks.append(EarlyStoppingCallback(stopping.patience, stopping.min_delta))
        if self.board is not None:
            callbacks.append(self.board)
        if self.machine.is_main:
            callbacks += [Console(self.recipe.task.headline), Progress(self.status)]
        return callbacks + self._samples(prepared, tokenizer)

    def _samples(self, prepared: Prepared, tokenizer: Any) -> list[TrainerCallback]:
        from hf_finetune.tasks.causal_lm import CausalLM
        from hf_finetune.tracking.samples import Samples

        task, raw = self.recipe.task, prepared.raw_validation
        if not isinstance(task, CausalLM) or not task.sample_prompts or raw is None:
            return []
        if self.machine.is_sharded:
            if self.machine.is_main:
                say("no sample answers: the weights are sharded (FSDP, ZeRO-3)")
            return []
        samples = Samples(task, tokenizer, raw, self.folder.samples)
        samples.writes, samples.board = self.machine.is_main, self.board
        return [samples]

    def keep(self, lines: dict[str, int], step: int) -> None:
        """Go on where a checkpoint ends.

        Args:
            lines: Of each journal, by file name.
            step: The checkpoint's; 0 to begin anew.
        """
        from hf_finetune import records
        from hf_finetune.tracking.board.kinds import environment
        from hf_finetune.tracking.board.rebuild import replay
        from hf_finetune.tracking.journal import keep_lines

        self.journal.keep(lines.get(self.folder.metrics.name, 0))
        if not self.machine.is_main:
            return
        keep_lines(self.folder.samples, lines.get(self.folder.samples.name, 0))
        records.forget_after(self.folder.observations, step if step else -1)
        self._write(environment.look(self.machine, step))
        if self.board is not None:
            # A kill takes unflushed events with it, and leaves some that come again: the journals have the truth.
            place = self.board.events.place
            try:
                place.clear()
            except OSError as error:
                warn(f"{place.folder} can't be cleared ({error.strerror}): TensorBoard shows some steps twice")
            replay(self.board, self.journal.entries)

    def locked(self) -> None:
        """`run.lock.json` is there: show it."""
        if self.board is not None:
            self.board.add_lock()

    def record(self, record: Record) -> None:
        """Keep and draw what was seen of the model, on rank 0.

        Args:
            record: Its kind, phase and step say where it belongs; an earlier one of the same is replaced.
        """
        if not self.machine.is_main:
            return
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

    def conclude(self, summary: Entry) -> None:
        """Write the summary row and close the event file."""
        from hf_finetune.tracking.journal import now

        line = {**summary, "time": now()}
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
