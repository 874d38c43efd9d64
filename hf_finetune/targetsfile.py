"""`targets.json` in a run folder: what the training data said about the labels, and where the run was started.

With it a finished run is used without its training data: `adapter/` names the labels, this also has the values that
stand for them in the data.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hf_finetune.errors import CheckpointError, Problem, StorageError
from hf_finetune.runfolder import write_atomically
from hf_finetune.tasks.base import State

VERSION = 1


@dataclass(frozen=True)
class Kept:
    """What the file holds."""

    targets: State
    started_in: Path
    """The working directory of the run, to which relative paths of its recipe belong."""


def to_json(targets: State) -> dict[str, Any]:
    """The targets in a form that JSON keeps."""
    plain = {item.name: getattr(targets, item.name) for item in fields(targets)}
    if not targets.more:
        del plain["more"]  # version 0.1.0 does not know it
    # A list of pairs, as JSON would turn integer keys into text.
    return {**plain, "id_of": [[raw, index] for raw, index in targets.id_of.items()]}


def from_json(stored: dict[str, Any]) -> State:
    """What `to_json` made.

    Raises:
        TypeError: It is something else.
        ValueError: It is something else.
        KeyError: Something is missing.
    """
    plain = {name: tuple(value) for name, value in stored.items() if name not in ("id_of", "more")}
    return State(**plain, id_of=dict(stored["id_of"]), more=stored.get("more", {}))


def write(file: Path, targets: State) -> None:
    """Write the file, whole or not at all.

    Raises:
        StorageError: The disk does not take it.
    """
    stored = {"version": VERSION, "targets": to_json(targets), "started_in": str(Path.cwd())}
    try:
        write_atomically(file, json.dumps(stored, indent=1, ensure_ascii=False) + "\n", durable=True)
    except OSError as error:
        raise StorageError(f"{file} can't be written: {error.strerror or error}") from error


def read(file: Path) -> Kept | None:
    """What the file holds; None where there is none.

    Raises:
        CheckpointError: The file is damaged, or of a later version.
    """
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        if stored["version"] != VERSION:
            message = f"is of version {stored['version']}, this program knows {VERSION}; use the one that wrote it"
            raise CheckpointError(Problem(message, file=str(file)))
        return Kept(from_json(stored["targets"]), Path(stored["started_in"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        message = f"is damaged ({type(error).__name__}); the training command with --restart makes the run anew"
        raise CheckpointError(Problem(message, file=str(file))) from error
