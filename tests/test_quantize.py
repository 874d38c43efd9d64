"""int8 and int4 folders: loaded by plain transformers, run, and reported with their metric."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hf_finetune.cli.main import main
from hf_finetune.errors import RecipeError
from hf_finetune.inference import export, merge, weights
from hf_finetune.inference.load import open_run
from hf_finetune.inference.merge import Options


@pytest.fixture(scope="module")
def folder(classifier: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier, merged and quantised by the command."""
    place = tmp_path_factory.mktemp("quantised") / "m"
    main(["merge", str(classifier), "--to", str(place), "--quantize", "int8"])
    return place


def test_the_int8_folder_is_loaded_by_transformers_and_its_metric_is_what_was_reported(
    classifier: Path, folder: Path
) -> None:
    network = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "int8").eval()
    told = json.loads((folder / "export.json").read_text())
    run = open_run(str(classifier))
    with weights.compared_rows(run, (), 1000) as (rows, _), torch.no_grad():
        right = total = 0
        for batch in run.batches(rows):
            labels = batch.pop("labels")
            batch.pop("row_ids")
            right += int((network(**batch).logits.argmax(-1) == labels).sum())
            total += len(labels)
    assert told["metrics"]["int8"]["accuracy"] == pytest.approx(right / total)
    before = told["metrics"]["adapter"]["accuracy"]
    assert told["change"]["int8"]["accuracy"] == pytest.approx(right / total - before)
    assert told["metrics"]["int8"]["loss"] != told["metrics"]["merged"]["loss"]  # it is another model
    assert "torchao" in told["packages"]


def test_linear_layers_are_int8_and_heads_are_not(folder: Path) -> None:
    network = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "int8")
    kinds = {name: type(parameter.data).__name__ for name, parameter in network.named_parameters()}
    assert kinds["bert.encoder.layer.0.attention.self.query.weight"] == "Int8Tensor"
    assert kinds["classifier.weight"] == "Tensor"
    bytes_of = {name: (folder / name / "model.safetensors").stat().st_size for name in ("", "int8")}
    assert bytes_of["int8"] < bytes_of[""]
    assert (folder / "int8" / "tokenizer.json").is_file()
    assert (folder / "int8" / "labels.json").is_file()


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_int4_is_refused_without_a_gpu_before_anything_loads(classifier: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--quantize int4: .* CUDA only, and this machine has cpu; .* write int8"):
        merge.merge(str(classifier), Options(to=str(tmp_path / "m"), quantize="int4"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_torchao_still_has_no_int4_weights_on_a_cpu() -> None:
    # When this fails, `export.check_kernels` may let int4 through.
    from torchao.quantization import Int4WeightOnlyConfig, quantize_

    for packing in ("plain", "plain_int32", "tile_packed_to_4d"):
        layer: Any = torch.nn.Sequential(torch.nn.Linear(128, 128, dtype=torch.bfloat16))
        config = Int4WeightOnlyConfig(group_size=32, int4_packing_format=packing)
        with pytest.raises((ImportError, NotImplementedError, AssertionError)):
            quantize_(layer, config)


def test_the_size_of_int4_groups_fits_every_row(folder: Path) -> None:
    network = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert export._config(network, "int4").group_size == 32
