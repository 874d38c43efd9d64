"""ONNX files: the same logits in onnxruntime, for batches of any size, and reported with their metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from hf_finetune import train
from hf_finetune.cli.main import main
from hf_finetune.errors import ModelError
from hf_finetune.inference import export, merge
from hf_finetune.inference.merge import Options

AUTO = {"classifier": "AutoModelForSequenceClassification", "chatter": "AutoModelForCausalLM"}


@pytest.fixture(scope="module", params=["classifier", pytest.param("chatter", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, merged and exported by the command; the language model in bf16."""
    run: Path = request.getfixturevalue(kind)
    place = tmp_path_factory.mktemp("onnx") / "m"
    dtype = {"classifier": "fp32", "chatter": "bf16"}[kind]
    main(["merge", str(run), "--to", str(place), "--onnx", "--dtype", dtype])
    return place


def test_onnxruntime_gives_the_logits_of_transformers_for_batches_of_any_size(kind: str, folder: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(folder / "onnx" / "model.onnx"))
    names = [one.name for one in session.get_inputs()]
    network = getattr(transformers, AUTO[kind]).from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    for rows, tokens in ((1, 1), (1, 30), (3, 17), (5, 2)):
        ids = torch.randint(5, 60, (rows, tokens), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, (tokens + 1) // 2 + 1 :] = 0
        batch = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        batch = {name: batch[name] for name in names}
        with torch.no_grad():
            expected = network(**batch).logits.numpy()
        actual = session.run(None, {name: value.numpy() for name, value in batch.items()})[0]
        real = mask.bool().numpy() if kind == "chatter" else slice(None)
        np.testing.assert_allclose(actual[real], expected[real], atol=1e-4)


def test_the_free_axes_have_names(kind: str, folder: Path) -> None:
    import onnx

    graph = onnx.load(folder / "onnx" / "model.onnx").graph
    for value in graph.input:
        assert [axis.dim_param for axis in value.type.tensor_type.shape.dim] == ["batch", "sequence"]
    (output,) = graph.output
    axes = [axis.dim_param or axis.dim_value for axis in output.type.tensor_type.shape.dim]
    assert (output.name, axes[0]) == ("logits", "batch")
    assert axes[1] == {"classifier": 2, "chatter": "sequence"}[kind]
    onnx.checker.check_model(str(folder / "onnx" / "model.onnx"))


def test_its_metric_is_reported(folder: Path) -> None:
    told = json.loads((folder / "export.json").read_text())
    assert told["metrics"]["onnx"].keys() == told["metrics"]["merged"].keys()
    assert abs(told["change"]["onnx"]["loss"]) < 1e-2
    (check,) = [check for check in told["checks"] if check["what"] == "onnx"]
    assert 0 <= check["difference"] < 1e-4
    assert {"onnx", "onnxruntime", "onnxscript"} <= set(told["packages"])


def test_a_file_that_gives_other_logits_is_refused(classifier: Path, tmp_path: Path, monkeypatch: Any) -> None:
    real = export.session

    def other(file: Path) -> Any:
        run = real(file)
        return lambda batch: run(batch) + 0.5

    monkeypatch.setattr(export, "session", other)
    with pytest.raises(ModelError, match="the ONNX file is not the merged model"):
        merge.merge(str(classifier), Options(to=str(tmp_path / "m"), onnx=True))
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_torch_cannot_export_is_told_in_one_line(
    classifier: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    def fails(self: Any, *values: torch.Tensor) -> torch.Tensor:
        return values[0] if values[0].sum() > 0 else values[1]  # depends on data

    monkeypatch.setattr(export._Positional, "forward", fails)
    with pytest.raises(ModelError, match=r"torch\.onnx can't export this model: .*leave --onnx out"):
        merge.merge(str(classifier), Options(to=str(tmp_path / "m"), onnx=True))
    assert list(tmp_path.iterdir()) == []


def test_images_are_inputs_of_any_number_and_the_processors_size(tiny_vit: str, tmp_path: Path) -> None:
    import onnx

    images = [Image.new("RGB", (24, 24), (20 * index, 0, 99)) for index in range(12)]
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    lines = [f"{tmp_path}/{index}.png,{'ab'[index % 2]}" for index in range(len(images))]
    (tmp_path / "rows.csv").write_text("\n".join(["image,label", *lines, ""]))
    recipe = {
        "task": {"kind": "image_classification", "image": "image", "label": "label"},
        "model": {"name": tiny_vit},
        "data": {"train": str(tmp_path / "rows.csv")},
        "adapter": {"kind": "lora", "r": 2},
        "training": {"steps": 1, "batch_size": 4, "learning_rate": 1e-3, "precision": "fp32"},
        "tracking": {"images": False, "report": False},
        "output": str(tmp_path / "run"),
    }
    told = train(recipe).merge(tmp_path / "m", onnx=True)
    file = tmp_path / "m" / "onnx" / "model.onnx"
    (value,) = onnx.load(file).graph.input
    assert [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim] == ["batch", 3, 32, 32]
    network = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "m").eval()
    for rows in (1, 5):
        pixels = torch.rand(rows, 3, 32, 32, generator=torch.Generator().manual_seed(rows))
        with torch.no_grad():
            expected = network(pixel_values=pixels).logits
        torch.testing.assert_close(export.session(file)({"pixel_values": pixels}), expected, atol=1e-4, rtol=1e-4)
    assert told.metrics["onnx"]["loss"] == pytest.approx(told.metrics["merged"]["loss"], abs=1e-4)
