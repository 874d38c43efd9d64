"""The tracker writes down what happens while a model learns: metrics.jsonl, records, TensorBoard, the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState, TrainingArguments

from hf_finetune.data.prepare import Prepared
from hf_finetune.device import Machine
from hf_finetune.log import say, warn
from hf_finetune.recipe import Recipe
from hf_finetune.run import journal
from hf_finetune.run.folder import RunFolder
from hf_finetune.run.journal import Appender
from hf_finetune.run.status import Status
from hf_finetune.tasks._generation import answer_together
from hf_finetune.tasks.base import Prompts
from hf_finetune.tracking import records
from hf_finetune.tracking.callbacks import Console, Journal, Progress
from hf_finetune.tracking.events import EventWriter
from hf_finetune.tracking.logdir import LogDir
from hf_finetune.tracking.observing import environment
from hf_finetune.tracking.records import Record
from hf_finetune.tracking.tensorboard import Board


class Tracker:
    """Everything that watches a run.

    Args:
        recipe: Says what is shown.
        folder: Where metrics, records and events go.
        status: Learns the current step.
        machine: Only rank 0 writes.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, status: Status, machine: Machine) -> None:
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
        # The journal is first: what is on disk is the truth, and it sets the time that the others show.
        found: list[TrainerCallback] = [self.journal]
        stopping = self.recipe.training.early_stopping
        if stopping is not None:
            found.append(EarlyStoppingCallback(stopping.patience, stopping.min_delta))
        if self.board is not None:
            found.append(self.board)
        if self.machine.is_main:
            found += [Console(self.recipe.task.headline), Progress(self.status)]
        prompts = self.recipe.task.samples(prepared.raw_validation, tokenizer)
        if prompts is not None:
            # Generating takes a forward pass a token, each of which would gather all weights.
            if not self.machine.is_sharded:
                machine, board = self.machine, self.board
                found.append(Samples(prompts, tokenizer, self.folder.samples, machine=machine, board=board))
            elif self.machine.is_main:
                say("no sample answers: the weights are sharded (FSDP, ZeRO-3)")
        return found

    def start(self, lines: dict[str, int], step: int) -> None:
        """Continue where a checkpoint ends.

        Args:
            lines: Of each journal, by file name.
            step: The checkpoint's; 0 to begin anew.
        """
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

    def show_lock(self) -> None:
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

    def finish(self, summary: journal.Entry) -> None:
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


class Samples(TrainerCallback):
    """Write answers into `samples.jsonl` and under TensorBoard's Text tab; all ranks generate, rank 0 writes.

    Args:
        prompts: What is answered, and how long answers may be.
        tokenizer: The model's tokenizer.
        file: `samples.jsonl` of the run folder.
        machine: Its precision; rank 0 writes.
        board: Shows the answers too.
    """

    def __init__(self, prompts: Prompts, tokenizer: Any, file: Path, *, machine: Machine, board: Board | None) -> None:
        self.prompts, self.limit = prompts.prompts, prompts.max_new_tokens
        self.tokenizer, self.machine, self.board = tokenizer, machine, board
        self._appender = Appender(file)
        self._step = -1

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Answer the prompts with the model as it is now; once a step, however many splits are evaluated."""
        if state.global_step == self._step:
            return
        self._step = state.global_step
        model = kwargs["model"]
        with self.machine.autocast(model.device.type):
            answers = answer_together(model, self.tokenizer, self.prompts, max_new_tokens=self.limit)
        if not self.machine.is_main:
            return
        lines = [
            {"step": self._step, "prompt": self.tokenizer.decode(prompt), "answer": answer.text, "ended": answer.ended}
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]
        self._appender.append(*lines)
        if self.board is not None:
            self.board.add_samples(lines, self._step)
