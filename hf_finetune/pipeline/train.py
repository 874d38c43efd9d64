"""Train: check everything, take the run folder, prepare data, load, train, evaluate, save, report, push.

`train` is the story; the stages follow in the order in which it calls them, and each fills in a part of `Training`.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, set_seed

from hf_finetune import device, log
from hf_finetune.adapters.base import Setting
from hf_finetune.config.blocks import Speed
from hf_finetune.config.reading import Reading
from hf_finetune.data.batches import rows_of
from hf_finetune.data.job import Job
from hf_finetune.device import Machine, is_out_of_memory
from hf_finetune.errors import (
    INTERRUPTED,
    PREEMPTED,
    Findings,
    FinetuneError,
    OutOfMemoryError,
    PeerError,
    Problem,
    RecipeError,
    Stopped,
)
from hf_finetune.inference import saving
from hf_finetune.log import phase, say
from hf_finetune.log.lines import Message
from hf_finetune.models import load, memory, sharded, tuning
from hf_finetune.models import paths as models_paths
from hf_finetune.models.tuning import Bench
from hf_finetune.pipeline.check import Source, look, read
from hf_finetune.pipeline.examine import examine, fit
from hf_finetune.pipeline.run import Run
from hf_finetune.recipe import Recipe
from hf_finetune.reports import card
from hf_finetune.reports import outcome as reports_outcome
from hf_finetune.reports import run as reports_run
from hf_finetune.reports.outcome import Outcome
from hf_finetune.run import folder as run_folder
from hf_finetune.run import lock as run_lock
from hf_finetune.run import ranks as run_ranks
from hf_finetune.run.folder import Begins, RunFolder
from hf_finetune.run.lock import Choice, Choices, Repeat
from hf_finetune.run.ranks import Ranks, on_first
from hf_finetune.run.status import State, Status
from hf_finetune.tracking.observing import Observing
from hf_finetune.tracking.throughput import Flops, matmul_peak
from hf_finetune.tracking.tracker import Tracker
from hf_finetune.training import locking, start
from hf_finetune.training import resume as training_resume
from hf_finetune.training import trainer as training_trainer
from hf_finetune.training.callbacks import StopRequest
from hf_finetune.training.loop import EvaluationStopped
from hf_finetune.training.peers import Failure, Watch
from hf_finetune.training.resume import Checkpointing
from hf_finetune.training.trainer import FinetuneTrainer

if TYPE_CHECKING:
    from hf_finetune.hub.best import BestUploads  # a run that uploads nothing loads nothing of `hub`

# Settings of `speed` whose outcome is kept in the lock, each by its own name.
PATHS = tuple(name for name in Speed.model_fields if name != "compile")


@dataclass
class Training:
    """One run while it trains, filled in by the stages below."""

    recipe: Recipe
    machine: Machine
    findings: Findings
    folder: RunFolder
    stop: StopRequest
    ranks: Ranks
    repeat: Repeat | None = None
    """The locked run that this one repeats."""
    begins: Begins = field(init=False)
    """The way it begins in its folder."""
    notes: list[str] = field(default_factory=list)
    """Differences from the run that is resumed or repeated, all of them allowed."""
    before: Choices | None = None
    """Choices that were made when the run began, if it is resumed or repeated."""
    status: Status = field(init=False)
    watch: Watch = field(init=False)
    job: Job = field(init=False)
    outline: PreTrainedModel = field(init=False)
    """The base model on the meta device."""
    choices: Choices = field(init=False)
    """Settings that decide bits and that the recipe leaves open."""
    adapted: torch.nn.Module = field(init=False)
    """The model with its adapter."""
    checkpointing: Checkpointing = field(init=False)
    tracker: Tracker = field(init=False)
    trainer: FinetuneTrainer = field(init=False)
    probe_seconds: float = 0.0
    """Spent on choosing the fastest way to train here."""
    resumed_at: int = 0
    """The step at which this process went on with the run; 0 if it began it."""
    seconds: float = 0.0
    """Wall-clock seconds of training since it began or was resumed, evaluations in between included."""
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    """Final metrics by split."""
    difference: float | None = None
    """Between the logits in memory and those of the saved model; see `inference.saving.save_and_compare`."""

    def say(self, text: str) -> None:
        """Say something once, whatever the number of ranks."""
        if self.machine.is_main:
            say(text)

    @property
    def bench(self) -> Bench:
        """The run as far as measuring a step needs it."""
        passes = self.job.length.total_steps * self.job.division.accumulation
        return Bench(self.recipe, self.machine, self.adapted, self.job, passes)


def train(
    recipe: Source,
    overrides: Sequence[str] = (),
    *,
    resume: bool = True,
    restart: bool = False,
    allow_change: Sequence[str] = (),
    locked: str | os.PathLike[str] | Repeat | None = None,
) -> Run:
    """Train one recipe from beginning to end, or from where an earlier run of it was stopped.

    >>> run = train("recipes/quickstart.yaml", ["training.epochs=1"])
    >>> run.metrics["validation"]["accuracy"]
    >>> run.adapter
    PosixPath('runs/quickstart/adapter')

    Args:
        recipe: A recipe, a YAML file, or a dict of its blocks.
        overrides: Each `key.path=value`, the value in YAML.
        resume: Go on with an earlier run in the same folder; False refuses a folder that holds one.
        restart: Move an earlier run in the same folder aside and begin anew.
        allow_change: Keys of the recipe that may differ from those of the run that is resumed.
        locked: The `run.lock.json` of a run that this one is to repeat bit for bit; whatever differs is refused.

    Returns:
        The finished run; the one that the folder holds already, if it is this very run.

    Raises:
        FinetuneError: Something is wrong; its class says what kind, and `problems` has all of it.
        Stopped: A signal ended the run, with a checkpoint to resume from: a SystemExit, and a KeyboardInterrupt if it
            was Ctrl-C.
    """
    reading, repeat = read(recipe, overrides, locked, allow_change, anew=restart or not resume)
    findings = look(reading, folder=False)
    if reading.recipe is None:
        findings.located(reading.locate).raise_errors()
    try:
        with log.notebook(), log.quietly(), device.process_left_as_it_was():
            return _train(reading, findings, repeat, resume=resume, restart=restart, allow_change=allow_change)
    except FinetuneError as error:
        located = type(error)(map(reading.locate, error.problems))
        located.exit_code = error.exit_code  # a peer's, where it is a peer that failed
        raise located from error


def _train(
    reading: Reading[Recipe],
    findings: Findings,
    repeat: Repeat | None,
    *,
    resume: bool,
    restart: bool,
    allow_change: Sequence[str],
) -> Run:
    recipe = reading.checked()
    machine = device.survey(recipe)
    machine = machine if repeat is None else repeat.as_locked(machine, recipe)
    # These two make process groups of their own, on all ranks in this order.
    stop, ranks = StopRequest(), run_ranks.join(machine.local_rank, device.wait_timeout())
    recipe = on_first(ranks, lambda: recipe)  # rank 0 chose the number of its folder, and defaults
    run = Training(recipe, machine, findings, RunFolder(recipe.output), stop, ranks, repeat)
    with stop.listening():
        # First of all, so that two runs never prepare data for one folder.
        take_folder(run, resume=resume, restart=restart, allow_change=allow_change)
        if run.begins == "done":
            push_again(run)
            return Run(run.folder.path, recipe)
        go_on_as_it_began(run)
        run.status = Status(run.folder.status, is_silent=run.begins == "extend")
        with run.folder.status_kept(run.status) if machine.is_main else nullcontext():
            # Ranks watch each other until all have written what is theirs. An upload comes after that: it is rank 0's
            # alone, may take hours, and no other rank waits for it.
            with ExitStack() as stack:
                on_failure = partial(peer_failed, run.status, machine)
                launch = on_first(ranks, lambda: uuid.uuid4().hex[:12])
                run.watch = Watch(run.folder.path, launch, machine.rank, machine.world_size, on_failure=on_failure)
                stack.enter_context(run.watch)
                # All that can be refused is refused before weights load, which takes longest.
                prepare_data(run)
                find_checkpoint(run)
                load_model(run)
                # Not before: a run that is refused leaves its journals as they were.
                stack.enter_context(observed(run))
                make_trainer(run)
                with _out_of_memory_explained(run), best_uploaded(run) as uploads:
                    take_fast_paths(run)
                    write_lock(run)
                    train_and_evaluate(run)
                    save_and_compare(run)
                outcome = report(run, () if uploads is None else uploads.problems)
            if recipe.hub is not None and machine.is_main:
                from hf_finetune.hub import push

                push.after_training(run.folder, recipe)
    return Run(run.folder.path, recipe, outcome)


# ---- the run folder ----


def take_folder(run: Training, *, resume: bool, restart: bool, allow_change: Sequence[str]) -> None:
    """Take the run folder on rank 0; all ranks learn what there is to do, or why nothing can be done.

    Raises:
        FinetuneError: It belongs to something else, or a repeat differs from its lock; with everything else that is
            wrong with the run.
    """

    def take() -> tuple[Begins, list[str]]:
        allowed = [key for key in allow_change if run.repeat is None or not key.startswith(run_lock.KEYS)]
        run_folder.refuse_unknown(allowed)
        notes = [] if run.repeat is None else locking.refuse_drift(run.repeat, run.recipe, run.machine)
        if not resume and not restart and run.folder.previous() is not None:
            message = f"{run.folder.path} holds a run already; restart moves it aside, or name another folder"
            raise RecipeError(Problem(message, key="output"))
        begins, changes = run.folder.take(run.recipe.dump(), restart=restart, allowed=allowed)
        if begins == "done":
            how = "or give --restart to run it anew"
            say(f"{run.folder.path} already holds this run, finished; see {run.folder.report}, {how}")
        return begins, [*notes, *changes]

    if not run.findings.blame("output"):
        try:
            run.begins, run.notes = on_first(run.ranks, take)
        except PeerError:
            raise  # nobody is there to look at the rest together
        except FinetuneError as error:
            run.findings.add(error)
        else:
            return
    # Before it is refused, so that one report has all that is wrong.
    examine(run.recipe, run.machine, run.findings)
    run.findings.raise_errors()


def push_again(run: Training) -> None:
    """Upload a finished run whose upload had failed, because its command was given again."""
    if run.recipe.hub is not None and run.machine.is_main:
        from hf_finetune.hub import push

        push.once_more(run.folder, run.recipe)


def go_on_as_it_began(run: Training) -> None:
    """Take over what was chosen when the run began, so that it is resumed, or repeated, with the same arithmetic."""
    folder, machine, is_resumed = run.folder, run.machine, run.begins in ("resume", "extend")

    def kept() -> Choices | None:
        found = run_lock.choices(folder.run_lock) if is_resumed else None
        if found is None or (folder.has_checkpoints and locking.is_same_memory(folder.run_lock, machine)):
            return found
        return found.without("micro_batch", "activation_checkpointing")

    choices = on_first(run.ranks, kept) if run.repeat is None else run.repeat.lock.choices
    if choices is not None and choices.device == machine.device:
        run.machine, run.before = choices.onto(machine, run.recipe), choices
    elif run.repeat is not None or (is_resumed and folder.has_checkpoints):
        why = "is missing or damaged" if choices is None else f"is of a {choices.device}"
        run.say(f"note: {folder.run_lock.name} {why}: its choices are made anew, the next steps may differ in bits")


def peer_failed(status: Status, machine: Machine, failure: Failure) -> None:
    """Keep status.json true where another rank has failed and this process is about to end because of it.

    Args:
        status: This rank's.
        machine: Tells which rank this is.
        failure: The rank, why, and the exit code; of this very rank where nobody knows which one is to blame.
    """
    # Rank 0 says it, whatever it ends with. Where rank 0 may be the one that is lost, so do rank 1 and the first rank
    # of each node, unless somebody has: a node may take all of its ranks with it.
    may_be_first = failure.rank in (0, machine.rank) and (machine.rank == 1 or machine.is_node_main)
    if not machine.is_main and not (may_be_first and status.says_running()):
        return
    states: dict[int, State] = {PREEMPTED: "preempted", INTERRUPTED: "interrupted"}
    status.finish(states.get(failure.exit_code, "failed"), failure.exit_code, failure.reason)


# ---- data, and everything else that needs no weights ----


def prepare_data(run: Training) -> None:
    """Read, check, split and encode the data; choose the micro-batch; begin an extension of a finished run.

    Raises:
        FinetuneError: Everything that is wrong, at once; of the kind with the lowest exit code.
    """

    def first_day() -> str:
        """Find the day on which the run began, as YYYY-MM-DD."""
        if run.begins in ("resume", "extend"):
            if (kept := run_lock.day(run.folder.run_lock)) is not None:
                return kept
            with suppress(OSError):
                return date.fromtimestamp(run.folder.recipe.stat().st_mtime).isoformat()
        return date.today().isoformat()

    def extend() -> None:
        """Put a finished run aside and go on from its last state."""
        training_resume.extend(run.folder, job)
        run.status.start()

    # Chat templates print the day: it must be the same on all ranks, and after midnight.
    parts = examine(run.recipe, run.machine, run.findings, on_first(run.ranks, first_day))
    run.findings.raise_errors()
    if parts.outline is None or parts.job is None:
        raise AssertionError("a part that can't be made has an error")
    run.recipe, run.machine, run.outline, job = parts.recipe, parts.machine, parts.outline, parts.job
    if run.begins == "extend":  # not before: a finished run stays as it is while anything can be wrong
        on_first(run.ranks, extend)
        run.status.is_silent = False
    if run.repeat is not None:
        run.notes += run.repeat.notes_on_rows(job.prepared.fingerprint)
    run.job, chosen = fit(job, run.outline, run.before, run.findings)
    run.machine = run.job.machine
    run.choices = Choices.ruled(run.recipe, run.machine, run.before)
    for name, made in chosen.items():
        run.choices = run.choices.plus(name, made)
    for note in run.notes:
        run.say(f"note: {note}")


def find_checkpoint(run: Training) -> None:
    """Open the checkpoints, and find the one to resume from.

    Raises:
        CheckpointError: No checkpoint is whole, or they are of other data, another model or other sharding.
    """
    run.checkpointing = Checkpointing(run.job, run.folder, run.ranks, stop=run.stop, status=run.status, tell=run.say)


# ---- model, adapter, and the fastest way to train them here ----


def load_model(run: Training) -> None:
    """Load the weights, apply the adapter, choose the attention."""
    recipe, machine, job = run.recipe, run.machine, run.job
    run.say(f"run folder {recipe.output}: {machine.describe()}")
    for line in [*reports_outcome.data_lines(recipe, job.prepared), *map("warning: {}".format, run.findings.warnings)]:
        run.say(line)
    # Without the rank: fresh heads and adapters must be the same on all of them.
    set_seed(recipe.training.seed)
    with phase("loading the model"):
        loaded = sharded.load(recipe, job.targets, machine, job.tokenizer, run.outline)
    setting = Setting(
        peft_type=recipe.task.peft_task,
        tokenizer=job.tokenizer,
        total_steps=job.length.total_steps,
        head_modules=loaded.head_modules,
        labels=job.targets.names,
        batches=lambda: job.sample(loaded.model.device),
    )
    with phase("applying the adapter"):
        run.adapted = load.build(recipe, loaded, setting)
    if machine.activation_checkpointing:
        load.enable_activation_checkpointing(loaded.model)
    run.say(reports_outcome.model_line(recipe, load.parameter_counts(run.adapted)))
    run.say(reports_outcome.plan_line(job))
    if run.before is not None and "attention" in run.before.made and recipe.model.attention == "auto":
        attention = run.before.made["attention"]  # the model was loaded with it already
    else:
        began = time.perf_counter()
        with phase("choosing the attention"):
            attention = tuning.choose_attention(run.bench)
        # Told apart from training time in the report: a resumed run does not choose again.
        run.probe_seconds += time.perf_counter() - began
        run.machine = replace(machine, attention=attention.value)
        run.job = replace(job, machine=run.machine)
    run.choices = run.choices.plus("attention", attention)


@contextmanager
def observed(run: Training) -> Iterator[None]:
    """Open metrics.jsonl and TensorBoard, and cut them where the checkpoint ends."""
    run.tracker = Tracker(run.recipe, run.folder, run.status, run.machine)
    try:
        run.checkpointing.resume(run.tracker)
        yield
    except Stopped:
        run.tracker.close(is_stopped=True)
        raise
    finally:
        run.tracker.close()


def make_trainer(run: Training) -> None:
    """Make the Trainer with its callbacks."""
    recipe, machine, job = run.recipe, run.machine, run.job
    if machine.zero_stage:
        sharded.read_no_code()
    options = training_trainer.training_arguments(job, run.folder.checkpoints)
    callbacks = [*recipe.adapter.callbacks(), *run.tracker.callbacks(job.prepared, job.tokenizer)]
    trainer = run.trainer = FinetuneTrainer(
        run.adapted, options, job, checkpointing=run.checkpointing, callbacks=callbacks
    )
    # The accelerator is the Trainer's, and what FSDP is told must be told before training wraps the model.
    sharded.suit(trainer.accelerator, run.adapted, machine)
    # Where the trainer is, the other ranks learn; it knows nothing of them itself.
    trainer.progress = run.watch.progress  # type: ignore[method-assign]
    trainer.throughput.flops = Flops.of(run.adapted)
    trainer.throughput.peak = matmul_peak(machine) * machine.world_size
    observing = Observing(recipe, job.prepared, machine, run.folder.observations, run.tracker.record)
    observing.watch(trainer, run.say)


def best_uploaded(run: Training) -> AbstractContextManager[BestUploads | None]:
    """Upload each best checkpoint while the body trains, where the recipe has a `hub`."""
    if run.recipe.hub is None:
        return nullcontext()
    from hf_finetune.hub import best

    return best.uploaded(run.trainer, run.folder)


def take_fast_paths(run: Training) -> None:
    """Install the fast paths, compile layers where that pays, and say what was chosen.

    Raises:
        CheckpointError: A repeat can't do what the locked run did.
    """
    trainer, before = run.trainer, run.before
    with torch.random.fork_rng(devices=[]):  # a loader draws a seed
        batch = next(iter(run.job.sample(trainer.args.device)))
    then: dict[str, bool] = {} if before is None else before.value("fast_paths") or {}
    # A path that is younger than the run was not taken when it began, either.
    left_out = {name: False for name in PATHS if then and not then.get(name, False)}
    allowed = run.recipe.model_copy(update={"speed": run.recipe.speed.model_copy(update=left_out)})
    with phase("comparing fast paths"):
        paths = trainer.paths = models_paths.take(trainer.bare_model, allowed, run.machine, run.job.targets, batch)
    shown = ", ".join(f"{name.replace('_', ' ')} ({what})" for name, what in paths.taken.items())
    log.detail(Message(f"fast paths: {shown or 'none'}"))
    # Compiling comes last: it is timed with the paths that are taken, and compiles them, too.
    began = time.perf_counter()
    known = None if before is None or run.recipe.speed.compile != "auto" else before.made.get("compiled")
    if known is None:
        with phase("choosing whether to compile"):
            known = tuning.choose_compilation(run.bench, paths)
    elif known.value and (why := tuning.why_not_compiled(run.bench)):
        run.say(f"note: layers were compiled when the run began, not now ({why}): the next steps may differ in bits")
        known = Choice(value=False, why=why)
    elif known.value:
        paths.compile(run.bench.base)
    run.probe_seconds += paths.seconds + time.perf_counter() - began
    run.choices = run.choices.plus("compiled", known)
    log.detail(Message(f"chosen here: {run.choices.describe()}"))
    taken = {name: name in paths.taken for name in PATHS if getattr(run.recipe.speed, name)}
    if other := [name for name, was in then.items() if taken.get(name, was) != was]:
        run.say(f"warning: {', '.join(other)}: not as when the run began, the next steps may differ in bits")
    run.choices = run.choices.plus("fast_paths", Choice(taken, "compared with the plain ones"))
    if run.repeat is not None:
        run.repeat.refuse_other(run.choices)
    run.job = start.remember(trainer, run.ranks)


def write_lock(run: Training) -> None:
    """Write run.lock.json; all ranks leave here together."""
    if run.machine.is_main:
        lock = locking.lock(run.recipe, run.machine, run.job.prepared.fingerprint, run.choices)
        if run.checkpointing.resume_from is not None:
            lock = locking.resumed(lock, run.folder.run_lock)
        lock.write(run.folder.run_lock)
        run.tracker.show_lock()
    # Steps have the short limit, and begin when the slowest node has loaded and the first rank has hashed.
    run.checkpointing.store.ranks.barrier()
    device.limit_collectives(device.collective_timeout())


# ---- training, evaluation, saving ----


def train_and_evaluate(run: Training) -> None:
    """Train, then evaluate the model that is to be saved.

    Raises:
        Stopped: The ranks agreed to stop.
        DivergedError: The optimiser took no step at all.
    """
    trainer = run.trainer
    # Ranks see different rows, so they should drop different units too.
    set_seed(run.recipe.training.seed + run.machine.rank)
    run.resumed_at = trainer.steps_done()  # before that checkpoint makes room for newer ones
    started = time.perf_counter()
    # A stop inside an evaluation of `train_on` saves and returns; one inside the final evaluation comes out of it.
    with run.stop.deferred(), suppress(EvaluationStopped):
        trainer.train_on()
        run.seconds = time.perf_counter() - started
        if not trainer.stopped:
            trainer.guard.conclude(trainer.state.global_step)
            run.recipe.adapter.finish(trainer.bare_model)
            run.scores = training_trainer.final(trainer, run.job.prepared)
            run.job = trainer.job  # the task may have fitted something
    if trainer.stopped:
        raise Stopped.by(trainer.stopped)
    # Rank 0 saves, reads back, draws and reports, while the others wait.
    device.limit_collectives(device.wait_timeout())


def save_and_compare(run: Training) -> None:
    """Write `adapter/`, then read it back and compare it with the model in memory."""
    run.watch.progress(run.trainer.state.global_step, "saving the adapter", is_long=True)
    with phase("saving the adapter"):
        run.difference = saving.save_and_compare(run.trainer, run.folder)


# ---- what it came to ----


def report(run: Training, problems: Sequence[Problem] = ()) -> Outcome:
    """Close metrics.jsonl, write report and model card, and say what the run came to; `problems` are more warnings."""
    trainer, machine = run.trainer, run.machine
    outcome = Outcome(
        recipe=run.recipe,
        machine=machine,
        folder=run.folder,
        prepared=run.job.prepared,
        parameters=load.parameter_counts(run.adapted),
        steps=trainer.state.global_step,
        resumed_at=run.resumed_at,
        seconds=run.seconds,
        rates=trainer.throughput.rates(),
        scores=run.scores,
        kept=trainer.state.best_global_step if run.recipe.training.best_metric else None,
        warnings=(*run.findings.warnings, *problems),
        peak_memory=memory.peak(machine.device),
        reload_difference=run.difference,
        probe_seconds=run.probe_seconds,
        not_taken=trainer.guard.not_taken,
        step_seconds=trainer.throughput.total.seconds,
    )
    summary = reports_outcome.summary_entry(outcome)
    # Report and card are made of the journal, so that its last line comes first.
    run.tracker.finish(summary)
    if machine.is_main:
        with phase("writing the report"):
            if (found := reports_run.write(outcome, run.tracker.lines)) is not None:
                card.complete(found)
        lines = reports_outcome.summary_lines(outcome)
        log.tell(Message("\n".join(lines), "summary", fields={**summary, "run_folder": str(run.folder.path)}))
    PartialState().wait_for_everyone()
    return outcome


# ---- errors in the user's words ----


@contextmanager
def _out_of_memory_explained(run: Training) -> Iterator[None]:
    """Say what was going on when the device ran out of memory, and what would help.

    Raises:
        OutOfMemoryError: Instead of torch's own.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        # A model in training mode inside training: all else is an evaluation, of which there is one in training, too.
        trainer, job, length = run.trainer, run.job, run.recipe.data.max_length
        if trainer.is_in_train and run.adapted.training:
            what = f"training with {job.division.micro_batch} rows of up to {length} tokens"
            hint = "halve training.micro_batch (the same optimisation) or set training.activation_checkpointing"
        else:
            rows = rows_of(length, *job.eval_batch(all_logits=trainer.paths.makes_all_logits))
            what = f"evaluating with {rows} rows of {length} tokens, or as many tokens in more rows"
            hint = f"set training.eval_batch to {max(1, rows // 2)}"
        message = f"out of memory at step {trainer.state.global_step}, {what}; {hint}"
        raise OutOfMemoryError(Problem(message)) from error
