"""One process's hold on a run folder: taken at the start, true status until the end, let go however it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import date
from typing import TYPE_CHECKING

from accelerate.utils import broadcast_object_list

from hf_finetune import continuation, extending, invocation, runlock
from hf_finetune.errors import CheckpointError, FinetuneError, PushError
from hf_finetune.preemption import INTERRUPTED, PREEMPTED, Stopped
from hf_finetune.runfolder import RunFolder, Start, State, Status
from hf_finetune.runlock import surroundings
from hf_finetune.terminal import say

if TYPE_CHECKING:
    from hf_finetune.hardware import Machine
    from hf_finetune.peers import Failure
    from hf_finetune.preflight.heavy import Ready
    from hf_finetune.recipe import Recipe
    from hf_finetune.runlock.repeating import Repeat
    from hf_finetune.tuning.choices import Choices


@dataclass(frozen=True)
class Wishes:
    """What the command line asks of an earlier run in the folder."""

    restart: bool = False
    """Move it aside."""
    allow_change: tuple[str, ...] = ()
    """Keys that may differ from its recipe."""
    repeat: Repeat | None = None
    """The locked run that this one repeats."""


def claim(folder: RunFolder, recipe: Recipe, machine: Machine, wishes: Wishes) -> Start | FinetuneError:
    """Rank 0 takes the run folder; all ranks learn what there is to do, or why nothing can be done."""
    begin: list[Start | FinetuneError] = [Start("new")]
    if machine.is_main:
        try:
            continuation.refuse_unknown(wishes.allow_change)
            notes = [] if wishes.repeat is None else _refuse_drift(wishes.repeat, recipe, machine)
            start = folder.claim(recipe.dump(), restart=wishes.restart, allowed=wishes.allow_change)
            begin = [replace(start, notes=(*notes, *start.notes))]
        except FinetuneError as error:
            # Every rank must raise it: one that waits for a rank that is gone ends in a traceback.
            begin = [error]
        if isinstance(begin[0], Start) and begin[0].kind == "done":
            say(
                f"{folder.path} already holds this run, finished; see {folder.report}, or give --restart to run it anew"
            )
    broadcast_object_list(begin)
    return begin[0]


def _refuse_drift(repeat: Repeat, recipe: Recipe, machine: Machine) -> list[str]:
    """Compare a repeat with its lock; returns a sentence for each difference that is allowed.

    Raises:
        CheckpointError: Something else differs; it carries every difference.
    """
    drift = repeat.drift(recipe, machine)
    if drift.problems:
        raise CheckpointError(drift.problems)
    return drift.notes


def as_before(
    folder: RunFolder, recipe: Recipe, machine: Machine, start: Start, repeat: Repeat | None = None
) -> tuple[Machine, Choices | None]:
    """What was chosen when the run began, so that it goes on, or is repeated, with the very same arithmetic.

    Args:
        folder: Taken.
        recipe: What it names is not open.
        machine: As it was found now.
        start: Whether a run goes on.
        repeat: The locked run that is repeated.

    Returns:
        The machine with the precision and the attention of the run's beginning, and all that was chosen then; None for
        a new run, and where nothing can be read or the device is of another kind.
    """
    goes_on = start.kind in ("resume", "extend")
    kept = [_kept(folder, machine) if machine.is_main and goes_on else None]
    broadcast_object_list(kept)
    choices = kept[0] if repeat is None else repeat.choices()
    if choices is None or choices.device != machine.device:
        if machine.is_main and (repeat is not None or (goes_on and folder.has_checkpoints)):
            why = "is not there, or damaged" if choices is None else f"is of a {choices.device}"
            say(f"note: {folder.run_lock.name} {why}: what it kept is chosen anew, the next steps may differ in bits")
        return machine, None
    return choices.onto(machine, recipe), choices


def first_day(folder: RunFolder, machine: Machine, start: Start) -> str:
    """The day on which the run began, as YYYY-MM-DD, the same on all ranks.

    Its lock says it, else it is when its recipe was written; a new run begins today.
    """
    day = [date.today().isoformat()]
    if machine.is_main and start.kind in ("resume", "extend"):
        kept = runlock.day(folder.run_lock)
        with suppress(OSError):
            day = [kept or date.fromtimestamp(folder.recipe.stat().st_mtime).isoformat()]
    broadcast_object_list(day)
    return day[0]


def _kept(folder: RunFolder, machine: Machine) -> Choices | None:
    """What was chosen when the run began, but for what was chosen for a memory that is not this one."""
    choices = runlock.choices(folder.run_lock)
    if choices is None or (folder.has_checkpoints and surroundings.is_same_memory(folder.run_lock, machine)):
        return choices
    return choices.without("micro_batch", "activation_checkpointing")


def extend(folder: RunFolder, ready: Ready, status: Status) -> None:
    """Put a finished run aside and go on from its last state; all ranks learn why where that can't be done.

    Raises:
        FinetuneError: See `extending.begin`.
    """
    failed: list[FinetuneError | None] = [None]
    if ready.machine.is_main:
        try:
            extending.begin(folder, ready)
            status.start()
        except FinetuneError as error:
            failed = [error]
    broadcast_object_list(failed)
    if failed[0] is not None:
        raise failed[0]
    status.is_silent = False


@contextmanager
def status(folder: RunFolder, machine: Machine, start: Start) -> Iterator[Status]:
    """Keep status.json true from here to the end, however it ends; of a finished run, from where it is extended."""
    told = Status(folder.status, is_silent=start.kind == "extend")
    if not machine.is_main:
        yield told
        return
    if not told.is_silent:
        told.start()
    try:
        yield told
    except PushError as error:
        told.finish("done", error.exit_code, str(error))
        raise
    except FinetuneError as error:
        told.finish("failed", error.exit_code, str(error))
        raise
    except Stopped as stopped:
        told.finish(stopped.state, int(stopped.code or 0), stopped.reason)
        say(f"{stopped.reason} at step {told.step}; {_how_to_resume(folder, told)}")
        raise
    except BaseException as error:
        told.finish("failed", 1, f"{type(error).__name__}: {error}")
        raise
    else:
        told.finish("done", 0)
    finally:
        folder.release()


def peer_failed(status: Status, machine: Machine, failure: Failure) -> None:
    """Keep status.json true where another rank has failed and this process is about to end because of it.

    Rank 0 says it, whatever it ends with. Where rank 0 may be the one that is lost, so do rank 1 and the first rank of
    each node, unless somebody has: a node may take all of its ranks with it.

    Args:
        status: This rank's.
        machine: Tells which rank this is.
        failure: Which rank, why, and the exit code; of this very rank where nobody knows who is to blame.
    """
    may_be_first = failure.rank in (0, machine.rank) and (machine.rank == 1 or machine.is_node_main)
    if not machine.is_main and not (may_be_first and status.says_running()):
        return
    states: dict[int, State] = {PREEMPTED: "preempted", INTERRUPTED: "interrupted"}
    status.finish(states.get(failure.exit_code, "failed"), failure.exit_code, failure.reason)


def _how_to_resume(folder: RunFolder, status: Status) -> str:
    """What there is to resume from, and the command that does it."""
    command = invocation.resume_command()
    how = "run it again without restart" if command is None else f"run: {command}"
    if status.is_silent:
        return f"the finished run in {folder.path} was not touched; to extend it, {how}"
    if status.checkpoint is None:
        return f"no checkpoint was written yet; to start again at step 0, {how}"
    lost = status.step - int(status.checkpoint.rpartition("-")[2])
    unsaved = f" (the last {lost} steps are not in it)" if lost > 0 else ""
    return f"to resume from {folder.path / status.checkpoint}{unsaved}, {how}"
