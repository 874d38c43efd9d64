"""A feature of `datasets` for columns whose cells are any JSON: lists of turns, tools, numbers as they are written."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pyarrow as pa
from datasets.features.features import register_feature

from hf_finetune.rowfiles import jsonrows


@dataclass
class Cell:
    """Any JSON, kept as its text.

    `datasets.Json` reads its text with the ujson of pandas, which gives 0.12345678901234501 for 0.1234567890123456789,
    and another number for an integer above 64 bits.
    """

    decode: bool = True
    id: str | None = field(default=None, repr=False)
    dtype: ClassVar[str] = "json"
    pa_type: ClassVar[Any] = pa.string()
    _type: str = field(default="hf_finetune.Cell", init=False, repr=False)

    def __call__(self) -> Any:
        """The Arrow type, as `datasets` asks for it."""
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        """The text of a value."""
        return None if value is None else jsonrows.written(value)

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        """The value of a text."""
        return None if value is None else jsonrows.read(value)

    def cast_storage(self, storage: Any) -> Any:
        """Texts of an Arrow array of any type."""
        if pa.types.is_string(storage.type):
            return storage
        return pa.array([self.encode_example(value) for value in storage.to_pylist()], pa.string())


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it calls itself experimental
    register_feature(Cell, "hf_finetune.Cell")
