"""Events made again from what a run folder holds: while a run goes on from a checkpoint, or when somebody asks."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hf_finetune import records
from hf_finetune.errors import Problem, RecipeError, StorageError
from hf_finetune.runfolder import RunFolder
from hf_finetune.tracking.board.board import Board
from hf_finetune.tracking.board.events import Events
from hf_finetune.tracking.board.kinds import environment, samples
from hf_finetune.tracking.board.place import KEY, Place, check, remove
from hf_finetune.tracking.journal import read

if TYPE_CHECKING:
    from hf_finetune.recipe import Recipe
    from hf_finetune.tracking.journal import Entry


def replay(board: Board, lines: Sequence[Entry]) -> None:
    """Draw a run as far as it is, each step once.

    Args:
        board: A new one, that nothing was drawn on; it stays open.
        lines: Of metrics.jsonl.
    """
    with board.events.patient():
        for record in records.stored(board.folder.observations, environment.KIND):
            board.draw(record)
        summaries = [line for line in lines if line["phase"] == "summary"]
        for line in lines:
            if line["phase"] != "summary":
                board.add(line)
        for record in records.stored(board.folder.observations):
            if record.kind != environment.KIND:
                board.draw(record)
        for step, answers in samples.stored(board.folder.samples):
            board.add_samples(answers, step)
        for line in summaries[-1:]:
            board.conclude(line)


def rebuild(folder: RunFolder) -> int:
    """Make the events of a run again and put them in the place of those that are there.

    Args:
        folder: Of a run that is not going on.

    Returns:
        How many events were written.

    Raises:
        RecipeError: There is no run, or it is going on.
        StorageError: The events can't be written.
    """
    from hf_finetune.recipe import Recipe

    if folder.previous() is None:
        raise RecipeError(Problem(f"{folder.path} is no run folder; name one"))
    folder.look("", restart=True)
    recipe = Recipe.load(str(folder.recipe))
    target = Place.of(recipe, folder)
    check(target.folder)
    fresh = target if target.is_remote else target.beside(folder.path)
    try:
        fresh.clear()
        written = _write(recipe, folder, fresh)
        if fresh is not target:
            _put(fresh, target)
    except OSError as error:
        raise StorageError(Problem(f"{target.folder} can't be written: {error.strerror}", key=KEY)) from error
    finally:
        if fresh is not target:
            remove(Path(fresh.folder))
    return written


def _write(recipe: Recipe, folder: RunFolder, place: Place) -> int:
    """Draw the whole run; returns the number of events.

    Raises:
        StorageError: They can't all be written.
    """
    said: list[str] = []
    events = Events(place, said.append)
    board = Board(recipe, folder, events)
    replay(board, read(folder.metrics))
    board.add_lock()
    board.close("failure" if folder.condition()[0] == "failed" else "unknown")
    if said:
        raise StorageError(Problem(said[0].partition(": events")[0], key=KEY))
    return events.written


def _put(fresh: Place, target: Place) -> None:
    """Put new files in the place of the old ones; others in that folder stay."""
    old = Path(target.folder)
    Path(fresh.folder).mkdir(exist_ok=True)
    if {path.absolute() for path in old.glob("*")} <= {path.absolute() for path in target.own()}:
        aside = old.with_name(f".{old.name}.old")
        remove(aside)
        old.parent.mkdir(parents=True, exist_ok=True)
        if old.exists():
            old.rename(aside)
        shutil.move(fresh.folder, old)
        remove(aside)
        return
    target.clear()
    for path in Path(fresh.folder).iterdir():
        shutil.move(path, old / path.name)
