"""Image classification: one label an image, several labels an image, or a number (regression)."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self

from pydantic import model_validator

from hf_finetune.config.blocks import Name
from hf_finetune.config.section import TEXT, refuse_repeated
from hf_finetune.tasks import _image, _media, _proposals
from hf_finetune.tasks._classifier import Classifier
from hf_finetune.tasks._media import Media
from hf_finetune.tasks._proposals import Cells, Proposal
from hf_finetune.tasks.base import Batch, Column, Features, Rows, State

# Pixels of a patch's side, by which the size of an image is told: as of most vision transformers.
PATCH = 16
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")


class ImageClassification(Media, Classifier):
    """Assigns labels, or a number, to an image."""

    auto_model: ClassVar[str] = "AutoModelForImageClassification"
    auto_processor: ClassVar[str] = "AutoImageProcessor"
    # Of the two backends, the one that needs no torchvision: both would round otherwise.
    processor_options: ClassVar[Mapping[str, Any]] = {"backend": "pil"}
    peft_task: ClassVar[str | None] = None
    pipeline: ClassVar[str] = "image-classification"
    medium: ClassVar[str] = "image"
    rows_are: ClassVar[str] = "images"
    support_is: ClassVar[str] = "images"
    files: ClassVar[Mapping[str, tuple[str, ...]]] = {"image": SUFFIXES}

    image: Annotated[Name, TEXT]
    """Column of the images: paths, relative to the working directory and perhaps into a zip file
    (`photos.zip/cats/1.jpg`), or the bytes of files."""

    @classmethod
    def propose(cls, columns: Mapping[str, Cells]) -> Proposal | None:
        """Take names of image files, or images themselves, and classes, lists of labels, or decimals."""
        image = _media.column(columns, "image", SUFFIXES, _image.opened)
        found = None if image is None else _proposals.target(columns, [image])
        if image is None or found is None:
            return None
        block, says, best = found
        return Proposal(
            {"image": image.name, **block},
            f"{image.name} holds images, {says}",
            confidence=0.9,
            used=[image.name, block["label"]],
            model=("google/vit-base-patch16-224-in21k", "86M parameters"),
            best_metric=best,
        )

    @model_validator(mode="after")
    def _columns_are_distinct(self) -> Self:
        refuse_repeated(image=self.image, label=dict.fromkeys(self.label_columns()))
        return self

    def columns(self) -> dict[str, Column]:
        """Return the image, and the columns of labels."""
        return {self.image: Column("image")} | self.label_columns()

    def features(self, rows: Rows, processor: Any, state: State, limit: int) -> list[Features]:
        """Read the files of a batch of raw rows, each of which must open; the processor comes when they are collated.

        Raises:
            RowsError: An image or a label is missing or unfit; every row of the batch of which that is so.
        """
        found = self.labelled(rows, state, lambda bad: self.opened_rows(rows[self.image], self._look, bad))
        # A processor makes all images one size: the first tells that of all.
        pixels = self._pixels([found[0]["file"]], processor)["pixel_values"].shape[-2:]
        size = max(1, pixels[0] // PATCH * (pixels[1] // PATCH))
        return [row | {"size": size, "whole": size} for row in found]

    def collate(self, features: list[Any], processor: Any, state: State) -> Batch:
        """Resize and normalise the images as the processor says."""
        return self._pixels([row["file"] for row in features], processor) | self.label_batch(features)

    def example(self, state: State, size: int) -> dict[str, Any]:
        """Return a plain image; its size in the end is the processor's, so `size` chooses its shape and colour."""
        from PIL import Image

        stream = io.BytesIO()
        Image.new("RGB", (16 + size % 64, 32), (size * 37 % 256, size % 256, 128)).save(stream, format="PNG")
        return {self.image: stream.getvalue()} | self.example_labels(state)

    def usage(self, state: State, processor: Any) -> str:
        """Look at an image, and print the label."""
        return (
            "from PIL import Image\n\n"
            'image = Image.new("RGB", (64, 64))  # or Image.open("photo.jpg").convert("RGB")\n'
            'logits = model(**processor(images=image, return_tensors="pt")).logits\n'
            f"{self.answer_code()}\n"
        )

    @staticmethod
    def _look(file: bytes) -> Features:
        _image.opened(file)
        # Equal images are found by it, without holding their bytes.
        return {"digest": hashlib.blake2b(file, digest_size=16).hexdigest(), "size": 1}

    @staticmethod
    def _pixels(files: list[bytes], processor: Any) -> Batch:
        return dict(processor(images=[_image.opened(file) for file in files], return_tensors="pt"))
