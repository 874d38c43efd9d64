"""The run folder: its paths, who may write into it, and how a run begins there."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

from hf_finetune.config import yamlfile
from hf_finetune.config.problems import shown
from hf_finetune.config.section import key_of
from hf_finetune.errors import CheckpointError, FinetuneError, Problem, PushError, RecipeError, Stopped, StorageError
from hf_finetune.log import say
from hf_finetune.recipe import NUMBER, Recipe
from hf_finetune.run import invocation
from hf_finetune.run import lock as run_lock
from hf_finetune.run import status as run_status
from hf_finetune.run.files import TEMPORARY, discard, nearest_existing, sync_folder, write_atomically, writing
from hf_finetune.run.status import Status
from hf_finetune.run.store import MANIFEST, Manifest
from hf_finetune.tasks.base import State

# Folder in a run folder in which ranks watch each other, from before the run takes it.
RANKS = ".ranks"


Begins = Literal["new", "resume", "extend", "done"]
"""The way a run begins in its folder; `extend`: it holds results, and a changed recipe is to train on from the state
behind them."""


class RunFolder:
    """Paths inside `output`."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.status = self.path / "status.json"
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.observations = self.path / "observations"
        self.report = self.path / "report.md"
        self.page = self.path / "report.html"
        self.plots = self.path / "plots"
        self.tensorboard = self.path / "tensorboard"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"
        self.targets = self.path / "targets.json"
        self.run_lock = self.path / "run.lock.json"
        self.lock = self.path / ".lock"
        # `path` may be a link: what is renamed is the folder itself.
        self.real = Path(os.path.realpath(path))
        self.successor = self.real.with_name(f".{self.real.name}.extended")
        """Takes the folder's place when a run is extended; see `training.resume.extend`."""
        self._held: list[IO[str]] = []

    @property
    def has_checkpoints(self) -> bool:
        """Tell whether there is anything to resume from, whole or not."""
        return any(self.checkpoints.glob("checkpoint-*"))

    def previous(self) -> dict[str, Any] | None:
        """Return `status.json` of the run that this folder holds, or None for a new or empty folder.

        Raises:
            RecipeError: The folder holds something that is no run.
        """
        try:
            if not self.path.exists() or not any(self.path.iterdir()):
                return None
            if not self.status.exists() and self.recipe.exists():
                return {"state": "failed", "reason": "it was killed while it started"}
            if not self.status.exists():
                message = f"{self.path} holds files that are no run of hf_finetune; name another folder"
                raise RecipeError(Problem(message, key="output"))
        except NotADirectoryError:
            raise StorageError(Problem(f"{self.path} is a file; name a folder", key="output")) from None
        return run_status.read(self.status) or {"state": "failed", "reason": "its status.json is damaged"}

    def condition(self) -> tuple[str, str]:
        """Return the state of the run in this folder, and a reason or nothing.

        The state is that of `status.json`, except `lost` for one that says `running` and isn't (its process let go of
        the lock, or its heartbeat stopped), and `unknown` where nothing can be read.
        """
        status = run_status.read(self.status)
        if status.get("state") == "running" and (_holder(self.lock)[1] or not run_status.is_alive(status)):
            last = status.get("heartbeat")
            return "lost", f"it was killed, or its machine is gone; its last heartbeat was at {last}"
        return status.get("state", "unknown"), str(status.get("reason") or "")

    def holds(self, recipe_yaml: str, allowed: Sequence[str]) -> bool:
        """Tell if this folder holds a run of the recipe; arguments as of `inspect`."""
        try:
            self._changes(recipe_yaml, allowed)
        except FinetuneError:
            return False
        return True

    @property
    def is_free(self) -> bool:
        """Tell that a run that never trained is all there is, and that nobody uses it any more."""
        try:
            previous = self.previous()
        except FinetuneError:
            return False
        return previous is None or (self._never_trained(previous) and _user(self.lock, self.status) is None)

    def inspect(self, recipe_yaml: str, *, restart: bool, allowed: Sequence[str] = ()) -> tuple[Begins, list[str]]:
        """Find out how a run would begin here, without leaving a trace.

        Args:
            recipe_yaml: The resolved recipe; empty text where it has mistakes, and then its changes don't count.
            restart: An earlier run would be moved aside.
            allowed: Keys of the recipe that may differ from those of an earlier run.

        Returns:
            The way it would begin, and a sentence for each change that is allowed and was made.

        Raises:
            CheckpointError: The folder holds a run of a recipe that differs in more than `allowed`.
            RecipeError: The folder is in use, or holds something that is no run.
            StorageError: The folder can't be written.
        """
        # A run that was killed between the two renames of an extension: the second one is still to be done.
        status = self.successor / self.status.name
        if status.is_file() and not self.real.exists() and _user(self.successor / self.lock.name, status) is None:
            self.successor.rename(self.real)
            sync_folder(self.real.parent)
        previous = self.previous()
        if previous is not None and (who := _user(self.lock, self.status)) is not None:
            message = f"{self.path} belongs to a run that is going on{who}; stop it, or name another folder"
            raise RecipeError(Problem(message, key="output"))
        begins: Begins = "new"
        changes: list[str] = []
        if previous is not None and recipe_yaml and not restart and not self._never_trained(previous):
            changes = self._changes(recipe_yaml, allowed)
            begins = "resume"
            if changes and (previous["state"] == "done" or self.adapter.exists()):
                self.last_state(previous)
                begins = "extend"
            elif previous["state"] == "done":
                begins = "done"
        if begins != "done":
            refuse_unwritable(self.path, "output")
        return begins, changes

    def take(self, recipe_yaml: str, *, restart: bool, allowed: Sequence[str] = ()) -> tuple[Begins, list[str]]:
        """Take the folder for a run: lock it, and write the resolved recipe. Arguments and result as of `inspect`.

        Raises:
            RecipeError: See `inspect`; another run may also have been faster.
            StorageError: The folder can't be written.
        """
        begins, changes = self.inspect(recipe_yaml, restart=restart, allowed=allowed)
        try:
            previous = self.previous()
            if begins == "done":
                if not _is_whole(self.stored_recipe()):
                    write_atomically(self.recipe, recipe_yaml, durable=True)
                return begins, changes
            if previous is not None and begins == "new" and not self._never_trained(previous):
                self.real.rename(self.free_name())
                self.real.mkdir()
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.hold(self.path)
            for path in self.path.rglob(".*"):  # left by a run that was killed while it wrote
                if TEMPORARY.fullmatch(path.name) and path.parent.name != RANKS:
                    path.unlink(missing_ok=True)
            discard(self.successor)
            if begins != "extend":  # a finished run stays as it is until nothing can be wrong any more
                write_atomically(self.recipe, recipe_yaml, durable=True)
            sync_folder(self.real.parent)
        except RecipeError:
            raise
        except OSError as error:
            raise StorageError(Problem(f"{self.path} can't be written: {error.strerror}", key="output")) from error
        return begins, changes

    def stored_recipe(self) -> str:
        """Return the text of `recipe.yaml`; empty where it can't be read."""
        try:
            return self.recipe.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return ""

    def _changes(self, recipe_yaml: str, allowed: Sequence[str]) -> list[str]:
        """Return the changes since the run in this folder began that are allowed.

        Raises:
            CheckpointError: Something else changed, or nothing says what the run was.
        """
        stored = self.stored_recipe()
        if _is_whole(stored):
            return refuse_changes(stored, recipe_yaml, allowed)
        if (lock := run_lock.find(self.run_lock)) is not None:
            return refuse_changes(lock.recipe.whole, recipe_yaml, allowed)
        # The last proof: a checkpoint that was made from this very recipe.
        wanted = hashlib.sha256(recipe_yaml.encode()).hexdigest()
        for file in self.checkpoints.glob(f"checkpoint-*/{MANIFEST}"):
            with suppress(CheckpointError, OSError):
                if Manifest.parse(file.read_bytes()).facts.recipe == wanted:
                    return []
        message = (
            f"{self.recipe} of the earlier run is missing or damaged, and neither {self.run_lock.name} nor a "
            f"checkpoint shows that it was this recipe; bring the file back, or give --restart to start anew"
        )
        raise CheckpointError(Problem(message, key="output"))

    def last_state(self, previous: dict[str, Any]) -> Path:
        """Return the checkpoint behind the results in this folder.

        Args:
            previous: The result of `previous`.

        Raises:
            CheckpointError: It was not kept.
        """
        steps = [int(path.name.partition("-")[2]) for path in self.checkpoints.glob("checkpoint-[0-9]*")]
        step = previous.get("step") if previous["state"] == "done" else max(steps, default=None)
        last = self.checkpoints / f"checkpoint-{step}"
        if not (last / MANIFEST).is_file():
            message = (
                f"{self.path} holds the results of a run whose last state was not kept ({last.name} is not there), so "
                f"it can't be extended; give --restart to train anew (this run is moved aside), or name another folder"
            )
            raise CheckpointError(Problem(message, key="output"))
        return last

    def hold(self, place: Path) -> None:
        """Hold the folder until this process ends, however it ends.

        Args:
            place: Its present place: `path`, or `successor`, too, before that takes its place.

        Raises:
            RecipeError: Another run was faster.
        """
        stream = (place / self.lock.name).open("a+", encoding="utf-8")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            message = f"{self.path} was taken by another run at this moment; name another folder"
            raise RecipeError(Problem(message, key="output")) from None
        stream.truncate(0)
        stream.write(f"{os.getpid()} {socket.gethostname()}\n")
        stream.flush()
        self._held.append(stream)

    def release(self) -> None:
        """Let go of the folder."""
        while self._held:
            self._held.pop().close()

    @contextmanager
    def status_kept(self, status: Status) -> Iterator[None]:
        """Keep status.json true while the body runs, however it ends, and then let go of the folder."""
        if not status.is_silent:
            status.start()
        try:
            yield
        except PushError as error:
            status.finish("done", error.exit_code, str(error))
            raise
        except FinetuneError as error:
            status.finish("failed", error.exit_code, str(error))
            raise
        except Stopped as stopped:
            status.finish(stopped.state, int(stopped.code or 0), stopped.reason)
            say(f"{stopped.reason} at step {status.step}; {self._how_to_resume(status)}")
            raise
        except BaseException as error:
            status.finish("failed", 1, f"{type(error).__name__}: {error}")
            raise
        else:
            status.finish("done", 0)
        finally:
            self.release()

    def _how_to_resume(self, status: Status) -> str:
        """Name the checkpoint to resume from, and the command that does it."""
        command = invocation.resume_command()
        how = "run it again without restart" if command is None else f"run: {command}"
        if status.is_silent:
            return f"the finished run in {self.path} was not touched; to extend it, {how}"
        if status.checkpoint is None:
            return f"no checkpoint was written yet; to start again at step 0, {how}"
        lost = status.step - int(status.checkpoint.rpartition("-")[2])
        unsaved = f" (the last {lost} steps are not in it)" if lost > 0 else ""
        return f"to resume from {self.path / status.checkpoint}{unsaved}, {how}"

    def _never_trained(self, previous: dict[str, Any]) -> bool:
        """Tell whether an earlier run ended before its first step, most likely at a mistake that is corrected now."""
        unfinished = previous["state"] != "done" and not previous.get("step")
        return unfinished and not self.metrics.exists() and not any(self.checkpoints.glob("*"))

    def free_name(self) -> Path:
        """Return a name to move an old run to, so that `--restart` and an extension lose nothing."""
        number = 1
        while (target := self.real.with_name(f"{self.real.name}.old-{number}")).exists():
            number += 1
        return target


def numbered(recipe: Recipe, *, allowed: Sequence[str] = (), anew: bool = False) -> str:
    """Choose the number in the name of a run folder, without leaving a trace.

    It is that of the latest run of this very recipe, so that the same command resumes it or finds it finished; else
    the next free one, so that a recipe can be edited and run.

    Args:
        recipe: With `{n}` in `output`, or with a name that is given.
        allowed: Keys that may differ from those of the earlier run.
        anew: Begin a new run in any case.
    """
    parts = Path(recipe.output).parts
    place = next((index for index, part in enumerate(parts) if NUMBER in part), None)
    if place is None:
        return recipe.output
    pattern = re.compile(r"([0-9]{1,9})".join(map(re.escape, parts[place].split(NUMBER, 1))))
    parent, numbers = Path(*parts[:place]), list[int]()
    with suppress(OSError):  # there is no such folder yet
        numbers = sorted(
            (int(found[1]) for entry in parent.iterdir() if (found := pattern.fullmatch(entry.name))), reverse=True
        )
    trained = _training_numbers(recipe.dump())
    for number in () if anew else numbers:
        output = recipe.output.replace(NUMBER, str(number))
        folder = RunFolder(output)
        # Most of many runs differ in a number of `training`: it is told without parsing all of their recipes.
        before = _training_numbers(folder.stored_recipe())
        differing = (f"training.{key}" for key in trained.keys() & before.keys() if trained[key] != before[key])
        is_other = any(key_of(Recipe, key).resume != "free" and key not in allowed for key in differing)
        if not is_other and folder.holds(recipe.model_copy(update={"output": output}).dump(), allowed):
            return output
        if number == numbers[0] and folder.is_free:
            return output
    return recipe.output.replace(NUMBER, str(max(numbers, default=0) + 1))


def _training_numbers(recipe_yaml: str) -> dict[str, float]:
    """Read the numbers in the block `training` of a resolved recipe off its lines."""
    block = re.search(r"^training:\n((?:  .*\n)*)", recipe_yaml, re.MULTILINE)
    lines = re.findall(r"^  (\w+): ([-+.\de]+)$", block[1] if block else "", re.MULTILINE)
    found = {}
    for key, number in lines:
        with suppress(ValueError):
            found[key] = float(number)
    return found


def _user(lock: Path, status: Path) -> str | None:
    """Name the user of a run folder at this moment, for a message; None where there is none."""
    holder, is_free_here = _holder(lock)
    if holder is not None:
        return f" (process {holder})"
    # A lock that is free on the host that took it proves that its run ended. Locks of some shared file systems hold on
    # one host only: elsewhere the heartbeat decides. One that is young may be the last of a run that was killed a
    # moment ago, e.g. of a pod that this one replaces: a living run writes the next one while this one waits.
    seen = run_status.read(status)
    end = time.monotonic() + run_status.LOST_SECONDS
    while not is_free_here and run_status.is_alive(latest := run_status.read(status)) and time.monotonic() < end:
        if latest["heartbeat"] != seen.get("heartbeat"):
            return ""
        time.sleep(0.5)
    return None


def _holder(lock: Path) -> tuple[str | None, bool]:
    """Return the holder of a lock, if any, and whether it is free for sure: taken on this host, and let go."""
    host = ""
    try:
        with lock.open(encoding="utf-8") as stream:
            pid, _, host = stream.read().strip().partition(" ")
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return pid, False
    except OSError:
        return None, False  # no such file, or a file system without locks
    return None, host == socket.gethostname()


def refuse_unwritable(folder: Path, key: str) -> None:
    """Make and remove a folder where this one is or will be.

    Args:
        folder: Need not exist.
        key: Of the recipe, to blame.

    Raises:
        StorageError: That fails.
    """
    place = nearest_existing(folder)
    try:
        Path(tempfile.mkdtemp(prefix=".hf_finetune-", dir=place)).rmdir()
    except OSError as error:
        message = f"{folder} can't be written: {place}: {error.strerror}; name another folder"
        raise StorageError(Problem(message, key=key)) from error


# A recipe, compared with that of the run that it is to resume. `Key.resume` of a field says if its key may change.


def refuse_changes(before: str, now: str, allowed: Sequence[str]) -> list[str]:
    """Compare a recipe with that of the run that it is to resume.

    Args:
        before: `recipe.yaml` of the run folder.
        now: The resolved recipe, as YAML.
        allowed: Keys given by `--allow-change`.

    Returns:
        A sentence for each change that is allowed and was made.

    Raises:
        CheckpointError: Something else changed; it carries one problem a key.
    """
    problems, notes = [], []
    for key, (old, new) in run_lock.differences(before, now).items():
        may = key_of(Recipe, key).resume
        was, now_is = ("not set" if value is None else shown(value, plain=True) for value in (old, new))
        change = f"was {was}, is {now_is}"
        if may == "ask" and key in allowed:
            notes.append(f"{key} {change}, as --allow-change says: from here on this is another training")
        elif may != "free":
            can = f"give --allow-change {key} to resume with it, " if may == "ask" else ""
            message = f"{change} in the run that this folder holds; change it back, {can}or --restart to start anew"
            problems.append(Problem(message, key=key))
    if problems:
        raise CheckpointError(problems)
    return notes


def refuse_unknown(allowed: Iterable[str]) -> None:
    """Check the keys of `--allow-change`.

    Raises:
        CheckpointError: One may never change within a run.
    """
    wrong = [key for key in allowed if key_of(Recipe, key).resume == "never"]
    of_locks = [key for key in wrong if key.startswith("lock.")]
    message = "may not change within a run; start anew with --restart, or in another output folder"
    if of_locks:
        message = "is about a lock; give --locked RUN/run.lock.json too"
    if wrong:
        raise CheckpointError(Problem(message, key=key) for key in of_locks or wrong)


def _is_whole(text: str) -> bool:
    """Tell a whole `recipe.yaml` from the remains of one after a power failure: nothing, zeros, or a part."""
    try:
        return text.endswith("\n") and isinstance(yamlfile.parse(text, "recipe.yaml").value, dict)
    except RecipeError:
        return False


# `targets.json`: the labels in the training data, and the place where the run was started. With it a finished run is
# used without its training data: `adapter/` names the labels, this also has the values that stand for them in the data.

VERSION = 1


def write_targets(file: Path, targets: State) -> None:
    """Write `targets.json`, whole or not at all.

    Raises:
        StorageError: The disk does not take it.
    """
    stored = {"version": VERSION, "targets": targets.to_json(), "started_in": str(Path.cwd())}
    with writing(file):
        write_atomically(file, json.dumps(stored, indent=1, ensure_ascii=False) + "\n", durable=True)


def read_targets(file: Path) -> tuple[State, Path] | None:
    """Read `targets.json`; None where there is none.

    Returns:
        The targets, and the working directory of the run, to which relative paths of its recipe belong.

    Raises:
        CheckpointError: The file is damaged, or of a later version.
    """
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["version"] != VERSION:
            message = f"is of version {stored['version']}, this program knows {VERSION}; use the one that wrote it"
            raise CheckpointError(Problem(message, file=str(file)))
        return State.from_json(stored["targets"]), Path(stored["started_in"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"is damaged ({type(error).__name__}); the training command with --restart makes the run anew"
        raise CheckpointError(Problem(message, file=str(file))) from error
