"""Check a recipe: everything that can be known before weights load, in one report.

Importing this takes a moment: `check` imports torch only where nothing is wrong that the recipe alone tells.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hf_finetune import log
from hf_finetune import recipe as recipe_module
from hf_finetune.adapters._continued import refuse_absent
from hf_finetune.config import paths
from hf_finetune.config.reading import Reading
from hf_finetune.config.yamlfile import Origin
from hf_finetune.data import readers
from hf_finetune.errors import DataError, Findings, Problem, RecipeError
from hf_finetune.pipeline import defaults
from hf_finetune.recipe import Recipe
from hf_finetune.run import folder as run_folder
from hf_finetune.run import lock as run_lock
from hf_finetune.run.folder import RunFolder
from hf_finetune.run.lock import Repeat
from hf_finetune.tracking import logdir, others

if TYPE_CHECKING:
    from hf_finetune.pipeline.examine import Parts

Source = Recipe | Reading[Recipe] | str | os.PathLike[str] | Mapping[str, Any]
"""A recipe, or where it comes from: a YAML file, or a dict of its blocks."""

ABOVE, BELOW = 20, 100
"""So many times the largest published rate counts as too high, and so small a part of the smallest as too low: far
outside of what can be a matter of model and data. The two numbers are ours, the rates are the adapters'."""
LIKE_ADAM = ("adamw", "adamw_8bit", "adafactor")
"""Optimisers whose steps have the size of the learning rate, whatever that of the gradient."""


@dataclass
class CheckResult:
    """Everything that a check found."""

    recipe: Recipe | None
    """As resolved, with every default; None where it has mistakes."""
    findings: Findings
    notes: list[str]
    plan: dict[str, str] = field(default_factory=dict)
    """The run in sentences by name: rows, steps, memory, disk; empty where there are errors."""
    numbers: dict[str, Any] = field(default_factory=dict)
    """The same for machines; the unit ends each name."""
    parts: Parts | None = None
    """Tokenizer, data and model outline, as far as they could be made; None where the recipe itself is wrong."""

    @property
    def ok(self) -> bool:
        """Tell whether the recipe can run."""
        return not self.findings.exit_code

    @property
    def problems(self) -> list[Problem]:
        """The errors: each with `message`, `key`, `file` and `line`."""
        return self.findings.errors

    @property
    def warnings(self) -> list[Problem]:
        """Findings that stop nothing."""
        return self.findings.warnings

    @property
    def exit_code(self) -> int:
        """The exit code of `hf-finetune check`: 0, or that of the gravest kind of error (2, 3, 4, 5 or 9)."""
        return self.findings.exit_code

    @property
    def verdict(self) -> str:
        """The last line of the report."""
        counts = ((len(self.problems), "error"), (len(self.warnings), "warning"))
        counted = ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts)
        if not self.ok and self.recipe is None:
            return f"{counted}; rows and model are looked at once the recipe is right"
        if not self.ok:
            made = (None, None) if self.parts is None else (self.parts.prepared, self.parts.outline)
            parts = [name for name, part in zip(("rows", "layers of the model"), made, strict=True) if part is None]
            return f"{counted}; {' and '.join(parts)} are looked at once that is corrected" if parts else counted
        looked = None if self.parts is None else self.parts.looked
        later = ""
        if looked is not None and not looked.whole:
            later = f"; training rows after the first {looked.report.rows:,} are checked as they are read"
        return f"{counted}: this recipe can run{later}"

    def raise_errors(self) -> None:
        """Raise all errors at once, as `train` would.

        Raises:
            FinetuneError: There is an error; `problems` has all of them.
        """
        self.findings.raise_errors()

    def as_json(self) -> dict[str, Any]:
        """Give all of it as plain values."""
        return {
            "exit_code": self.exit_code,
            "findings": [finding.as_json() for finding in self.findings],
            "notes": self.notes,
            "plan": self.plan,
            "numbers": self.numbers,
        }

    def __str__(self) -> str:
        found = [f"{finding.level}: {finding.problem}" for finding in self.findings]
        return "\n".join([*found, *(f"{name}: {text}" for name, text in self.plan.items()), self.verdict])

    __repr__ = __str__


def check(
    recipe: Source,
    overrides: Sequence[str] = (),
    *,
    restart: bool = False,
    allow_change: Sequence[str] = (),
    locked: str | os.PathLike[str] | Repeat | None = None,
) -> CheckResult:
    """Find everything that can be known to be wrong before weights load; nothing is trained or written.

    >>> result = check("recipes/quickstart.yaml", ["training.epochs=1"])
    >>> result.ok, result.problems
    (True, [])
    >>> print(result.plan["steps"])
    25 steps of 32 rows: 1 rank x 1 micro-batch of up to 32

    Args:
        recipe: A recipe, a YAML file, or a dict of its blocks.
        overrides: Each `key.path=value`, the value in YAML.
        restart: An earlier run in the folder would be moved aside.
        allow_change: Keys that may differ from those of an earlier run.
        locked: The `run.lock.json` of a run that this one is to repeat bit for bit.

    Returns:
        All that was found. What is wrong with a recipe, its data or its model raises nothing here.

    Raises:
        RecipeError: The lock can't be used.
    """
    reading, repeat = read(recipe, overrides, locked, allow_change, anew=restart)
    findings = look(reading, restart=restart, allowed=allow_change)
    result = CheckResult(reading.recipe, findings, list(reading.notes))
    # Mistakes of the recipe are answered at once: the libraries take seconds to import. A file that is missing must not
    # hide what only they can tell: the rows of the other files, the layers of the model, all that differs from a lock.
    # Without a model they can tell nothing.
    if reading.recipe is not None and (repeat is not None or not findings.blame("model")):
        with log.phase("loading libraries"):
            from hf_finetune import device
            from hf_finetune.pipeline.examine import examine, fit_alone
            from hf_finetune.pipeline.plan import plan
            from hf_finetune.training import locking

        with log.quietly():
            # As one process on this machine: `check` joins no ranks.
            machine = device.alone(reading.recipe)
            if repeat is not None:
                machine = repeat.as_locked(machine, reading.recipe)
                with findings.collect():
                    result.notes += locking.refuse_drift(repeat, reading.recipe, machine)
            parts = result.parts = examine(reading.recipe, machine, findings)
            if repeat is not None and parts.prepared is not None and not findings.exit_code:
                with findings.collect():
                    result.notes += repeat.notes_on_rows(parts.prepared.fingerprint)
            if parts.job is not None and parts.outline is not None and not findings.exit_code:
                with findings.collect():
                    job, chosen = fit_alone(parts.job, parts.outline)
                    result.plan, result.numbers = plan(job, parts.looked, chosen, findings)
    result.findings = findings.located(reading.locate)
    return result


def read(
    recipe: Source,
    overrides: Sequence[str] = (),
    locked: str | os.PathLike[str] | Repeat | None = None,
    allow_change: Sequence[str] = (),
    *,
    anew: bool = False,
) -> tuple[Reading[Recipe], Repeat | None]:
    """Read a recipe from whatever it is given as, and choose the number of its run folder where it leaves that open.

    Its mistakes are in the reading, and raise nothing.

    Args:
        recipe: See `check`.
        overrides: Each `key.path=value`.
        locked: See `check`; the recipe must resolve to that of the lock.
        allow_change: Keys that may differ from those of an earlier run; those that begin with `lock.` are for the
            repeat.
        anew: No earlier run is resumed: the run folder gets a number of its own.

    Raises:
        RecipeError: The lock can't be used, or the repeat would write into the locked run.
    """
    reading, repeat = _read(recipe, overrides, locked, allow_change, defaults.look)
    if log.rank():
        return reading, repeat  # the first rank chooses for all
    reading = _settled(reading, allow_change, anew=anew)
    if reading.filled and repeat is None and not anew and not isinstance(recipe, Reading):
        # A run may have begun with defaults that looked at no data: before they did, or because there were none here.
        plain = _settled(_read(recipe, overrides, None, (), recipe_module.unseen)[0], allow_change, anew=False)
        if plain.recipe is not None and plain.recipe != reading.recipe and _holds(plain.recipe, allow_change):
            reading = reading if reading.recipe is not None and _holds(reading.recipe, allow_change) else plain
    return reading, repeat


def _holds(recipe: Recipe, allowed: Sequence[str]) -> bool:
    return RunFolder(recipe.output).holds(recipe.dump(), allowed)


def _settled(reading: Reading[Recipe], allowed: Sequence[str], *, anew: bool) -> Reading[Recipe]:
    """Choose the number of the run folder."""
    if reading.recipe is None or paths.outside(reading.recipe.output) is not None:
        return reading
    output = run_folder.numbered(reading.recipe, allowed=allowed, anew=anew)
    settled = reading.recipe.model_copy(update={"output": output})
    return replace(reading, recipe=settled, partial=settled)


def _read(
    recipe: Source,
    overrides: Sequence[str],
    locked: str | os.PathLike[str] | Repeat | None,
    allow_change: Sequence[str],
    look: recipe_module.Look,
) -> tuple[Reading[Recipe], Repeat | None]:
    # A lock brings its recipe along; one that is given besides must resolve to the same.
    if isinstance(locked, str | os.PathLike):
        path = os.fspath(recipe) if isinstance(recipe, str | os.PathLike) else ""
        lock, reading = run_lock.read_repeat(os.fspath(locked), path or None, overrides, look)
        allowed = tuple(key for key in allow_change if key.startswith(run_lock.KEYS))
        return reading, Repeat(os.fspath(locked), lock, allowed)
    if isinstance(recipe, Reading):
        return recipe, locked
    if isinstance(recipe, str | os.PathLike):
        return recipe_module.read(os.fspath(recipe), overrides, look), locked
    if isinstance(recipe, Recipe) and not overrides:
        return Reading(recipe, [], recipe, Origin("")), locked
    tree = recipe.model_dump(mode="json") if isinstance(recipe, Recipe) else recipe
    return recipe_module.read_dict(tree, overrides, look), locked


def look(
    reading: Reading[Recipe], *, folder: bool = True, restart: bool = False, allowed: Sequence[str] = ()
) -> Findings:
    """Find what can be seen without torch: mistakes of the recipe, the files that it names, the run folder.

    Args:
        reading: The recipe, whole or in part.
        folder: Look at the run folder, too.
        restart: An earlier run in the folder would be moved aside.
        allowed: Keys that may differ from those of an earlier run.
    """
    findings, recipe = Findings(), reading.partial
    if reading.problems:
        findings.add(RecipeError(reading.problems))
    if recipe is None:
        return findings
    if reading.recipe is not None:
        findings.warn(advice(reading.recipe))
    # A name that is malformed or must not be read keeps the files behind it from being looked at; a mistake in another
    # key of the same block does not.
    named = Findings()
    if found := paths.problems(recipe):
        named.add(RecipeError(found))
    findings.merge(named)
    # Without the libraries only the heads of files can be read; `examine` reads the rows.
    if not named.blame("data") and (missing := readers.problems(recipe)):
        findings.add(DataError(missing))
    if (board := _given(recipe, "tracking", "folder")) is not None:
        with findings.collect():
            logdir.check(board)
    with findings.collect():
        others.check(_given(recipe, "tracking", "also") or [])
    if _given(recipe, "hub", "repo") is not None:
        from hf_finetune.hub.push import why_not  # loads the client of the Hub, which most recipes do without

        if (refusal := why_not()) is not None:
            findings.warn([Problem(f"the run can't be uploaded when it has ended: {refusal}", key="hub.repo")])
    if (start := _given(recipe, "adapter", "continue_from")) is not None and not named.blame("adapter"):
        with findings.collect():
            refuse_absent(start, _given(recipe, "adapter", "revision"))
    if (name := _given(recipe, "model", "name")) is not None and not named.blame(paths.KEY):
        with findings.collect():
            found_at = paths.resolve(name)
            if reading.recipe is not None and not findings.blame("model"):
                paths.refuse_uncached(found_at, recipe.model.revision)
    output = _given(recipe, "output")
    if folder and output is not None and not named.blame("output"):
        with findings.collect():
            dump = reading.recipe.dump() if reading.recipe else ""
            RunFolder(output).inspect(dump, restart=restart, allowed=allowed)
    return findings


def advice(recipe: Recipe) -> Iterator[Problem]:
    """Warn of settings that may train and yet come to nothing; that is not certain, so they are not errors."""
    rate, usual = recipe.training.learning_rate, recipe.adapter.usual_rates
    if usual is not None and recipe.training.optimizer in LIKE_ADAM:
        least, most, source = usual
        spread = _plain(most) if least == most else f"{_plain(least)} to {_plain(most)}"
        usual_for = f"for adapter.kind {recipe.adapter.kind}, published with {spread} ({source})"
        if rate > ABOVE * most:
            message = f"{_plain(rate)} is too high {usual_for}; the loss will hardly fall, start with {_plain(most)}"
            yield Problem(message, key="training.learning_rate")
        elif rate < least / BELOW:
            message = f"{_plain(rate)} is too low {usual_for}; the model will hardly change, start with {_plain(most)}"
            yield Problem(message, key="training.learning_rate")
    if not recipe.data.has_validation:
        message = "is not given, so nothing will show whether the model learns or only memorises; name a split, or set "
        yield Problem(message + "data.validation_share: 0.1", key="data.validation")


def _plain(rate: float) -> str:
    """`6e-5`, `0.0005`."""
    return f"{rate:g}".replace("e-0", "e-")


def _given(block: Any, *names: str) -> Any:
    """Give a field inside blocks; None where it could not be read."""
    for name in names:
        if not hasattr(block, name):
            return None
        block = getattr(block, name)
    return block
