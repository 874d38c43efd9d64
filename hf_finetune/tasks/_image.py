"""Images: which files are one, and how they are seen."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from hf_finetune.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

# Of one image, as Pillow warns of decompression bombs.
MOST_PIXELS = 178_956_970


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
