"""A matplotlib figure as an image summary."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from tensorboardX.proto.summary_pb2 import Summary

from hf_finetune.charts import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def picture(tag: str, figure: Figure) -> Summary:
    """The figure as PNG under a tag of the Images tab."""
    content = drawing.png(figure)
    width, height = struct.unpack(">II", content[16:24])  # the first chunk of every PNG, IHDR
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
    return Summary(value=[Summary.Value(tag=tag, image=image)])
