"""`run.lock.json`: everything that a run was made from and on, and how a second start compares with it.

It serves a resume, a repeat (`--locked LOCK`), and all that use the finished run. `training/locking.py` fills it in.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from hf_finetune import recipe as recipe_module
from hf_finetune.config import yamlfile
from hf_finetune.config.paths import outside
from hf_finetune.config.problems import shown
from hf_finetune.config.reading import Reading
from hf_finetune.config.section import key_of
from hf_finetune.config.yamlfile import OVERRIDE
from hf_finetune.errors import CheckpointError, Problem, RecipeError
from hf_finetune.recipe import Look, Recipe
from hf_finetune.run.files import write_atomically, writing

if TYPE_CHECKING:
    from hf_finetune.device import Machine  # it loads torch, and a lock is also read where nothing is trained

# Version 1 kept no recipe and no hashes of files: it serves a resume, and nothing else.
VERSION = 2
MAX_BYTES = 64 << 20
# Changed files of one input that are named; the rest is counted.
FILES_LISTED = 20
# Beginning of the keys of `--allow-change` that are about a lock.
KEYS = "lock."
# Added to the name of the locked run's folder, where a repeat is given no other.
SUFFIX = "-repeat"


@dataclass(frozen=True)
class Choice:
    """A setting that the recipe left open, and the reason for its value."""

    value: Any
    why: str
    """`asked for`, `by rule ...`, `measured ...`; for people."""

    @property
    def is_measured(self) -> bool:
        """Tell whether something was timed for it, now or earlier."""
        return self.why.startswith("measured")


@dataclass(frozen=True)
class Choices:
    """The settings that decide bits, that the recipe left open, and that were chosen for this machine."""

    device: str
    """Kind of device that they were made on."""
    made: Mapping[str, Choice] = field(default_factory=dict)
    """precision, micro_batch, activation_checkpointing, attention, compiled, fast_paths."""

    def value(self, name: str) -> Any:
        """Return the value of a choice; None where none was made."""
        choice = self.made.get(name)
        return None if choice is None else choice.value

    def describe(self) -> str:
        """Write them in one line, for people."""
        plain = {True: "yes", False: "no"}
        values = {
            name: plain[one.value] if isinstance(one.value, bool) else one.value for name, one in self.made.items()
        }
        return ", ".join(f"{name.replace('_', ' ')} {values[name]} ({made.why})" for name, made in self.made.items())

    def plus(self, name: str, choice: Choice) -> Choices:
        """Add one."""
        return replace(self, made={**self.made, name: choice})

    def without(self, *names: str) -> Choices:
        """Leave some out."""
        return replace(self, made={name: made for name, made in self.made.items() if name not in names})

    def onto(self, machine: Machine, recipe: Recipe) -> Machine:
        """Give a machine the precision and attention that were chosen, where the recipe leaves them open.

        Args:
            machine: Of this kind of device.
            recipe: May name them.
        """
        if recipe.training.precision == "auto":
            machine = replace(machine, precision=self.value("precision") or machine.precision)
        if recipe.model.attention == "auto":
            machine = replace(machine, attention=self.value("attention") or machine.attention)
        return machine

    @classmethod
    def ruled(cls, recipe: Recipe, machine: Machine, before: Choices | None) -> Choices:
        """Make the first choice, before anything is measured: the precision.

        Args:
            recipe: May name it.
            machine: Has it.
            before: The choices of the run's beginning, if it is resumed or repeated.
        """
        asked, has = recipe.training.precision, machine.precision
        if before is not None and asked == "auto" and before.value("precision") == has:
            return cls(machine.device, {"precision": before.made["precision"]})
        reasons = {"bf16": "multiplies bf16 natively", "fp16": "has no bf16", "fp32": "has no units for bf16"}
        why = "asked for" if asked == has else f"by rule: this {machine.device} {reasons[has]}"
        return cls(machine.device, {"precision": Choice(has, why)})


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class File(_Part):
    """A file that was read."""

    name: str
    """Without the folder that all files of its kind lie in, so that they may move."""
    size: int
    """Bytes."""
    sha256: str
    """In hex: of the whole content; of a streamed data file, of its size and the mebibytes at both ends."""


class Input(_Part):
    """The origin of something that a run reads: a repository on the Hub, or local files."""

    source: str | None = None
    """`owner/name` on the Hub; None for local files."""
    subset: str | None = None
    split: str | None = None
    asked: str | None = None
    """The revision that the recipe names."""
    commit: str | None = None
    """The commit that it meant."""
    files: list[File] = []


class RecipeText(_Part):
    """The recipe, resolved."""

    sha256: str
    """Of the text, as UTF-8."""
    text: list[str]
    """Its lines: YAML with every default."""

    @classmethod
    def of(cls, text: str) -> RecipeText:
        """Keep a resolved recipe, as YAML."""
        return cls(sha256=_sha256(text), text=text.splitlines())

    @property
    def whole(self) -> str:
        """Return the YAML in one piece."""
        return "".join(f"{line}\n" for line in self.text)


class Git(_Part):
    """The checkout that the command was given in."""

    commit: str
    dirty: bool | None = None
    """Tracked files differ from it; None where git did not answer in time."""


class Lock(_Part):
    """The content of `run.lock.json`."""

    version: int = VERSION
    recipe: RecipeText
    seed: int
    """Rank r draws from seed + r."""
    model: Input
    adapter: Input | None = None
    """The adapter that `adapter.from` continues."""
    fingerprint: str
    """SHA-256, in hex, over everything that determines the encoded rows: contents, tokenizer, task and settings."""
    data: dict[str, Input]
    """By the recipe key that names it, e.g. `data.train`."""
    packages: dict[str, str]
    """Versions by name; also Python's and CUDA's."""
    hardware: dict[str, str | int | bool | None]
    """Properties of the machine that decide bits."""
    driver: str | None = None
    """Of the GPU; for the record, never compared."""
    git: Git | None = None
    choices: Choices
    changed: list[str] = []
    """Differences from its beginning when the run was resumed: a repeat would do without them."""

    def write(self, file: Path) -> None:
        """Write the lock of a run, anew at each start.

        Raises:
            StorageError: It can't be written.
        """
        with writing(file):
            write_atomically(file, json.dumps(self.model_dump(), indent=1, ensure_ascii=False) + "\n", durable=True)


def read(file: str) -> Lock:
    """Read the lock of a run that is to be repeated.

    Raises:
        RecipeError: The file is missing, is no lock, is damaged, or of another version.
    """
    if (refusal := outside(file)) is not None:
        raise _refused(file, refusal)
    try:
        with Path(file).open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
        content = json.loads(raw) if len(raw) <= MAX_BYTES else None
    except FileNotFoundError:
        raise _refused(file, "no such file; give the run.lock.json of a run") from None
    except IsADirectoryError:
        raise _refused(file, "is a folder; give the run.lock.json inside it") from None
    except (ValueError, RecursionError):
        raise _refused(file, "is not JSON: damaged, or not a run.lock.json; take a copy that is whole") from None
    except OSError as error:
        raise _refused(file, f"can't be read ({error.strerror}); give the run.lock.json of a run") from None
    version = content.get("version") if isinstance(content, dict) and "choices" in content else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise _refused(file, "is not a run.lock.json of hf_finetune; give that of a run folder")
    if version < VERSION:
        how = "train the recipe.yaml beside it: that writes a new lock"
        raise _refused(file, f"is of version {version}, which keeps too little to repeat a run; {how}")
    if version > VERSION:
        how = "install the hf_finetune that wrote it"
        raise _refused(file, f"is of version {version}, and this hf_finetune reads version {VERSION}; {how}")
    try:
        lock = Lock.model_validate_json(json.dumps(content))  # strict, and yet dataclasses from dicts
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _refused(file, f"is damaged: {where}: {first['msg'].lower()}; take a copy that is whole") from None
    if _sha256(lock.recipe.whole) != lock.recipe.sha256:
        how = "a lock is not edited: take a copy that is whole, and give changes to a run without --locked"
        raise _refused(file, f"is damaged or was edited: its recipe has another hash than it says; {how}")
    return lock


def find(file: Path) -> Lock | None:
    """Read the lock of a run that is resumed or used; None where there is none that can be read.

    Args:
        file: `run.lock.json` of its folder.
    """
    try:
        return read(str(file))
    except RecipeError:
        return None


def choices(file: Path) -> Choices | None:
    """Return the choices of a run's beginning; None where its lock is missing or damaged. Reads every version."""
    try:
        return TypeAdapter(Choices).validate_python(json.loads(file.read_text(encoding="utf-8"))["choices"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _refused(file: str, message: str) -> RecipeError:
    return RecipeError(Problem(message, file=file))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# A recipe leaves some things open, and its run has fixed them: the commits of revisions, the date that a chat prints.


def pinned(recipe: Recipe, lock: Lock) -> Recipe:
    """Put commits in place of branches and tags, as they were when the run was locked, and its date.

    Args:
        recipe: That of the run, or one that differs from it: what the lock does not name stays as it is.
        lock: Of the run.
    """
    model = recipe.model
    if lock.model.commit and (model.name, model.revision) == (lock.model.source, lock.model.asked):
        model = model.model_copy(update={"revision": lock.model.commit})
    adapter, locked = recipe.adapter, lock.adapter
    named = (getattr(adapter, "continue_from", None), getattr(adapter, "revision", None))
    if locked is not None and locked.commit and named == (locked.source, locked.asked):
        adapter = adapter.model_copy(update={"revision": locked.commit})
    data: dict[str, Any] = {}
    commits = {(one.source, one.asked): one.commit for one in lock.data.values() if one.commit}
    data["revision"] = commits.get((recipe.data.source, recipe.data.revision), recipe.data.revision)
    if recipe.data.mix is not None:
        data["mix"] = [
            part.model_copy(update={"revision": commits.get((part.source, part.revision), part.revision)})
            for part in recipe.data.mix
        ]
    task, day = recipe.task, _date(lock)
    if day is not None:
        task = task.on(day, None)
    found = {"model": model, "adapter": adapter, "data": recipe.data.model_copy(update=data), "task": task}
    return recipe.model_copy(update=found)


def day(file: Path) -> str | None:
    """Return the date that the chat template of a run prints, as YYYY-MM-DD; None where none is kept.

    Args:
        file: Its `run.lock.json`.
    """
    lock = find(file)
    return None if lock is None else _date(lock)


def _date(lock: Lock) -> str | None:
    found: Any = yamlfile.parse(lock.recipe.whole, "run.lock.json").value
    date = found["task"].get("date")
    return None if date is None else str(date)


def as_trained(recipe: Recipe, file: Path) -> Recipe:
    """Give a recipe the commits of the run that left a lock; it stays as it is where none can be read.

    Args:
        recipe: Of the run.
        file: Its `run.lock.json`.
    """
    lock = find(file)
    return recipe if lock is None else pinned(recipe, lock)


# What differs between two locks, as sentences. A recipe is compared key by key, as `Key.lock` of its field says.


def differences(before: str, now: str) -> dict[str, tuple[Any, Any]]:
    """Find the dotted keys that two resolved recipes, as YAML, have different values for: the old one, the new one."""

    def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, inner in value.items():
            nested = isinstance(inner, dict) and inner
            found |= flat(inner, f"{prefix}{key}.") if nested else {f"{prefix}{key}": inner}
        return found

    def resolved(text: str) -> dict[str, Any]:
        tree = yamlfile.parse(text, "recipe.yaml").value or {}
        try:
            # A file of an earlier version has no defaults of keys that are younger.
            return Recipe.model_validate(tree, by_alias=True, by_name=False).model_dump(mode="json")
        except ValidationError:
            return dict(tree)

    old, new = flat(resolved(before)), flat(resolved(now))
    return {
        key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }


def between(was: Lock, now: Lock) -> Iterator[tuple[str, str]]:
    """Give key and sentence of every difference between two starts of one run that may decide bits."""
    yield from changed_keys(was.recipe.whole, now.recipe.whole)
    for key in sorted(was.data.keys() | now.data.keys()):
        yield from ((key, text) for text in changed_input(was.data.get(key), now.data.get(key)))
    yield from changed_values("lock.packages", was.packages, now.packages)
    yield from changed_values("lock.hardware", was.hardware, now.hardware)
    yield from changed_choices(was.choices, now.choices)


def changed_keys(was: str, now: str) -> Iterator[tuple[str, str]]:
    """Compare two resolved recipes, as YAML, without the keys that a repeat may change."""
    for key, (old, new) in differences(was, now).items():
        if key_of(Recipe, key).lock == "value":
            yield key, _change(old, new)


def changed_choices(was: Choices, now: Choices) -> Iterator[tuple[str, str]]:
    """Compare choices; one that an older version did not make is no difference."""
    both = [name for name in was.made if name in now.made]
    yield from changed_values("lock.choices", *({name: side.made[name].value for name in both} for side in (was, now)))


def changed_values(group: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Compare values by name; keys are `GROUP.NAME`."""
    for name in dict.fromkeys([*was, *now]):
        if was.get(name) != now.get(name):
            yield f"{group}.{name}", _change(was.get(name), now.get(name))


def changed_input(was: Input | None, now: Input | None) -> Iterator[str]:
    """Compare two inputs; None is one that the recipe does not name."""

    def where(what: Input | None) -> str:
        if what is None:
            return "not given"
        many = "" if len(what.files) == 1 else "s"
        return f"{what.source} on the Hub" if what.source else f"{len(what.files)} local file{many}"

    if was is None and now is None:
        return
    if was is None or now is None or bool(was.source) != bool(now.source):
        yield f"was {where(was)}, is {where(now)}; put back what it was"
    elif was.source:
        for name in ("source", "subset", "split", "commit"):
            before, after = getattr(was, name), getattr(now, name)
            if before != after:
                yield f"{name} {_change(before, after)}; give the one that it was"
    else:
        found = list(_changed_files(was.files, now.files))
        yield from found[:FILES_LISTED]
        if len(found) > FILES_LISTED:
            yield f"{len(found) - FILES_LISTED} more files changed"


def _changed_files(was: Sequence[File], now: Sequence[File]) -> Iterator[str]:
    if [file.sha256 for file in was] == [file.sha256 for file in now]:
        return  # files may be renamed and moved
    before, after = {file.name: file for file in was}, {file.name: file for file in now}
    is_named = False
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is not None and new is not None and old.sha256 == new.sha256:
            continue
        is_named = True
        if new is None:
            yield f"the file {name} is gone ({old.size if old else 0:,} bytes); put it back"
        elif old is None:
            yield f"the file {name} is new ({new.size:,} bytes); take it away"
        else:
            sizes = f"{old.size:,} bytes then, {new.size:,} now"
            hashes = f"SHA-256 {old.sha256[:12]} then, {new.sha256[:12]} now"
            yield f"the file {name} changed ({sizes}, {hashes}); put it back"
    if not is_named:
        yield "its files are read in another order; give them in that of the lock"


def _change(was: Any, now: Any) -> str:
    before, after = ("not there" if value is None else shown(value, plain=True) for value in (was, now))
    return f"was {before}, is {after}"


# `--locked LOCK`: a run that is done once more, bit for bit.


@dataclass(frozen=True)
class Repeat:
    """A locked run that is to be done once more; `training.locking.refuse_drift` compares it with its lock."""

    file: str
    """The lock."""
    lock: Lock
    allowed: tuple[str, ...] = ()
    """Keys of `--allow-change` that begin with `lock.`."""

    def as_locked(self, machine: Machine, recipe: Recipe) -> Machine:
        """Set up the machine as the locked run had it, where that decides bits and the recipe leaves it open.

        That is the number of threads, where it has the cores, and the precision and attention that were chosen.
        """
        import torch

        if self.lock.choices.device == machine.device:
            machine = self.lock.choices.onto(machine, recipe)
        threads = self.lock.hardware.get("threads")
        if isinstance(threads, int) and 0 < threads < machine.threads and machine.device == "cpu":
            torch.set_num_threads(threads)
            return replace(machine, threads=threads)
        return machine

    def refuse_other(self, choices: Choices) -> None:
        """Compare the choices of this repeat with those of the locked run.

        Raises:
            CheckpointError: They differ, because the machine can't do what was chosen.
        """
        if any(key.startswith(("lock.hardware", "lock.packages")) for key in self.allowed):
            return
        how = "bits would differ; repeat it where it is the same, or give --allow-change lock.hardware"
        found = changed_choices(self.lock.choices, choices)
        problems = [Problem(f"{text}: {how}", key=key, file=self.file) for key, text in found]
        if problems:
            raise CheckpointError(problems)

    def notes_on_rows(self, fingerprint: str) -> list[str]:
        """Compare the prepared rows with those of the locked run.

        Args:
            fingerprint: Of the data that were prepared.

        Returns:
            A note where they differ because other packages are allowed.

        Raises:
            CheckpointError: They differ, though nothing else did.
        """
        if fingerprint == self.lock.fingerprint:
            return []
        if any(key.startswith("lock.packages") for key in self.allowed):
            return ["the rows may not be those of the lock: other packages read, describe or tokenise them"]
        message = "the rows are not those of the lock, though all files are: tokenizer or task say something else"
        raise CheckpointError(Problem(f"{message}; train without --locked", key="data", file=self.file))


def read_repeat(
    file: str, path: str | None, overrides: Sequence[str], look: Look = recipe_module.unseen
) -> tuple[Lock, Reading[Recipe]]:
    """Read a lock, and the recipe of the repeat: that of the lock, with every revision as the commit that it meant.

    Args:
        file: The lock.
        path: A recipe that must resolve to that of the lock; None takes the lock's own.
        overrides: Each `key.path=value`.
        look: See `recipe.fill`.

    Raises:
        RecipeError: The lock can't be used, or the repeat would write into the locked run.
    """
    lock = read(file)
    text = lock.recipe.whole
    reading = recipe_module.read(path, overrides, look) if path else recipe_module.read_text(text, file, overrides)
    if reading.recipe is None:
        return lock, reading
    recipe = pinned(reading.recipe, lock)
    first, output = str(yamlfile.parse(lock.recipe.whole, file).value["output"]), recipe.output
    is_given = any(override.partition("=")[0] == "output" for override in overrides)
    # A number would be that of the locked run, whose recipe is the same.
    if recipe_module.NUMBER in output or (output == first and not is_given):
        output = f"{first.rstrip('/')}{SUFFIX}"
    taken = [Path(file).parent, *([Path(first)] if Path(first).exists() else [])]
    if any(Path(output).resolve() == folder.resolve() for folder in taken):
        message = f"{output} holds the locked run, which a repeat leaves alone; give output=ANOTHER_FOLDER"
        raise RecipeError(Problem(message, key="output", file=OVERRIDE if is_given else file))
    changes: dict[str, Any] = {"output": output}
    if not any(override.startswith(("hub=", "hub.")) for override in overrides):
        changes["hub"] = None  # the locked run's repository holds the locked run
    recipe = recipe.model_copy(update=changes)
    return lock, replace(reading, recipe=recipe, partial=recipe)
