"""`run.lock.json`: everything that a run was made from and on, so that it can be repeated or refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from hf_finetune.config import yamlfile
from hf_finetune.config.paths import outside
from hf_finetune.errors import Problem, RecipeError, StorageError
from hf_finetune.recipe import Recipe
from hf_finetune.run.folder import write_atomically

if TYPE_CHECKING:
    from hf_finetune.device import Machine  # which imports torch

VERSION = 2
"""Version 1 kept no recipe and no hashes of files: it serves a resume, and nothing else."""
MAX_BYTES = 64 << 20


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
        """Of a resolved recipe."""
        return cls(sha256=_sha256(text), text=text.splitlines())

    @property
    def whole(self) -> str:
        """The YAML in one piece."""
        return "".join(f"{line}\n" for line in self.text)


class Git(_Part):
    """The checkout that the command was given in."""

    commit: str
    dirty: bool | None = None
    """Tracked files differ from it; None where git did not answer in time."""


class Chosen(_Part):
    """One thing that was chosen; see `tuning.Choice`."""

    value: Any
    why: str


class Made(_Part):
    """All that was chosen; see `tuning.Choices`."""

    device: str
    made: dict[str, Chosen]


class Lock(_Part):
    """Everything."""

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
    """Of the GPU; shown, never compared."""
    git: Git | None = None
    choices: Made
    changed: list[str] = []
    """Differences from its beginning when the run was resumed: a repeat would do without them."""

    def write(self, file: Path) -> None:
        """Write the lock of a run, anew at each start.

        Raises:
            StorageError: It can't be written.
        """
        try:
            write_atomically(file, json.dumps(self.model_dump(), indent=1, ensure_ascii=False) + "\n", durable=True)
        except OSError as error:
            raise StorageError(Problem(f"{file} can't be written: {error.strerror}", key="output")) from error


def read(file: str) -> Lock:
    """Read the lock of a run that is to be repeated.

    Raises:
        RecipeError: The file is missing, is no lock, is damaged, or of another version.
    """
    content = _document(file)
    version = content.get("version")
    if not isinstance(version, int) or isinstance(version, bool) or "choices" not in content:
        raise _refused(file, "is not a run.lock.json of hf_finetune; give that of a run folder")
    if version < VERSION:
        how = "train the recipe.yaml beside it: that writes a new lock"
        raise _refused(file, f"is of version {version}, which keeps too little to repeat a run; {how}")
    if version > VERSION:
        how = "install the hf_finetune that wrote it"
        raise _refused(file, f"is of version {version}, and this hf_finetune reads version {VERSION}; {how}")
    try:
        lock = Lock.model_validate(content)
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
    """Read the choices that a run began with; None where its lock is missing or damaged."""
    try:
        lock: Any = json.loads(file.read_text(encoding="utf-8"))
        return Choices.read(lock["choices"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _document(file: str) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
        RecipeError: It holds none.
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
    if not isinstance(content, dict):
        raise _refused(file, "is not a run.lock.json of hf_finetune; give that of a run folder")
    return content


def _refused(file: str, message: str) -> RecipeError:
    return RecipeError(Problem(message, file=file))


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# A recipe with everything that its run fixed: the commits of revisions, the date that a chat template prints.


def pinned(recipe: Recipe, lock: Lock) -> Recipe:
    """Put commits in place of branches and tags, as they were when the run was locked, and its date.

    Args:
        recipe: That of the run, or one that differs from it: what the lock does not name stays as it is.
        lock: Of the run.
    """
    model = recipe.model
    if lock.model.commit and (model.name, model.revision) == (lock.model.source, lock.model.asked):
        model = model.model_copy(update={"revision": lock.model.commit})
    data: dict[str, Any] = {}
    commits = {(one.source, one.asked): one.commit for one in lock.data.values() if one.commit}
    data["revision"] = commits.get((recipe.data.source, recipe.data.revision), recipe.data.revision)
    if recipe.data.mix is not None:
        data["mix"] = [
            part.model_copy(update={"revision": commits.get((part.source, part.revision), part.revision)})
            for part in recipe.data.mix
        ]
    task, day = recipe.task, _date(lock)
    if day is not None and getattr(task, "date", day) is None:
        task = task.model_copy(update={"date": day})
    return recipe.model_copy(update={"model": model, "data": recipe.data.model_copy(update=data), "task": task})


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
    """Put the commits of the run that left a lock into a recipe; without a lock it stays as it is.

    Args:
        recipe: Of the run.
        file: Its `run.lock.json`.
    """
    lock = find(file)
    return recipe if lock is None else pinned(recipe, lock)


# The choices of a run, and why they were made.


@dataclass(frozen=True)
class Choice:
    """One choice."""

    value: Any
    why: str
    """`asked for`, `by rule ...`, `measured ...`; for people."""

    @property
    def is_measured(self) -> bool:
        """Something was timed for it, now or earlier."""
        return self.why.startswith("measured")


@dataclass(frozen=True)
class Choices:
    """All that this run's arithmetic depends on and a recipe leaves open."""

    device: str
    """Kind of device that they were made on."""
    made: Mapping[str, Choice] = field(default_factory=dict)
    """precision, micro_batch, activation_checkpointing, attention, compiled."""

    def value(self, name: str) -> Any:
        """The value of a choice; None where none was made."""
        choice = self.made.get(name)
        return None if choice is None else choice.value

    def describe(self) -> str:
        """One line for people."""
        shown = {
            name: {True: "yes", False: "no"}[made.value] if isinstance(made.value, bool) else made.value
            for name, made in self.made.items()
        }
        return ", ".join(f"{name.replace('_', ' ')} {shown[name]} ({made.why})" for name, made in self.made.items())

    def plus(self, name: str, choice: Choice) -> Choices:
        """With one more."""
        return replace(self, made={**self.made, name: choice})

    def without(self, *names: str) -> Choices:
        """Without some of them."""
        return replace(self, made={name: made for name, made in self.made.items() if name not in names})

    def onto(self, machine: Machine, recipe: Recipe) -> Machine:
        """The machine with this precision and attention, where the recipe leaves them open.

        Args:
            machine: Of this kind of device.
            recipe: May name them.
        """
        if recipe.training.precision == "auto":
            machine = replace(machine, precision=self.value("precision") or machine.precision)
        if recipe.model.attention == "auto":
            machine = replace(machine, attention=self.value("attention") or machine.attention)
        return machine

    def dump(self) -> dict[str, Any]:
        """As JSON keeps it."""
        return asdict(self)

    @classmethod
    def ruled(cls, recipe: Recipe, machine: Machine, before: Choices | None) -> Choices:
        """Before anything is measured: the precision.

        Args:
            recipe: May name it.
            machine: Has it.
            before: The choices of the run's beginning, if it is to go on.
        """
        asked, has = recipe.training.precision, machine.precision
        if before is not None and asked == "auto" and before.value("precision") == has:
            return cls(machine.device, {"precision": before.made["precision"]})
        reasons = {"bf16": "multiplies bf16 natively", "fp16": "has no bf16", "fp32": "has no units for bf16"}
        why = "asked for" if asked == has else f"by rule: this {machine.device} {reasons[has]}"
        return cls(machine.device, {"precision": Choice(has, why)})

    @classmethod
    def read(cls, kept: Mapping[str, Any]) -> Choices:
        """From what `dump` made.

        Raises:
            KeyError: Something is missing.
            TypeError: It is something else.
            AttributeError: It is something else.
        """
        return cls(str(kept["device"]), {name: Choice(**choice) for name, choice in kept["made"].items()})
