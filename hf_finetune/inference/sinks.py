"""Where predictions go: a pipe, or a file that is whole or not there, and that a killed process can be gone on with.

Until the end a file is `OUTPUT.partial`; `OUTPUT.partial.json` says after each window how many of its bytes count, and
how many rows they came of. A process that goes on cuts off what is behind them, half a line too.
"""

from __future__ import annotations

import base64
import csv
import fcntl
import io
import json
import os
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from hf_finetune.errors import DataError, Problem, RecipeError, StorageError
from hf_finetune.run.files import write_atomically
from hf_finetune.tasks.base import OutputKind


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


# Rows with their outputs as bytes, a window at a time: csv, tsv, jsonl, parquet.

OutFormat = Literal["csv", "tsv", "jsonl", "parquet"]
OUT_FORMATS: tuple[OutFormat, ...] = ("csv", "tsv", "jsonl", "parquet")
PREFIX = "predicted_"
Cells = dict[str, Any]


def prefix_for(inputs: Sequence[str], outputs: Sequence[str]) -> str:
    """What is put before every output column, so that none has the name of an input column: mostly nothing."""
    prefix, number = "", 1
    while any(f"{prefix}{name}" in inputs for name in outputs):
        prefix = PREFIX if number == 1 else f"{PREFIX}{number}_"
        number += 1
    return prefix


@dataclass
class Sink:
    """Makes bytes of rows.

    Args:
        form: The format.
        inputs: Input columns, in order.
        kinds: Output columns, their prefix included.
        schema: Arrow schema of the input columns, for parquet; None finds it in the first rows.
    """

    form: OutFormat
    inputs: list[str]
    kinds: Mapping[str, OutputKind]
    schema: Any = None
    _parquet: Any = field(default=None, init=False)

    def head(self) -> bytes:
        """What stands before the first row."""
        if self.form in ("csv", "tsv"):
            return self._table([dict(zip(self.columns, self.columns, strict=True))])
        return b""

    @property
    def columns(self) -> list[str]:
        """All columns, in order."""
        return [*self.inputs, *self.kinds]

    def body(self, rows: Mapping[int, Cells], place: str) -> bytes:
        """A window of rows.

        Args:
            rows: Input and output cells, by the row's number.
            place: What messages call the input.

        Raises:
            DataError: The format can't hold a row.
        """
        if not rows:
            return b""
        if self.form == "jsonl":
            return b"".join(_json(row) for row in rows.values())
        known = set(self.columns)
        for number, row in rows.items():
            if strange := [name for name in row if name not in known]:
                raise self._late(strange[0], place, number)
            if self.form == "tsv" and any(set("\t\r\n") & set(_cell(value)) for value in row.values()):
                message = "holds a tab or a line end inside a cell, which tsv can't; give --format csv or jsonl"
                raise DataError(Problem(message, file=place, line=number))
        return self._frame(rows, place) if self.form == "parquet" else self._table(list(rows.values()))

    def _late(self, key: str, place: str, number: int) -> DataError:
        message = f"has the key {key!r}, which its first rows lack, and {self.form} needs all columns at once"
        return DataError(Problem(f"{message}; give --format jsonl", file=place, line=number))

    def _table(self, rows: Sequence[Cells]) -> bytes:
        text = io.StringIO(newline="")
        options: dict[str, Any] = {}
        if self.form == "tsv":
            options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
        writer = csv.writer(text, lineterminator="\n", **options)
        writer.writerows([_cell(row.get(name)) for name in self.columns] for row in rows)
        return text.getvalue().encode("utf-8", "surrogatepass")

    # ---- parquet: until the end, record batches behind their lengths; a file of it is made of them then ----

    def state(self) -> str | None:
        """What the next process must know to go on."""
        return None if self._parquet is None else base64.b64encode(self._parquet.serialize()).decode()

    def resume(self, state: str | None) -> None:
        """What `state` told."""
        if state is not None:
            import pyarrow as pa

            self._parquet = pa.ipc.read_schema(pa.BufferReader(base64.b64decode(state)))

    def _frame(self, rows: Mapping[int, Cells], place: str) -> bytes:
        import pyarrow as pa

        values = list(rows.values())
        try:
            self._parquet = self._parquet if self._parquet is not None else self._found(values)
            batch = pa.RecordBatch.from_pylist(values, schema=self._parquet)
        except _refusals() as error:
            number, column = self._culprit(rows)
            reason = str(error).partition("\n")[0]
            message = f"column {column!r} holds what its parquet type, that of the first rows, can't ({reason})"
            raise DataError(Problem(f"{message}; give --format jsonl", file=place, line=number)) from error
        for number, row in rows.items():
            if lost := next((key for f in self._parquet for key in _lost(row.get(f.name), f)), None):
                raise self._late(lost, place, number)
        frame: bytes = batch.serialize().to_pybytes()
        return len(frame).to_bytes(8) + frame

    def _culprit(self, rows: Mapping[int, Cells]) -> tuple[int | None, str]:
        """Number and column of the cell that no Arrow array takes beside those before it."""
        import pyarrow as pa

        def is_refused(cells: Sequence[Any], kind: Any) -> bool:
            try:
                pa.array(cells, kind)
            except _refusals():
                return True
            return False

        schema = self._parquet if self._parquet is not None else self.schema
        for name in self.inputs:
            kind = None if schema is None else schema.field(name).type
            cells = [row.get(name) for row in rows.values()]
            if is_refused(cells, kind):
                most = bisect_left(range(1, len(cells)), True, key=lambda count: is_refused(cells[:count], kind))
                return list(rows)[most], name
        return None, ", ".join(self.inputs)

    def _found(self, rows: Sequence[Cells]) -> Any:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = self.schema
        if schema is None:
            inner = [{name: row.get(name) for name in self.inputs} for row in rows]
            found = pa.Table.from_pylist(inner).schema
            schema = pa.schema([pa.field(f.name, pa.string() if pa.types.is_null(f.type) else f.type) for f in found])
        schema = pa.schema([f.with_type(_plain(f.type)) for f in schema], metadata=schema.metadata)
        types = {"text": pa.string(), "texts": pa.list_(pa.string()), "number": pa.float64(), "truth": pa.bool_()}
        for name, kind in self.kinds.items():
            schema = schema.append(pa.field(name, types[kind]))
        pq.ParquetWriter(pa.BufferOutputStream(), schema).close()  # raises now what it would raise after all rows
        return schema

    def finish(self, partial: Path, final: Path) -> None:
        """Make the final file of everything that was written."""
        if self.form != "parquet":
            partial.replace(final)
            return
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = self._parquet if self._parquet is not None else self._found([])
        made = final.with_name(f".{final.name}.making")
        with partial.open("rb") as frames, pq.ParquetWriter(str(made), schema) as writer:
            while length := frames.read(8):
                batch = pa.ipc.read_record_batch(pa.py_buffer(frames.read(int.from_bytes(length))), schema)
                writer.write_batch(batch)
        made.replace(final)
        partial.unlink()


def _refusals() -> tuple[type[Exception], ...]:
    """What pyarrow raises where a value is of no type, or not of the one that it should be."""
    import pyarrow as pa

    return pa.ArrowException, OverflowError, ValueError, TypeError


def _plain(kind: Any) -> Any:
    """An Arrow type without dictionaries: batches that stand alone can't share one."""
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([f.with_type(_plain(f.type)) for f in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    return kind


def _lost(value: Any, column: Any) -> Iterator[str]:
    """Paths of keys inside a cell that its Arrow type has no place for, and would drop."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_struct(kind) and isinstance(value, dict):
        inner = {f.name: f for f in kind}
        for name, part in value.items():
            if name not in inner:
                yield f"{column.name}.{name}"
            else:
                yield from (f"{column.name}.{path}" for path in _lost(part, inner[name]))
    elif pa.types.is_list(kind) and isinstance(value, list):
        inside = kind.value_field.with_name(column.name)
        yield from (path for part in value for path in _lost(part, inside))


def _json(row: Cells) -> bytes:
    text = json.dumps(row, ensure_ascii=False, default=str)
    try:
        return f"{text}\n".encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON holds as an escape
        return f"{json.dumps(row, default=str)}\n".encode()


def _cell(value: Any) -> str:
    """A cell of a table: lists and objects as JSON, as they can't be anything else."""
    if value is None:
        return ""
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
