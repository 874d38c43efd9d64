"""The tracker: the callback that writes down what happens while a model learns.

Each log of the Trainer becomes one line of metrics.jsonl, which then goes to TensorBoard and to the terminal. What is
seen of the model at evaluations (see `observing`) becomes a record, and goes to TensorBoard, too.
"""

from __future__ import annotations

import time
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from hf_finetune import log
from hf_finetune.data.prepare import Prepared
from hf_finetune.device import Machine
from hf_finetune.log import say, warn
from hf_finetune.log import text as log_text
from hf_finetune.log.lines import Message, Phase, clock
from hf_finetune.recipe import Recipe
from hf_finetune.run import journal
from hf_finetune.run.folder import RunFolder
from hf_finetune.run.journal import Appender, Entry
from hf_finetune.run.status import Status
from hf_finetune.tasks._generation import answer_together
from hf_finetune.tasks.base import Prompts
from hf_finetune.tracking import others, records
from hf_finetune.tracking.events import EventWriter
from hf_finetune.tracking.logdir import LogDir
from hf_finetune.tracking.observing import environment
from hf_finetune.tracking.records import Record
from hf_finetune.tracking.tensorboard import Board, hyperparameters


class Tracker(TrainerCallback):
    """Everything that watches a run. Every rank makes one; the Trainer of rank 0 alone calls it.

    Args:
        recipe: Says what is shown.
        folder: Where metrics, records and events go.
        status: Learns the current step.
        machine: Tells which rank this is.
    """

    def __init__(self, recipe: Recipe, folder: RunFolder, status: Status, machine: Machine) -> None:
        self.recipe, self.folder, self.status, self.machine = recipe, folder, status, machine
        self.lines: list[Entry] = []
        """Of metrics.jsonl; the file may have lost some."""
        has_board = machine.is_main and recipe.tracking.tensorboard
        self.board = Board(recipe, folder, EventWriter(LogDir.of(recipe, folder))) if has_board else None
        also = recipe.tracking.also if machine.is_main else []
        self.others = others.of(also, folder.path, hyperparameters(recipe))
        self.console = Console(recipe.task.headline, None if recipe.task.token_ids else recipe.task.rows_are)
        self._metrics, self._samples = Appender(folder.metrics), Appender(folder.samples)
        self._is_recordless = False

    def callbacks(self, prepared: Prepared, tokenizer: Any) -> list[TrainerCallback]:
        """List the callbacks for this rank's Trainer."""
        found: list[TrainerCallback] = [self, self.console] if self.machine.is_main else []
        stopping = self.recipe.training.early_stopping
        if stopping is not None:
            found.append(EarlyStoppingCallback(stopping.patience, stopping.min_delta))
        prompts = self.recipe.task.samples(prepared.raw_validation, tokenizer, self.recipe.data.max_length)
        if prompts is not None:
            # Generating takes a forward pass a token, each of which would gather all weights.
            if not self.machine.is_sharded:
                found.append(Samples(self, prompts, tokenizer))
            elif self.machine.is_main:
                say("no sample answers: the weights are sharded (FSDP, ZeRO-3)")
        return found

    def start(self, lines: dict[str, int], step: int) -> None:
        """Continue where a checkpoint ends; what an earlier process wrote after it comes again.

        Args:
            lines: Of each journal, by file name.
            step: The checkpoint's; 0 to begin anew.
        """
        if not self.machine.is_main:
            return
        for file in (self.folder.metrics, self.folder.samples):
            journal.keep_lines(file, lines.get(file.name, 0))
        self.lines = journal.read(self.folder.metrics)
        records.forget_after(self.folder.observations, step if step else -1)
        for other in self.others:
            other.start(self.lines)
        # After `forget_after`: one of each process stays, at the step where it began.
        self._write(environment(self.machine, step))
        if self.board is not None:
            # A kill takes unflushed events with it, and leaves some that come again: the journals have the truth.
            logdir = self.board.writer.place
            try:
                logdir.clear()
            except OSError as error:
                warn(f"{logdir.folder} can't be cleared ({error.strerror}): TensorBoard shows some steps twice")
            self.board.replay(self.lines)

    def on_log(self, args: Any, state: TrainerState, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write the line of a log that holds metrics, and show it."""
        line = journal.entry(logs or {}, state.global_step, state.epoch)
        if line is None:
            return
        # The file comes first: what is on disk is the truth.
        self._add(line)
        if self.board is not None:
            self.board.add(line)
        for other in self.others:
            other.add(line, args, state, control)
        self.console.show(line, state)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note the step; the next heartbeat of status.json has it."""
        self.status.step = state.global_step

    def record(self, record: Record) -> None:
        """Keep and draw a record of the model, on rank 0.

        Args:
            record: Its kind, phase and step say where it belongs; an earlier one of the same is replaced.
        """
        if self.machine.is_main:
            self._write(record)
            if self.board is not None:
                self.board.draw(record)

    def add_samples(self, answers: list[Entry], step: int) -> None:
        """Write answers to the fixed prompts into `samples.jsonl`, and show them."""
        self._samples.append(*answers)
        if self.board is not None:
            self.board.add_samples(answers, step)

    def show_lock(self) -> None:
        """Show `run.lock.json`, which exists now."""
        if self.board is not None:
            self.board.add_lock()

    def finish(self, summary: Entry) -> None:
        """Write the summary row, and end what is shown of the run, on rank 0."""
        if not self.machine.is_main:
            return
        line = {**summary, "time": journal.now()}
        self._add(line)
        if self.board is not None:
            self.board.conclude(line)
        for other in self.others:
            other.add(line, None, None, None)
            other.close(is_done=True)
        self.close()

    def close(self, *, is_stopped: bool = False) -> None:
        """End what is shown of the run; later calls do nothing.

        Args:
            is_stopped: The run was preempted or interrupted, which is no failure.
        """
        if self.board is not None:
            self.board.close("unknown" if is_stopped else "failure")
        for other in self.others:
            other.close(is_done=False)

    def _add(self, line: Entry) -> None:
        self.lines.append(line)
        self._metrics.append(line)

    def _write(self, record: Record) -> None:
        try:
            record.write(self.folder.observations)
        except OSError as error:
            # Once: on a full disk every later record fails, too.
            if not self._is_recordless:
                where = self.folder.observations
                warn(f"{where} can't be written ({error.strerror}): records are lost, training goes on")
            self._is_recordless = True


class Samples(TrainerCallback):
    """Generate answers to fixed prompts at evaluations; all ranks do.

    Args:
        tracker: Writes and shows them.
        prompts: What is answered, and how long answers may be.
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tracker: Tracker, prompts: Prompts, tokenizer: Any) -> None:
        self.tracker, self.prompts, self.tokenizer = tracker, prompts, tokenizer
        self._step = -1

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Answer the prompts with the model as it is now; once a step, however many splits are evaluated."""
        if state.global_step == self._step:
            return
        self._step = state.global_step
        model, machine, prompts = kwargs["model"], self.tracker.machine, self.prompts.prompts
        task = self.tracker.recipe.task
        options: dict[str, Any] = {"max_new_tokens": self.prompts.max_new_tokens, "task": task}
        with machine.autocast(model.device.type):
            answers = answer_together(model, self.tokenizer, prompts, **options)
        if machine.is_main:
            shown = [{"reference": text} for text in self.prompts.references] or [{}] * len(prompts)
            told = self.prompts.told or [self.tokenizer.decode(prompt) for prompt in prompts]
            found = [
                {"step": self._step, "prompt": prompt, "answer": one.text, "ended": one.ended} | more
                for prompt, one, more in zip(told, answers, shown, strict=True)
            ]
            self.tracker.add_samples(found, self._step)


class Console(TrainerCallback):
    """Show training on the terminal, on rank 0: one short line a log, and how far it is.

    Args:
        headline: Evaluation metrics to show, in this order, where the task has them.
        rows: The word for rows that are not made of tokens, e.g. images; None where they are.
    """

    def __init__(self, headline: tuple[str, ...], rows: str | None = None) -> None:
        self.headline, self.rows = headline, rows
        self._training = Phase("training", unit="steps", is_told=False)
        self._evaluating: Phase | None = None
        self._has_begun = False

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Show training; a resumed run starts where it was."""
        self._training.total = state.max_steps
        self._training.done = self._training.first = state.global_step
        log.begin(self._training)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Take the display away."""
        self.on_evaluate(args, state, control)  # an evaluation that was stopped never came to its end
        log.end(self._training)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Start the clock for the time left; an evaluation before the first step does not count."""
        if not self._has_begun:
            self._has_begun, self._training.started = True, time.monotonic()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Note the step; the display looks by itself."""
        self._training.done = state.global_step

    def on_prediction_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Count a batch of an evaluation; after the last one come metrics and answers."""
        if self._evaluating is None:
            # The Trainer has no hook before the first batch.
            loader = kwargs.get("eval_dataloader")
            total = None if loader is None else len(loader)
            self._evaluating = log.begin(Phase("evaluating", total, "batches", is_told=False))
        self._evaluating.done += 1

    def on_evaluate(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """End the evaluation's display."""
        if self._evaluating is not None:
            log.end(self._evaluating)
            self._evaluating = None

    def show(self, line: Entry, state: TrainerState) -> None:
        """Print a line of metrics.jsonl."""
        phase = line["phase"]
        if phase == "train":
            self._training.done = state.global_step
            formats = {
                "loss": "loss {:.4f}",
                "grad_norm": "grad norm {:.3g}",
                "learning_rate": "lr {:.2e}",
                "samples_per_second": "{:.1f} samples/s",
                "tokens_per_second": "{:.0f} tokens/s",
            }
            if self.rows is not None:
                formats |= {"samples_per_second": f"{{:.1f}} {self.rows}/s"}
                del formats["tokens_per_second"]
            values = {name: shown.format(line[name]) for name, shown in formats.items() if name in line}
            self._training.detail = "  ".join(values.values())
            left = f"{clock(self._training.left() or 0.0)} left"
            head = [f"step {line['step']}/{state.max_steps}", f"epoch {line['epoch']:.2f}"]
            text = "  ".join([*head, *values.values(), left])
            # A narrow terminal gets one line a step, too.
            for least in ("tokens_per_second", "grad_norm", "learning_rate"):
                if len(text) > log_text.width():
                    values.pop(least, None)
                    text = "  ".join([*head, *values.values(), left])
        else:
            scores = [f"{name} {log_text.number(line[name])}" for name in self.headline if name in line]
            # At the end, the best checkpoint is what was loaded, and what is saved.
            kept = state.best_global_step if phase in ("final", "test") and state.best_model_checkpoint else None
            of = f"at step {line['step']}" if kept is None else f"of step {kept}, the best"
            text = "  ".join([f"{phase:>4} {of}", *scores])
            self._training.outcome = text.strip()
        # In JSON lines the message carries the whole line, not only what is printed.
        log.tell(Message(text, phase, fields=line))
