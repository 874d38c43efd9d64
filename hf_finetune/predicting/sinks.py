"""Rows with their outputs as bytes, a window at a time: csv, tsv, jsonl, parquet."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hf_finetune.errors import DataError, Problem
from hf_finetune.predicting.predictor import Kind

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
    kinds: Mapping[str, Kind]
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

    def body(self, rows: Sequence[Cells], place: str) -> bytes:
        """A window of rows.

        Args:
            rows: Input and output cells.
            place: What messages call the input.

        Raises:
            DataError: The format can't hold a row.
        """
        if not rows:
            return b""
        if self.form == "jsonl":
            return b"".join(_json(row) for row in rows)
        if self.form == "parquet":
            return self._frame(rows, place)
        known = set(self.columns)
        strange = next((name for row in rows for name in row if name not in known), None)
        if strange is not None:
            message = f"has the key {strange!r}, which its first rows lack, and {self.form} needs all columns at once"
            raise DataError(Problem(f"{message}; give --format jsonl", file=place))
        if self.form == "tsv" and any(set("\t\r\n") & set(_cell(value)) for row in rows for value in row.values()):
            message = "holds a tab or a line end inside a cell, which tsv can't; give --format csv or jsonl"
            raise DataError(Problem(message, file=place))
        return self._table(rows)

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

    def _frame(self, rows: Sequence[Cells], place: str) -> bytes:
        import pyarrow as pa

        self._parquet = self._parquet if self._parquet is not None else self._found(rows)
        try:
            batch = pa.RecordBatch.from_pylist(list(rows), schema=self._parquet)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            message = f"holds a value of another type than its first rows ({error}); give --format jsonl"
            raise DataError(Problem(message, file=place)) from error
        frame: bytes = batch.serialize().to_pybytes()
        return len(frame).to_bytes(8) + frame

    def _found(self, rows: Sequence[Cells]) -> Any:
        import pyarrow as pa

        schema = self.schema
        if schema is None:
            inner = [{name: row.get(name) for name in self.inputs} for row in rows]
            found = pa.Table.from_pylist(inner).schema
            schema = pa.schema([pa.field(f.name, pa.string() if pa.types.is_null(f.type) else f.type) for f in found])
        types = {"text": pa.string(), "texts": pa.list_(pa.string()), "number": pa.float64(), "truth": pa.bool_()}
        for name, kind in self.kinds.items():
            schema = schema.append(pa.field(name, types[kind]))
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
