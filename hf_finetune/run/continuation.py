"""Resuming a run: keys that may change, by `Key.resume` of their fields, and the command line that resumes it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from hf_finetune.config import yamlfile
from hf_finetune.config.problems import shown
from hf_finetune.config.section import key_of
from hf_finetune.errors import CheckpointError, Problem, RecipeError
from hf_finetune.recipe import Recipe


def differences(before: str, now: str) -> dict[str, tuple[Any, Any]]:
    """Find the dotted keys that two resolved recipes, as YAML, have different values for: what it was, what it is."""
    old, new = _flat(_resolved(before)), _flat(_resolved(now))
    return {
        key: (old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    }


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
    for key, (old, new) in differences(before, now).items():
        may = key_of(Recipe, key).resume
        told = f"was {shown(old, plain=True)}, is {shown(new, plain=True)}"
        if may == "ask" and key in allowed:
            notes.append(f"{key} {told}, as --allow-change says: from here on this is another training")
        elif may != "free":
            can = f"give --allow-change {key} to resume with it, " if may == "ask" else ""
            message = f"{told} in the run that this folder holds; change it back, {can}or --restart to start anew"
            problems.append(Problem(message, key=key))
    if problems:
        raise CheckpointError(problems)
    return notes


def is_whole(text: str) -> bool:
    """Tell a whole `recipe.yaml` from what a power failure leaves: nothing, zeros, or a part."""
    try:
        return text.endswith("\n") and isinstance(yamlfile.parse(text, "recipe.yaml").value, dict)
    except RecipeError:
        return False


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


def _resolved(text: str) -> dict[str, Any]:
    """Add every default, also of keys that are younger than the file; a recipe that can't be read stays as it is."""
    tree = yamlfile.parse(text, "recipe.yaml").value or {}
    try:
        return Recipe.model_validate(tree, by_alias=True, by_name=False).model_dump(mode="json")
    except ValidationError:
        return dict(tree)


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, dict) and inner:
            found |= _flat(inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = inner
    return found


RESTART, PROCESSES = "--restart", "--processes"
LAUNCHERS = {
    "accelerate",
    "torchrun",
    "accelerate.commands.launch",
    "accelerate.commands.accelerate_cli",
    "torch.distributed.run",
    "hf_finetune.launch",
}
"""Scripts and modules whose command line ends with that of the processes they start."""
_words: list[str] = []
_parent: list[str] = []


def note(words: Sequence[str]) -> None:
    """Keep the words of the command line, without the program's name, and the parent's: a launcher may end first."""
    _words[:] = words
    try:
        raw = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        raw = b""
    _parent[:] = [word.decode(errors="surrogateescape") for word in raw.split(b"\0")[:-1]]


def same_command() -> str:
    """Name in a sentence the command that resumes."""
    return f"the same command without {RESTART}" if RESTART in _words else "the same command"


def resume_command() -> str | None:
    """Quote the command that resumes the run for a shell; None where no command line started it."""
    if not _words:
        return None
    words = [word for word in _words if word != RESTART]
    return shlex.join([*_program(), *words])


def _program() -> list[str]:
    """Find what stood before the words: that of the launcher, else of this process."""
    for line in (_parent, sys.orig_argv):
        is_launcher = any(Path(word).name in LAUNCHERS for word in line)
        for tail in (_words, _words[1:]):  # `hf_finetune.launch` adds the verb
            before = list(line[: len(line) - len(tail)])
            if not tail or list(line[len(before) :]) != tail or not (is_launcher or line is not _parent):
                continue
            # A user types the script for what `train --processes` becomes.
            script = Path(sys.executable).with_name("hf-finetune")
            if PROCESSES in _words and before[1:] == ["-m", "hf_finetune.launch"] and script.exists():
                before = [str(script)]
            # The interpreter of a script goes without saying.
            if len(before) > 1 and Path(before[0]).name.startswith("python") and os.access(before[1], os.X_OK):
                before = before[1:]
            first = Path(before[0])
            if first.is_absolute() and first.is_relative_to(Path.cwd()):
                first = first.relative_to(Path.cwd())
            return [str(first), *before[1:]]
    return ["hf-finetune"]
