"""What differs between a lock and here and now: all of it, in groups, each with what to do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_finetune import continuation
from hf_finetune.errors import DataError, ModelError, Problem, RecipeError
from hf_finetune.plugins import key_of
from hf_finetune.recipe import Recipe
from hf_finetune.runlock import inputs, surroundings
from hf_finetune.runlock.lockfile import File, Git, Input, Lock, Made
from hf_finetune.schema.expectations import shown

if TYPE_CHECKING:
    from hf_finetune.hardware import Machine

ALLOWED = ("lock.packages", "lock.hardware", "lock.changed")
"""What `--allow-change` may name, also with the name of one thing in it: `lock.packages.numpy`."""
HINTS = {
    "lock.packages": "install what it was",
    "lock.hardware": "repeat it where it is the same",
    "lock.changed": "repeat a run that was not changed",
    "lock.hardware.ranks": "start as many processes",
    "lock.hardware.ranks_a_node": "start as many processes on each node",
}
FILES_TOLD = 20
"""Of one input, at most; the rest is counted."""


@dataclass
class Drift:
    """What differs."""

    problems: list[Problem] = field(default_factory=list)
    """What must not."""
    notes: list[str] = field(default_factory=list)
    """What may, because `--allow-change` says so, or because it decides nothing."""


def find(lock: Lock, recipe: Recipe, machine: Machine, allowed: Sequence[str]) -> Drift:
    """Compare everything that can be compared before data and model are loaded.

    Args:
        lock: What a run was made from and on.
        recipe: What is to be done now.
        machine: Where.
        allowed: Keys of `--allow-change`.
    """
    drift = Drift()
    for key, told in _changed_keys(lock.recipe.whole, recipe.dump()):
        how = "a repeat changes nothing; leave it as it was, or train without --locked"
        drift.problems.append(Problem(f"{told}: {how}", key=key))
    for text in lock.changed:
        said = f"the run was changed while it went on: {text}"
        _add(drift, "lock.changed", said, allowed)
    for key, was, now in _inputs(lock, recipe):
        drift.problems += [Problem(text, key=key) for text in _changed(was, now)]
    packages, hardware = surroundings.packages(recipe, machine), surroundings.decisive(machine)
    for key, text in (
        *_values("lock.packages", lock.packages, packages),
        *_values("lock.hardware", lock.hardware, hardware),
    ):
        _add(drift, key, text, allowed)
    here = surroundings.checkout() if lock.git is not None else None
    if lock.git is not None and here is not None and here != lock.git:
        drift.notes.append(f"the working directory was {_described(lock.git)}, is {_described(here)}")
    return drift


def _inputs(lock: Lock, recipe: Recipe) -> Iterator[tuple[str, Input | None, Input | None]]:
    """Recipe key, what was read, what would be read now; nothing for what is not there, which is an error elsewhere."""
    try:
        data = inputs.of_data(recipe)
    except (DataError, RecipeError):
        data = {}
    gone = {f"data.{name}" for name in ("train", "validation", "test") if getattr(recipe.data, name) is None}
    for key in sorted(data.keys() | (lock.data.keys() & gone)):
        yield key, lock.data.get(key), data.get(key)
    try:
        yield "model.name", lock.model, inputs.of_model(recipe)
        yield "adapter.from", lock.adapter, inputs.of_adapter(recipe)
    except (ModelError, RecipeError):
        return


def _changed(was: Input | None, now: Input | None) -> Iterator[str]:
    """A sentence for each way in which an input is another one."""
    if was is None and now is None:
        return
    if was is None or now is None or bool(was.source) != bool(now.source):
        yield f"was {_where(was)}, is {_where(now)}; put back what it was"
    elif was.source:
        for name in ("source", "subset", "split", "commit"):
            before, after = getattr(was, name), getattr(now, name)
            if before != after:
                yield f"{name} was {_plain(before)}, is {_plain(after)}; give the one that it was"
    else:
        told = list(_changed_files(was.files, now.files))
        yield from told[:FILES_TOLD]
        if len(told) > FILES_TOLD:
            yield f"{len(told) - FILES_TOLD} more files changed"


def _where(what: Input | None) -> str:
    if what is None:
        return "not given"
    if what.source:
        return f"{what.source} on the Hub"
    return f"{len(what.files)} local file{'' if len(what.files) == 1 else 's'}"


def _changed_files(was: Sequence[File], now: Sequence[File]) -> Iterator[str]:
    if [file.sha256 for file in was] == [file.sha256 for file in now]:
        return  # names don't count
    before, after = {file.name: file for file in was}, {file.name: file for file in now}
    told = False
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old is not None and new is not None and old.sha256 == new.sha256:
            continue
        told = True
        if new is None:
            yield f"the file {name} is gone ({old.size if old else 0:,} bytes); put it back"
        elif old is None:
            yield f"the file {name} is new ({new.size:,} bytes); take it away"
        else:
            sizes = f"{old.size:,} bytes then, {new.size:,} now"
            hashes = f"SHA-256 {old.sha256[:12]} then, {new.sha256[:12]} now"
            yield f"the file {name} changed ({sizes}, {hashes}); put it back"
    if not told:
        yield "its files are read in another order; give them in that of the lock"


def between(was: Lock, now: Lock) -> Iterator[tuple[str, str]]:
    """Key and sentence for all that differs between two starts of one run and may decide bits."""
    yield from _changed_keys(was.recipe.whole, now.recipe.whole)
    for key in sorted(was.data.keys() | now.data.keys()):
        yield from ((key, text) for text in _changed(was.data.get(key), now.data.get(key)))
    yield from _values("lock.packages", was.packages, now.packages)
    yield from _values("lock.hardware", was.hardware, now.hardware)
    yield from other_choices(was.choices, now.choices)


def _changed_keys(was: str, now: str) -> Iterator[tuple[str, str]]:
    for key, (old, new) in continuation.differences(was, now).items():
        if key_of(Recipe, key).lock == "value":
            yield key, f"was {_plain(old)}, is {_plain(new)}"


def other_choices(was: Made, now: Made) -> Iterator[tuple[str, str]]:
    """Key and sentence for all that came out otherwise; what an older version did not choose is no difference."""
    both = [name for name in was.made if name in now.made]
    before, after = ({name: made.made[name].value for name in both} for made in (was, now))
    yield from _values("lock.choices", before, after)


def _values(group: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in [*was, *(name for name in now if name not in was)]:
        before, after = was.get(name), now.get(name)
        if before != after:
            yield f"{group}.{name}", f"was {_plain(before)}, is {_plain(after)}"


def _add(drift: Drift, key: str, text: str, allowed: Sequence[str]) -> None:
    """Keep a difference that may be allowed, as a problem or as a note."""
    group = ".".join(key.split(".")[:2])
    if group in allowed or key in allowed:
        drift.notes.append(f"{key} {text}, as --allow-change says: bits may differ")
    else:
        how = HINTS.get(key) or HINTS[group]
        message = f"{text}: bits may differ; {how}, or give --allow-change {group}"
        drift.problems.append(Problem(message, key=key))


def _described(git: Git) -> str:
    return f"at commit {git.commit[:12]}{' with changes' if git.dirty else ''}"


def _plain(value: Any) -> str:
    return "not there" if value is None else shown(value, plain=True)
