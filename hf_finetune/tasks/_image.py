"""Images as the cells of a column hold them: a path, perhaps into a zip file, bytes, or an image of Pillow."""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_finetune.config.paths import ROWS, outside
from hf_finetune.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

# Of one image, as Pillow warns of decompression bombs.
MOST_PIXELS = 178_956_970


def content(cell: Any) -> bytes:
    """Return the encoded file of a cell.

    Raises:
        DataError: There is none, or it can't be read.
    """
    if isinstance(cell, Mapping):  # as `datasets.Image` keeps one
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes | bytearray):
        return bytes(cell)
    if isinstance(cell, str) and cell.strip():
        if outside(cell, ROWS) is not None:
            raise DataError(f"names {cell}, which lies outside of the data; hold the image itself, e.g. in parquet")
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
    raise DataError("holds no image; write the path of a file, or its bytes")


def are_images(cells: Sequence[Any]) -> bool:
    """Tell that the first cell with something in it holds an image, as parquet files and data sets of the Hub do."""
    cell = next((value for value in cells if value is not None), None)
    if not isinstance(cell, bytes) and not (isinstance(cell, Mapping) and isinstance(cell.get("bytes"), bytes)):
        return False
    try:
        opened(content(cell))
    except DataError:
        return False
    return True


def opened(file: bytes) -> Image:
    """Return the image in RGB, as a camera's orientation says it is to be seen.

    Raises:
        DataError: It is damaged, too large, or no image.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(file))
        if image.width * image.height > MOST_PIXELS:
            raise DataError(f"holds an image of {image.width:,} x {image.height:,} pixels; make it smaller")
        # Cameras store how they were held; processors of transformers do not look.
        turned: Image.Image = ImageOps.exif_transpose(image)
        return turned.convert("RGB")
    except UnidentifiedImageError:
        raise DataError("holds a file that is no image, or of a kind that Pillow does not know; remove it") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"holds a damaged image ({' '.join(str(error).split())[:100]}); remove it") from None


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
