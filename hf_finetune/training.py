"""The story of one run: look at the machine, load data and model, train, evaluate, save, check, report."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from transformers import set_seed

from hf_finetune import (
    arguments,
    evaluation,
    export,
    hardware,
    keeping,
    learning,
    memory,
    model,
    patience,
    quiet,
    runreport,
    session,
    sharding,
    targetsfile,
    terminal,
    zero,
)
from hf_finetune.card import page
from hf_finetune.divergence import Guard
from hf_finetune.errors import DivergedError, FinetuneError, ModelError, OutOfMemoryError, Problem
from hf_finetune.hub import best, push
from hf_finetune.observing import Observing
from hf_finetune.peers import Watch
from hf_finetune.preemption import Stopped, StopRequest
from hf_finetune.preflight import fitting, heavy, light
from hf_finetune.resources import is_out_of_memory
from hf_finetune.resumable import EvaluationStopped
from hf_finetune.runfolder import RunFolder, Start, Status
from hf_finetune.runlock import making
from hf_finetune.runreport import Outcome
from hf_finetune.session import Wishes
from hf_finetune.terminal import Message, phase, say
from hf_finetune.tracking import Observers
from hf_finetune.trainer import FinetuneTrainer

if TYPE_CHECKING:
    from hf_finetune.findings import Findings
    from hf_finetune.learning import Learner
    from hf_finetune.preflight.heavy import Ready
    from hf_finetune.recipe import Recipe
    from hf_finetune.resumable import Keeper
    from hf_finetune.runlock.repeating import Repeat
    from hf_finetune.tuning import Choices


def finetune(
    recipe: Recipe, *, restart: bool = False, allow_change: Sequence[str] = (), repeat: Repeat | None = None
) -> Outcome | None:
    """Run one recipe from beginning to end, or from where an earlier run of it was stopped.

    Args:
        recipe: What to do.
        restart: Move an earlier run in the same folder aside instead of going on with it.
        allow_change: Keys of the recipe that may differ from those of the run that goes on.
        repeat: The locked run that this is to be once more, bit for bit; anything that differs is refused.

    Returns:
        What came of it; None where the folder already holds this very run, finished.

    Raises:
        FinetuneError: Something is wrong; its class says what kind, its exit code is the process's.
        Stopped: A signal ended the run; a SystemExit with the process's exit code.
    """
    quiet.hush()
    findings = light.look(recipe)
    machine = hardware.survey(recipe)
    machine = machine if repeat is None else repeat.as_locked(machine, recipe)
    stop = StopRequest()
    folder = RunFolder(recipe.output)
    with stop.listening():
        start = None
        if not findings.blame("output"):
            start = session.claim(folder, recipe, machine, Wishes(restart, tuple(allow_change), repeat))
        if isinstance(start, FinetuneError):
            findings.add(start)
        if not isinstance(start, Start):
            heavy.prepare(recipe, machine, findings)
            return None  # not reached: a folder that can't be taken is an error
        if start.kind == "done":
            if machine.is_main:
                push.once_more(folder, recipe)
            return None
        machine, before = session.as_before(folder, recipe, machine, start, repeat)
        with session.status(folder, machine, start) as status:
            with Watch(
                folder.path, machine.rank, machine.world_size, partial(session.peer_failed, status, machine)
            ) as watch:
                ready = heavy.prepare(recipe, machine, findings, session.first_day(folder, machine, start))
                if start.kind == "extend":
                    session.extend(folder, ready, status)
                notes = [*start.notes, *(() if repeat is None else repeat.notes_on_rows(ready.prepared.fingerprint))]
                ready = fitting.fit(ready, before, findings)
                outcome = _Run(ready, findings, folder, status, stop, watch, before, repeat).complete(notes)
            push.after_training(outcome)
            return outcome


@dataclass(frozen=True)
class _Run:
    """One run in its folder."""

    ready: Ready
    findings: Findings
    folder: RunFolder
    status: Status
    stop: StopRequest
    watch: Watch
    before: Choices | None
    """What was chosen when the run began, if it is to go on."""
    repeat: Repeat | None = None
    """The locked run that this one repeats."""

    def complete(self, notes: Sequence[str]) -> Outcome:
        """Load, train, evaluate, save, check what was saved, report."""
        recipe, machine, folder = self.ready.recipe, self.ready.machine, self.folder
        tell = say if machine.is_main else _keep_silent
        for note in notes:
            tell(f"note: {note}")
        keeper = keeping.keeper(self.ready, folder, self.stop, tell)
        learner = learning.learner(self.ready, self.findings, self.before)
        observers = Observers(recipe, folder, self.status, machine)
        try:
            return self._complete(learner, keeper, observers)
        except Stopped:
            observers.close(is_stopped=True)
            raise
        finally:
            observers.close()

    def _complete(self, learner: Learner, keeper: Keeper, observers: Observers) -> Outcome:
        recipe, machine, folder = learner.recipe, learner.machine, self.folder
        keeping.go_on(keeper, observers, self.status, say if machine.is_main else _keep_silent)
        trainer = _trainer(learner, observers, folder)
        trainer.keeper, trainer.guard, trainer.is_sharded = keeper, Guard(recipe.training), machine.is_sharded
        trainer.progress = self.watch.progress  # type: ignore[method-assign]
        trainer.throughput.arithmetic = learner.arithmetic
        observing = Observing(recipe, learner.prepared, machine, folder.observations, observers.record)
        observing.attend(trainer, say if machine.is_main else _keep_silent)
        with _out_of_memory(trainer, learner), best.uploaded(trainer, learner, folder) as uploads:
            trainer.paths, choices = learning.fast_paths(trainer, learner, self.before)
            if self.repeat is not None:
                self.repeat.refuse_other(choices)
            if machine.is_main:
                lock = making.lock(self.ready, learner.machine, choices)
                making.write(lock, folder.run_lock, goes_on=keeper.resume_from is not None)
                observers.locked()
            # Steps have the short limit, and begin when the slowest node has loaded and the first rank has hashed.
            keeper.store.ranks.barrier()
            hardware.limit_collectives(patience.collective())
            resumed_at = trainer.steps_done()
            seconds, scores = _train(trainer, learner, self.stop)
            hardware.limit_collectives(patience.wait())
            self.watch.progress(trainer.state.global_step, "saving the adapter", is_long=True)
            with phase("saving the adapter"), _divergence_named(trainer):
                difference = _save(trainer, learner, folder)
        outcome = Outcome(
            recipe=recipe,
            machine=machine,
            folder=folder,
            prepared=learner.prepared,
            parameters=model.parameter_counts(learner.adapted),
            steps=trainer.state.global_step,
            resumed_at=resumed_at,
            seconds=seconds,
            rates=trainer.throughput.rates(),
            scores=scores,
            warnings=(*self.findings.warnings, *uploads.problems),
            peak_memory=memory.peak(machine.device),
            reload_difference=difference,
            probe_seconds=learner.seconds + trainer.paths.seconds,
            not_taken=0 if trainer.guard is None else trainer.guard.not_taken,
        )
        summary = runreport.summary_entry(outcome)
        observers.conclude(summary)
        if machine.is_main:
            run = runreport.write(outcome, observers.journal.entries)
            if run is not None:
                page.complete(run)
            lines = runreport.summary_lines(outcome)
            terminal.tell(Message("\n".join(lines), "summary", fields={**summary, "run_folder": str(folder.path)}))
        PartialState().wait_for_everyone()
        return outcome


def _trainer(learner: Learner, observers: Observers, folder: RunFolder) -> FinetuneTrainer:
    """The Trainer with everyone who watches it."""
    recipe, job = learner.recipe, learner.job
    if learner.machine.zero_stage:
        zero.read_no_code()
    options = arguments.training_arguments(
        recipe, learner.machine, job.division, learner.run_length, folder.checkpoints
    )
    callbacks = [*recipe.adapter.callbacks(), *observers.callbacks(learner.prepared, learner.tokenizer)]
    trainer = FinetuneTrainer(learner.adapted, options, job, callbacks)
    sharding.suit(trainer.accelerator, learner.adapted, learner.machine)
    return trainer


def _train(trainer: FinetuneTrainer, learner: Learner, stop: StopRequest) -> tuple[float, dict[str, dict[str, float]]]:
    """Train and evaluate; returns the wall-clock seconds of training, and the metrics.

    Raises:
        Stopped: The ranks agreed to.
        DivergedError: The optimiser took no step at all.
    """
    # Ranks see different rows, so they should drop different units too.
    set_seed(learner.recipe.training.seed + learner.machine.rank)
    started, seconds, scores = time.perf_counter(), 0.0, {}
    with stop.deferred(), suppress(EvaluationStopped):
        trainer.train_on()
        seconds = time.perf_counter() - started
        if not trainer.stopped:
            if trainer.guard is not None:
                trainer.guard.conclude(trainer.state.global_step)
            learner.recipe.adapter.finish(trainer.bare_model)
            scores = evaluation.final(trainer, learner.prepared)
    if trainer.stopped:
        raise Stopped(trainer.stopped)
    return seconds, scores


@contextmanager
def _out_of_memory(trainer: FinetuneTrainer, learner: Learner) -> Iterator[None]:
    """Say what was going on when the device ran out of memory, and what would help.

    Raises:
        OutOfMemoryError: Instead of torch's own.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        job, length = learner.job, learner.recipe.data.max_length
        if trainer.is_in_train and learner.adapted.training:
            what = f"training with {job.division.micro_batch} rows of up to {length} tokens"
            hint = (
                "halve training.micro_batch (the optimisation stays the same) or set training.activation_checkpointing"
            )
        else:
            rows = job.eval_batch.rows_of(length, all_logits=trainer.paths.makes_all_logits)
            what = f"evaluating with {rows} rows of {length} tokens, or as many tokens in more rows"
            hint = f"set training.eval_batch to {max(1, rows // 2)}"
        message = f"out of memory at step {trainer.state.global_step}, {what}; {hint}"
        raise OutOfMemoryError(Problem(message)) from error


def _save(trainer: FinetuneTrainer, learner: Learner, folder: RunFolder) -> float | None:
    """Write `adapter/`, then read it back and compare it with the model in memory; see `Outcome.reload_difference`.

    Weights that are divided among ranks are gathered before, by all of them; what follows is the first rank's alone.
    """
    recipe, machine = learner.recipe, learner.machine
    trained = trainer.bare_model
    state = _gathered(trainer, trained) if machine.is_sharded or machine.zero_stage else None
    if not machine.is_main:
        return None
    targetsfile.write(folder.targets, learner.prepared.targets)
    export.save(trained, recipe, learner.prepared.targets, learner.tokenizer, folder.adapter, state=state)
    if not machine.reloads(recipe):
        export.compare(trained, recipe, folder.adapter, state)
        return None
    batch = learner.job.probe(next(trained.parameters()).device)
    memory.give_back()  # a second model follows, and what training left free would lie beside it
    try:
        return export.verify(trained, recipe, machine, batch, folder.adapter)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
    say("note: a second model does not fit in memory: the saved weights are compared bit by bit, not by their logits")
    export.compare(trained, recipe, folder.adapter)
    return None


@contextmanager
def _divergence_named(trainer: FinetuneTrainer) -> Iterator[None]:
    """Blame training, not the saved file, where the two disagree because training has blown the model up.

    Raises:
        DivergedError: The last loss is over twice the first. Then rounding decides what the model says.
    """
    try:
        yield
    except ModelError as error:
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        if not losses or losses[-1] <= 2 * losses[0]:
            raise
        rose = f"the loss rose from {losses[0]:.4g} to {losses[-1]:.4g}, and the model's answers hang on rounding"
        problem = Problem(f"training diverged: {rose}; lower it and give --restart", key="training.learning_rate")
        raise DivergedError(problem) from error


def _gathered(trainer: FinetuneTrainer, trained: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The trained weights in one piece, on the CPU of the first rank; every rank takes part.

    Raises:
        ModelError: One was not given back.
    """
    if trainer.is_deepspeed_enabled:
        return zero.trained(trained, keeps=trainer.args.process_index == 0)
    wanted = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    state: Any
    if trainer.accelerator.is_fsdp2:
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
        state = get_model_state_dict(trainer.model_wrapped, options=options)
    else:
        state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.args.process_index == 0 and (missing := wanted - state.keys()):
        raise ModelError(f"sharded training did not give back {len(missing)} trained weights, e.g. {min(missing)}")
    return dict(state)


def _keep_silent(text: str) -> None:
    """What ranks other than 0 have to say."""
