"""Write predictions to a pipe, or to a file that appears whole and can be continued by another process.

Until the end a file is `OUTPUT.partial`; `OUTPUT.partial.json` says after each window how many of its bytes count, and
how many rows they came of. A process that continues it cuts off everything behind them, half a line too.
"""

from __future__ import annotations

import base64
import csv
import fcntl
import io
import json
import os
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from hf_finetune.data.readers import Row
from hf_finetune.errors import SHOWN, DataError, Problem, RecipeError
from hf_finetune.inference.opening import refuse_output
from hf_finetune.run.files import write_atomically, writing
from hf_finetune.tasks.base import OutputKind

OutFormat = Literal["csv", "tsv", "jsonl", "parquet"]
PREFIX = "predicted_"
# Kinds of faults that are remembered.
MOST_FAULTS = 20
CONTINUE = "; make room, and give the same command to continue"
# Raised by pyarrow where a value has no type, or another one than it should.
REFUSALS = (pa.ArrowException, OverflowError, ValueError, TypeError)
Cells = dict[str, Any]


@dataclass
class Progress:
    """Progress of a file."""

    rows: int = 0  # rows that were read and are done with
    bytes: int = 0  # bytes of the partial file that belong to them
    cut: int = 0
    faulty: int = 0
    faults: dict[str, list[int]] = field(default_factory=dict)
    """Faults of rows that were skipped or left empty -> the first few such rows."""
    schema: str | None = None  # see `Sink.state`
    columns: list[str] = field(default_factory=list)  # input columns, once they are known
    prefix: str = ""

    def add(self, faults: Mapping[str, Sequence[int]]) -> None:
        """Count rows by their fault."""
        for fault, struck in faults.items():
            self.faulty += len(struck)
            if fault in self.faults or len(self.faults) < MOST_FAULTS:
                known = self.faults.setdefault(fault, [])
                known += struck[: SHOWN - len(known)]


class Pipe:
    """Standard output; no process can continue it."""

    def __init__(self) -> None:
        self.progress = Progress()

    def write(self, data: bytes) -> None:
        """Write a window at once."""
        # Past Python's buffer: a reader that has left is noticed here, not when Python ends.
        view = memoryview(data)
        while view:
            view = view[os.write(1, view) :]

    def finish(self, sink: Sink) -> None:
        """Nothing is left to do."""


class File:
    """A file in the making; see the module. `key` must be the same for another process to continue it."""

    def __init__(self, final: Path, key: Mapping[str, Any]) -> None:
        self.final, self.key, self.progress = final, dict(key), Progress()
        self.partial = final.with_name(f"{final.name}.partial")
        self.state = final.with_name(f"{final.name}.partial.json")
        # Nothing is cut off yet: another process may be writing it.
        self.stream: IO[bytes] = self.partial.open("r+b" if self.partial.exists() else "x+b")

    def resume(self) -> None:
        """Take up the progress of an earlier process, where its files can be used."""
        try:
            state = json.loads(self.state.read_text(encoding="utf-8"))
            progress = Progress(**state["progress"])
            before: dict[str, Any] = state["key"]
        except (OSError, ValueError, KeyError, TypeError):
            return
        # A copy that was cut off, or the state of another file.
        if self.partial.stat().st_size < progress.bytes:
            return
        if changed := [name for name in {**before, **self.key} if before.get(name) != self.key.get(name)]:
            message = f"was begun with another {', '.join(changed)}; change it back, or give --restart to begin anew"
            raise RecipeError(Problem(message, file=str(self.partial)))
        self.progress = progress

    def write(self, data: bytes) -> None:
        """Append a window, then commit it with what `progress` says by now."""
        with writing(self.final, CONTINUE):
            self.stream.write(data)
            self.stream.flush()
            # Before the state: it must not count bytes that a crash of the machine takes.
            os.fsync(self.stream.fileno())
            self.progress.bytes += len(data)
            write_atomically(self.state, json.dumps({"key": self.key, "progress": asdict(self.progress)}))

    def finish(self, sink: Sink) -> None:
        """Give the file its name."""
        with writing(self.final, CONTINUE):
            sink.finish(self.partial, self.final)
            self.state.unlink(missing_ok=True)


Output = Pipe | File


@contextmanager
def opened(name: str | None, key: Mapping[str, Any], *, restart: bool, resumable: bool) -> Iterator[Output]:
    """Open the output, a file or with None standard output; inside, it is this process's alone.

    With `restart` a finished file is replaced, and a partial one begun anew; the latter also where the input is not
    `resumable`, that is can't be read again.

    Raises:
        RecipeError: The file exists, another process writes it, or what began it was something else.
        StorageError: It can't be written.
    """
    if name is None:
        yield Pipe()
        return
    refuse_output(name, restart=restart)
    with writing(Path(name)):
        file = File(Path(name), key)
    with file.stream as stream:
        try:
            # The system gives it back however the process ends.
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(Problem("is being written by another process; wait for it", file=name)) from None
        if resumable and not restart:
            file.resume()
        # Behind that is what a killed process wrote and did not commit.
        stream.truncate(file.progress.bytes)
        stream.seek(file.progress.bytes)
        yield file


def make(
    form: OutFormat,
    progress: Progress,
    window: Sequence[Row],
    kinds: Mapping[str, OutputKind],
    *,
    schema: Any,
    prefix: str | None,
) -> Sink:
    """Make the sink, with output columns that clash with no input column.

    Columns and prefix are those of `progress` where another process began, else of the first window of rows.
    """
    if not progress.columns:
        columns = dict.fromkeys(name for row in window for name in row.cells)
        progress.columns = list(columns) if schema is None else list(schema.names)
        progress.prefix = prefix_for(progress.columns, list(kinds)) if prefix is None else prefix
        if clash := [progress.prefix + name for name in kinds if progress.prefix + name in progress.columns]:
            raise RecipeError(f"--prefix: the input has a column {clash[0]!r} already; give another prefix")
    prefixed = {progress.prefix + name: kind for name, kind in kinds.items()}
    return Sink(form, progress.columns, prefixed, schema, state=progress.schema)


def prefix_for(inputs: Sequence[str], outputs: Sequence[str]) -> str:
    """Find a prefix with which no output column has the name of an input column: mostly none is needed."""
    prefix, number = "", 1
    while any(f"{prefix}{name}" in inputs for name in outputs):
        prefix = PREFIX if number == 1 else f"{PREFIX}{number}_"
        number += 1
    return prefix


class Sink:
    """Makes bytes of rows, a window at a time.

    Args:
        form: The format.
        inputs: Input columns, in order.
        kinds: Output columns, their prefix included.
        schema: Arrow schema of the input columns, for parquet; None finds it in the first rows.
        state: What `state` returned in the process that this one continues.
    """

    def __init__(
        self,
        form: OutFormat,
        inputs: list[str],
        kinds: Mapping[str, OutputKind],
        schema: Any = None,
        *,
        state: str | None = None,
    ) -> None:
        self.form, self.inputs, self.kinds, self.schema = form, inputs, kinds, schema
        self._parquet: Any = None if state is None else pa.ipc.read_schema(pa.BufferReader(base64.b64decode(state)))

    def head(self) -> bytes:
        """Return the bytes before the first row."""
        if self.form in ("csv", "tsv"):
            return self._table([dict(zip(self.columns, self.columns, strict=True))])
        return b""

    @property
    def columns(self) -> list[str]:
        """All columns, in order."""
        return [*self.inputs, *self.kinds]

    def body(self, rows: Mapping[int, Cells], place: str) -> bytes:
        """Format a window: input and output cells, by the row's number; `place` is the input's name in messages."""
        if not rows:
            return b""
        if self.form == "jsonl":
            texts = (json.dumps(row, ensure_ascii=False, default=str) for row in rows.values())
            # Half a surrogate pair is no UTF-8, and JSON's own escape for it stays within ASCII.
            return b"".join(text.encode("utf-8", "backslashreplace") + b"\n" for text in texts)
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
            # tsv knows no quotation marks; cells that would need them were refused by `body`.
            options = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
        writer = csv.writer(text, lineterminator="\n", **options)
        writer.writerows([_cell(row.get(name)) for name in self.columns] for row in rows)
        return text.getvalue().encode("utf-8", "surrogatepass")

    # Parquet can't be appended to: until the end, the file holds record batches behind their lengths.

    def state(self) -> str | None:
        """Return everything that another process must know to continue: the schema."""
        return None if self._parquet is None else base64.b64encode(self._parquet.serialize()).decode()

    def _frame(self, rows: Mapping[int, Cells], place: str) -> bytes:
        values = list(rows.values())
        try:
            self._parquet = self._parquet if self._parquet is not None else self._found(values)
            batch = pa.RecordBatch.from_pylist(values, schema=self._parquet)
        except REFUSALS as error:
            number, column = self._culprit(rows)
            reason = str(error).partition("\n")[0]
            message = f"column {column!r} holds what its parquet type, that of the first rows, can't ({reason})"
            raise DataError(Problem(f"{message}; give --format jsonl", file=place, line=number)) from error
        # pyarrow drops keys of objects that its type lacks, and says nothing.
        for number, row in rows.items():
            if lost := next((key for f in self._parquet for key in _lost(row.get(f.name), f)), None):
                raise self._late(lost, place, number)
        frame: bytes = batch.serialize().to_pybytes()
        return len(frame).to_bytes(8) + frame

    def _culprit(self, rows: Mapping[int, Cells]) -> tuple[int | None, str]:
        """Find the number and column of the cell that no Arrow array takes beside those before it."""

        def is_refused(cells: Sequence[Any], kind: Any) -> bool:
            try:
                pa.array(cells, kind)
            except REFUSALS:
                return True
            return False

        schema = self._parquet if self._parquet is not None else self.schema
        for name in self.inputs:
            kind = None if schema is None else schema.field(name).type
            cells = [row.get(name) for row in rows.values()]
            # Without a type the first cells decide it: the culprit ends the shortest list that is refused.
            if is_refused(cells, kind):
                most = bisect_left(range(1, len(cells)), True, key=lambda count: is_refused(cells[:count], kind))
                return list(rows)[most], name
        return None, ", ".join(self.inputs)

    def _found(self, rows: Sequence[Cells]) -> Any:
        schema = self.schema
        if schema is None:
            inner = [{name: row.get(name) for name in self.inputs} for row in rows]
            found = pa.Table.from_pylist(inner).schema
            # A column of nulls tells no type; text takes anything that may follow.
            schema = pa.schema([pa.field(f.name, pa.string() if pa.types.is_null(f.type) else f.type) for f in found])
        schema = pa.schema([f.with_type(_plain(f.type)) for f in schema], metadata=schema.metadata)
        plain = {"text": pa.string(), "number": pa.float64(), "truth": pa.bool_()}
        types = plain | {f"{kind}s": pa.list_(plain[kind]) for kind in ("text", "number")}
        for name, kind in self.kinds.items():
            schema = schema.append(pa.field(name, types[kind]))
        # Raise now what would be raised after all rows.
        pq.ParquetWriter(pa.BufferOutputStream(), schema).close()
        return schema

    def finish(self, partial: Path, final: Path) -> None:
        """Make the final file of everything that was written."""
        if self.form != "parquet":
            partial.replace(final)
            return
        schema = self._parquet if self._parquet is not None else self._found([])
        made = final.with_name(f".{final.name}.making")
        with partial.open("rb") as frames, pq.ParquetWriter(str(made), schema) as writer:
            while length := frames.read(8):
                batch = pa.ipc.read_record_batch(pa.py_buffer(frames.read(int.from_bytes(length))), schema)
                writer.write_batch(batch)
        made.replace(final)
        partial.unlink()


def _plain(kind: Any) -> Any:
    """Replace dictionaries in an Arrow type: batches that stand alone can't share one."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    if pa.types.is_struct(kind):
        return pa.struct([f.with_type(_plain(f.type)) for f in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_plain(kind.value_type)))
    return kind


def _lost(value: Any, column: Any) -> Iterator[str]:
    """Yield the paths of keys inside a cell that its Arrow type has no place for, and would drop."""
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


def _cell(value: Any) -> str:
    """Format a cell of a table; lists and objects become JSON."""
    if value is None:
        return ""
    if isinstance(value, bool | list | dict):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)
