"""`--locked LOCK`: a locked run done once more, bit for bit, in a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hf_finetune import recipe as recipe_module
from hf_finetune.config import yamlfile
from hf_finetune.config.reading import Reading
from hf_finetune.config.yamlfile import OVERRIDE
from hf_finetune.errors import CheckpointError, Problem, RecipeError
from hf_finetune.recipe import Recipe
from hf_finetune.run import lock as run_lock
from hf_finetune.run.lock import Choices, Lock, pinned

if TYPE_CHECKING:
    from hf_finetune.device import Machine  # torch takes seconds to import

KEYS = "lock."
"""Beginning of the keys of `--allow-change` that are about a lock."""
SUFFIX = "-repeat"
"""Added to the locked run's folder for that of its repeat, where no other is given."""


@dataclass(frozen=True)
class Repeat:
    """A locked run that is to be done once more."""

    file: str
    """The lock."""
    lock: Lock
    allowed: tuple[str, ...] = ()
    """Keys of `--allow-change` that begin with `lock.`."""

    def refuse_drift(self, recipe: Recipe, machine: Machine) -> list[str]:
        """Compare a repeat with its lock; returns a sentence for each difference that is allowed.

        Raises:
            RecipeError: `--allow-change` names a key that may not change.
            CheckpointError: Something else differs; it carries every difference.
        """
        from hf_finetune.training import locking

        for key in self.allowed:
            if not any(key == group or key.startswith(f"{group}.") for group in locking.ALLOWED):
                message = f"may not change in a repeat, only {', '.join(locking.ALLOWED)} may; train without --locked"
                raise RecipeError(Problem(message, key=key))
        problems, notes = locking.drift(self.lock, recipe, machine, self.allowed)
        if problems:
            raise CheckpointError(replace(problem, file=problem.file or self.file) for problem in problems)
        return notes

    def choices(self) -> Choices:
        """Return the choices that were made for the locked run."""
        from hf_finetune.run.lock import Choices

        return Choices.read(self.lock.choices.model_dump())

    def as_locked(self, machine: Machine, recipe: Recipe) -> Machine:
        """Make the machine what it was for the locked run, as far as that is open and decides bits.

        That is the number of threads, where it has the cores, and the precision and attention that were chosen.
        """
        import torch

        choices = self.choices()
        if choices.device == machine.device:
            machine = choices.onto(machine, recipe)
        threads = self.lock.hardware.get("threads")
        if isinstance(threads, int) and 0 < threads < machine.threads and machine.device == "cpu":
            torch.set_num_threads(threads)
            return replace(machine, threads=threads)
        return machine

    def refuse_other(self, choices: Choices) -> None:
        """Compare what was chosen for this repeat with what was chosen for the locked run.

        Raises:
            CheckpointError: It is something else, because the machine can't do what it was.
        """
        from hf_finetune.run.lock import Made
        from hf_finetune.training.locking import other_choices

        if any(key.startswith(("lock.hardware", "lock.packages")) for key in self.allowed):
            return
        how = "bits would differ; repeat it where it is the same, or give --allow-change lock.hardware"
        found = other_choices(self.lock.choices, Made.model_validate(choices.dump()))
        problems = [Problem(f"{text}: {how}", key=key, file=self.file) for key, text in found]
        if problems:
            raise CheckpointError(problems)

    def notes_on_rows(self, fingerprint: str) -> list[str]:
        """Compare the rows that came of the data with those of the locked run.

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


def read(file: str, path: str | None, overrides: Sequence[str]) -> tuple[Lock, Reading[Recipe]]:
    """Read a lock, and the recipe of the repeat: that of the lock, with every revision as the commit that it meant.

    Args:
        file: The lock.
        path: A recipe that must resolve to that of the lock; None takes the lock's own.
        overrides: Each `key.path=value`.

    Raises:
        RecipeError: The lock can't be used, or the repeat would write into the locked run.
    """
    lock = run_lock.read(file)
    reading = (
        recipe_module.read(path, overrides) if path else recipe_module.read_text(lock.recipe.whole, file, overrides)
    )
    if reading.recipe is None:
        return lock, reading
    is_asked = any(override.partition("=")[0] == "output" for override in overrides)
    recipe = _elsewhere(pinned(reading.recipe, lock), lock, Path(file), is_asked=is_asked)
    if not any(override.startswith(("hub=", "hub.")) for override in overrides):
        recipe = recipe.model_copy(update={"hub": None})  # the locked run's repository holds the locked run
    return lock, replace(reading, recipe=recipe, partial=recipe)


def _elsewhere(recipe: Recipe, lock: Lock, file: Path, *, is_asked: bool) -> Recipe:
    """With a folder that is not the locked run's.

    Args:
        recipe: Of the repeat.
        lock: Of the run.
        file: Where the lock lies.
        is_asked: Whether the command line names a folder.

    Raises:
        RecipeError: It names the locked run's.
    """
    first = str(yamlfile.parse(lock.recipe.whole, str(file)).value["output"])
    output = recipe.output
    if not is_asked and output == first:
        output = f"{output.rstrip('/')}{SUFFIX}"
    taken = [file.parent, *([Path(first)] if Path(first).exists() else [])]
    if any(Path(output).resolve() == folder.resolve() for folder in taken):
        message = f"{output} holds the locked run, which a repeat leaves alone; give output=ANOTHER_FOLDER"
        raise RecipeError(Problem(message, key="output", file=OVERRIDE if is_asked else str(file)))
    return recipe.model_copy(update={"output": output})
