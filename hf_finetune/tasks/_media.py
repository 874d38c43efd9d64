"""Files as the cells of a column hold them: a path, perhaps into a zip file, or the bytes themselves."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from hf_finetune.config.paths import ROWS, outside
from hf_finetune.errors import BadRows, DataError
from hf_finetune.tasks._proposals import Cells
from hf_finetune.tasks.base import Features, Task


class Media(Task):
    """A task whose rows hold a file each, an image or a sound, besides what is to be told of it."""

    token_ids: ClassVar[str | None] = None
    content: ClassVar[str] = "digest"
    medium: ClassVar[str]
    """Field that names the column of the files, and the word for one of them."""

    def opened_rows(self, cells: Sequence[Any], look: Callable[[bytes], Features], bad: BadRows) -> list[Features]:
        """Read the file of each row, and return what `look` makes of it beside the `file` itself.

        A file is opened once, so that no worker meets a bad one in the middle of the training; faults are added to
        `bad`, and their rows left out.
        """
        column, found = getattr(self, self.medium), list[Features]()
        for index, cell in enumerate(cells):
            try:
                file = content(cell, self.medium)
                found.append({"file": file, **look(file)})
            except DataError as error:
                bad.add(index, f"column {column!r} {error}")
        return found

    def describe(self, row: Mapping[str, Any]) -> str:
        """Return the path, where there is one."""
        cell = row[getattr(self, self.medium)]
        path = cell.get("path") if isinstance(cell, Mapping) else cell
        return path if isinstance(path, str) else f"one {self.medium}"


def content(cell: Any, what: str) -> bytes:
    """Return the encoded file of a cell.

    Args:
        cell: Of the column.
        what: It should hold: `image` or `audio`.

    Raises:
        DataError: There is none, or it can't be read.
    """
    if isinstance(cell, Mapping):  # as `datasets.Image` and `datasets.Audio` keep one
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes | bytearray):
        return bytes(cell)
    if isinstance(cell, str) and cell.strip():
        if outside(cell, ROWS) is not None:
            raise DataError(f"names {cell}, which lies outside of the data; hold the {what} itself, e.g. in parquet")
        try:
            return _read(cell)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            reason = getattr(error, "strerror", None) or "it is not in the zip file, or that is damaged"
            raise DataError(f"names {cell}, which can't be read ({reason}); correct the path") from None
    # An image of Pillow, as the API may hand over; the name of its class would import Pillow.
    if hasattr(cell, "save"):
        stream = io.BytesIO()
        cell.save(stream, format="PNG")  # loses nothing
        return stream.getvalue()
    raise DataError(f"holds no {what}; write the path of a file, or its bytes")


def column(
    columns: Mapping[str, Cells], what: str, suffixes: tuple[str, ...], opened: Callable[[bytes], Any]
) -> Cells | None:
    """Find the first column of names of such files, or of the files themselves, as parquet and the Hub hold them."""

    def holds(cell: Any) -> bool:
        if not isinstance(cell, bytes) and not (isinstance(cell, Mapping) and isinstance(cell.get("bytes"), bytes)):
            return False
        try:
            opened(content(cell, what))
        except DataError:
            return False
        return True

    def first(cells: Cells) -> Any:
        return next((value for value in cells.values if value is not None), None)

    return next((cells for cells in columns.values() if cells.are_files(suffixes) or holds(first(cells))), None)


def on_disk(path: str) -> Path:
    """Return the file that a path leads to, or into: a zip file stands in it where a folder would."""
    file = Path(path)
    return next((place for place in (file, *file.parents) if place.is_file()), file)


def _read(path: str) -> bytes:
    file, place = Path(path), on_disk(path)
    if place == file:
        return file.read_bytes()
    return _archive(str(place), os.getpid()).read(file.relative_to(place).as_posix())


@lru_cache(maxsize=4)
def _archive(path: str, process: int) -> zipfile.ZipFile:
    """Return a zip file that stays open; each process has its own, as they would move the place of a shared one."""
    return zipfile.ZipFile(path)
