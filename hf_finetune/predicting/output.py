"""Where predictions go: a pipe, or a file that is whole or not there, and that a killed process can be gone on with.

Until the end a file is `OUTPUT.partial`; `OUTPUT.partial.json` says after each window how many of its bytes count, and
how many rows they came of. A process that goes on cuts off what is behind them, half a line too.
"""

from __future__ import annotations

import fcntl
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from hf_finetune.errors import Problem, RecipeError, StorageError
from hf_finetune.runfolder import write_atomically

if TYPE_CHECKING:
    from hf_finetune.predicting.sinks import Sink


@dataclass
class Progress:
    """How far it is."""

    rows: int = 0
    """Rows that were read and are done with."""
    bytes: int = 0
    """Of the partial file, that belong to them."""
    cut: int = 0
    faulty: int = 0
    faults: dict[str, list[int]] = field(default_factory=dict)
    """What was wrong with the rows that were skipped or left empty -> the first few."""
    schema: str | None = None
    """See `Sink.state`."""
    columns: list[str] = field(default_factory=list)
    """Input columns, once they are known."""
    prefix: str = ""


class Output(ABC):
    """Takes windows of bytes."""

    progress: Progress

    @abstractmethod
    def write(self, data: bytes) -> None:
        """Take the bytes of a window and commit them, and what `progress` says by now."""

    @abstractmethod
    def finish(self, sink: Sink) -> None:
        """Everything is written."""


class Pipe(Output):
    """Standard output."""

    def __init__(self) -> None:
        self.progress = Progress()

    def write(self, data: bytes) -> None:
        """Write at once.

        Raises:
            BrokenPipeError: Nobody reads any more.
        """
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]

    def finish(self, sink: Sink) -> None:
        """Nothing is left to do."""


class File(Output):
    """A file; see the module."""

    def __init__(self, final: Path, stream: IO[bytes], progress: Progress, key: Mapping[str, Any]) -> None:
        self.final, self.stream, self.progress, self.key = final, stream, progress, key

    def write(self, data: bytes) -> None:
        """Append, then commit.

        Raises:
            StorageError: The disk does not take it.
        """
        try:
            self.stream.write(data)
            self.stream.flush()
            os.fsync(self.stream.fileno())
            self.progress.bytes += len(data)
            state = {"key": dict(self.key), "progress": asdict(self.progress)}
            write_atomically(_state_of(self.final), json.dumps(state))
        except OSError as error:
            raise StorageError(f"{self.final} can't be written: {error.strerror}; the same command goes on") from error

    def finish(self, sink: Sink) -> None:
        """Give the file its name.

        Raises:
            StorageError: The disk does not take it.
        """
        try:
            sink.finish(_partial_of(self.final), self.final)
            _state_of(self.final).unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"{self.final} can't be written: {error.strerror}; the same command goes on") from error


@contextmanager
def opened(name: str | None, key: Mapping[str, Any], *, restart: bool, resumable: bool) -> Iterator[Output]:
    """The output; inside, it is this process's alone.

    Args:
        name: A file; None is standard output.
        key: What must be the same for another process to go on.
        restart: Begin anew, and replace a finished file.
        resumable: Whether the input can be read again.

    Raises:
        RecipeError: The file is there already, another process writes it, or what began it was something else.
        StorageError: It can't be written.
    """
    if name is None:
        yield Pipe()
        return
    refuse(name, restart=restart)
    final = Path(name)
    try:
        stream = _partial_of(final).open("r+b" if _partial_of(final).exists() else "x+b")
    except OSError as error:
        raise StorageError(f"{name} can't be written: {error.strerror}") from error
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(Problem("is being written by another process; wait for it", file=name)) from None
        progress = _stored(final, key) if resumable and not restart else Progress()
        stream.truncate(progress.bytes)
        stream.seek(progress.bytes)
        yield File(final, stream, progress, key)


def refuse(name: str, *, restart: bool) -> None:
    """Refuse an output that can't be made, before anything is loaded.

    Raises:
        RecipeError: It is there already, and not to be replaced.
        StorageError: Its folder is not there.
    """
    if Path(name).exists() and not restart:
        raise RecipeError(Problem("is there already; name another file, or give --restart to replace it", file=name))
    if not Path(name).parent.is_dir():
        raise StorageError(Problem(f"there is no folder {str(Path(name).parent)!r}; make it first", file=name))


def _stored(final: Path, key: Mapping[str, Any]) -> Progress:
    """How far an earlier process came.

    Raises:
        RecipeError: It did something else.
    """
    try:
        state = json.loads(_state_of(final).read_text(encoding="utf-8"))
        progress = Progress(**state["progress"])
        before: dict[str, Any] = state["key"]
    except (OSError, ValueError, KeyError, TypeError):
        return Progress()
    if _partial_of(final).stat().st_size < progress.bytes:
        return Progress()
    changed = [name for name in {**before, **key} if before.get(name) != key.get(name)]
    if changed:
        what = ", ".join(changed)
        message = f"was begun with another {what}; give back what changed, or --restart to begin anew"
        raise RecipeError(Problem(message, file=str(_partial_of(final))))
    return progress


def _partial_of(final: Path) -> Path:
    return final.with_name(f"{final.name}.partial")


def _state_of(final: Path) -> Path:
    return final.with_name(f"{final.name}.partial.json")
