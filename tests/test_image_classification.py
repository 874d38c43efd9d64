"""Images: where they lie, files that can't be used, and a cache that notices when one changes."""

from __future__ import annotations

import io
import os
import signal
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_finetune import check, train
from hf_finetune.errors import DataError, RowsError, Stopped
from hf_finetune.tasks import _image
from hf_finetune.tasks.base import State
from hf_finetune.tasks.image_classification import ImageClassification

TASK = ImageClassification(kind="image_classification", image="image", label="label")
TWO = State(("a", "b"))


@pytest.fixture
def processor(tiny_vit: str) -> Any:
    from transformers import AutoImageProcessor

    auto: Any = AutoImageProcessor
    return auto.from_pretrained(tiny_vit, backend="pil")


def png(colour: str = "red", size: tuple[int, int] = (20, 30)) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", size, colour).save(stream, format="PNG")
    return stream.getvalue()


def test_an_image_is_a_path_a_path_into_a_zip_file_bytes_or_a_struct(tmp_path: Path, processor: Any) -> None:
    (tmp_path / "one.png").write_bytes(png())
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("photos/one.png", png())
    cells: list[Any] = [
        str(tmp_path / "one.png"),
        f"{tmp_path}/all.zip/photos/one.png",
        png(),
        {"bytes": png(), "path": "x"},
    ]
    cells.append(Image.new("RGB", (20, 30), "red"))
    rows = TASK.features({"image": cells, "label": ["a"] * 5}, processor, TWO, 64)
    assert len({row["digest"] for row in rows}) == 1
    batch = TASK.collate(rows, processor, TWO)
    assert batch["pixel_values"].shape == (5, 3, 32, 32)
    assert batch["labels"].tolist() == [0] * 5


def test_every_file_that_can_not_be_used_is_named_with_its_row(tmp_path: Path, processor: Any) -> None:
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes(png(size=(90, 90))[:80])
    cells = [png(), str(tmp_path / "none.png"), str(tmp_path / "text.png"), str(tmp_path / "cut.png"), None]
    with pytest.raises(RowsError) as error:
        TASK.features({"image": cells, "label": ["a"] * 5}, processor, TWO, 64)
    told = {rows[0]: what for what, rows in error.value.found.items()}
    assert told.keys() == {1, 2, 3, 4}
    for row, says in {1: "none.png, which can't be read (No such", 2: "no image", 3: "damaged", 4: "no image"}.items():
        assert says in told[row]


def test_the_orientation_of_a_camera_is_applied_and_all_is_rgb() -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.new("RGB", (20, 10)).save(stream, format="JPEG", exif=exif)
    assert _image.opened(stream.getvalue()).size == (10, 20)
    for mode in ("L", "P", "RGBA", "1", "CMYK"):
        stream = io.BytesIO()
        Image.new(mode, (4, 4)).save(stream, format="TIFF")
        assert _image.opened(stream.getvalue()).mode == "RGB"


def test_a_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_image, "MOST_PIXELS", 100)
    with pytest.raises(DataError, match="20 x 30 pixels"):
        _image.opened(png())


def test_a_file_that_changed_is_read_again(tiny_vit: str, tmp_path: Path) -> None:
    lines = ["image,label"]
    for index in range(12):
        pixels = np.random.default_rng(index).integers(0, 255, (24, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        lines.append(f"{tmp_path}/{index}.png,{'ab'[index % 2]}")
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    recipe: dict[str, Any] = {
        "task": TASK.model_dump(),
        "model": {"name": tiny_vit},
        "data": {"train": str(tmp_path / "rows.csv"), "cache": str(tmp_path / "cache")},
        "adapter": {"kind": "lora", "r": 2},
        "training": {"steps": 1, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32"},
        "tracking": {"images": False, "report": False},
        "output": str(tmp_path / "run"),
    }
    train(recipe)
    (tmp_path / "3.png").write_text("no image any more")
    (problem,) = check(recipe | {"output": str(tmp_path / "other")}).problems
    assert "rows.csv" in str(problem)
    assert "no image" in str(problem)


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [{"kind": "full"}, {"kind": "lora", "r": 2, "target_modules": ["convolution"]}])
def test_running_statistics_are_those_of_the_checkpoint(
    adapter: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch normalisation keeps what training changes outside the weights."""
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor, set_seed

    from hf_finetune.training.trainer import FinetuneTrainer

    set_seed(0)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "model")
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "model")
    draw = np.random.default_rng(0)
    for name, label in ((f"{place}.png", "ab"[place % 2]) for place in range(24)):
        (tmp_path / label).mkdir(exist_ok=True)
        pixels = draw.integers(0, 128, (32, 32, 3)) + 96 * (label == "b")
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / label / name)
    lines = [f"{file},{file.parent.name}" for file in sorted(tmp_path.glob("[ab]/*.png"))]
    (tmp_path / "train.csv").write_text("\n".join(["image,label", *lines[:8], *lines[12:20]]) + "\n")
    (tmp_path / "validation.csv").write_text("\n".join(["image,label", *lines[8:12], *lines[20:]]) + "\n")
    made = {
        "task": {"kind": "image_classification", "image": "image", "label": "label"},
        "model": {"name": str(tmp_path / "model")},
        "data": {split: str(tmp_path / f"{split}.csv") for split in ("train", "validation")},
        "adapter": adapter,
        "training": {"steps": 6, "batch_size": 8, "learning_rate": 3e-2, "precision": "fp32", "log_every": 1}
        | {"eval_every": 1, "best_metric": "loss"},
        "checkpoints": {"every": 2},
        "tracking": {"images": False, "report": False},
    }
    whole = train({**made, "output": str(tmp_path / "whole")})
    best = min(line["loss"] for line in whole.history if line["phase"] == "eval")
    assert whole.metrics["validation"]["loss"] == pytest.approx(best, rel=1e-5)
    assert whole.evaluate(split="validation")["metrics"]["loss"]["value"] == pytest.approx(best, rel=1e-5)

    step = FinetuneTrainer.training_step

    def stopping(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments, **options)

    monkeypatch.setattr(FinetuneTrainer, "training_step", stopping)
    with pytest.raises(Stopped):
        train({**made, "output": str(tmp_path / "stopped")})
    monkeypatch.undo()
    resumed = train({**made, "output": str(tmp_path / "stopped")})
    weights = [next(run.adapter.glob("*.safetensors")).read_bytes() for run in (whole, resumed)]
    assert weights[0] == weights[1]
