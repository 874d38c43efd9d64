from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from models import CLASSIFIER, FOUR, LANGUAGE_MODEL, TWO, batch, build, loaded, logits, machine, recipe, train

from hf_finetune.adapters.base import Setting
from hf_finetune.errors import ModelError, StorageError
from hf_finetune.inference import saving
from hf_finetune.models import load, pretrained
from hf_finetune.tasks.base import State

LORA = {"kind": "lora", "r": 4}
NO_LABELS = State()
REGRESSION = CLASSIFIER | {"problem": "regression"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], State]] = {
    "two_labels": ("bert", LORA | {"init": "pissa"}, CLASSIFIER, TWO),
    "four_labels": ("bert", LORA, CLASSIFIER, FOUR),
    "llama_classifier": ("llama", LORA, CLASSIFIER, FOUR),
    "causal_lm": ("llama", LORA | {"trainable_tokens": ["film"]}, LANGUAGE_MODEL, NO_LABELS),
    "number": ("bert", {"kind": "ia3"}, REGRESSION, State(names=("label",))),
    "pruned": ("bert", {"kind": "adalora"}, CLASSIFIER, TWO),
    "whole": ("bert", {"kind": "full"}, CLASSIFIER, FOUR),
}
SCRIPT = """
import json, re, sys, os, torch
def main(folders):
    for folder in folders:
        os.chdir(folder)
        scope = {}
        exec(re.search(r"```python\\n(.*?)```", open("README.md").read(), re.S).group(1), scope)
        with torch.no_grad():
            values = scope["model"](**torch.load("../batch.pt")).logits
        torch.save(values, "../logits.pt")
        json.dump({str(k): v for k, v in scope["model"].config.id2label.items()}, open("../labels.json", "w"))
    assert not any(name.startswith("hf_finetune") for name in sys.modules)
main(sys.argv[1:])
"""


def test_the_code_of_the_card_loads_the_same_model_without_this_project(
    tiny_bert: str, tiny_llama: str, tmp_path: Path
) -> None:
    expected = {}
    for name, (base, adapter, task, targets) in CASES.items():
        made = recipe({"bert": tiny_bert, "llama": tiny_llama}[base], adapter, task)
        adapted = build(made, targets)
        if name != "number":
            train(adapted, made)
        expected[name] = logits(adapted, made)
        tokenizer = pretrained.load_tokenizer(made.model)
        saving.save(adapted, made, targets, tokenizer, tmp_path / name / "adapter")
        inputs = batch(tokenizer)
        inputs.pop("labels")
        torch.save(inputs, tmp_path / name / "batch.pt")
    folders = [str(tmp_path / name / "adapter") for name in CASES]
    subprocess.run([sys.executable, "-c", SCRIPT, *folders], check=True, timeout=120, capture_output=True)
    for name, (_, _, _, targets) in CASES.items():
        actual = torch.load(tmp_path / name / "logits.pt")
        torch.testing.assert_close(actual.float(), expected[name], atol=1e-4, rtol=1e-4)
        labels = json.loads((tmp_path / name / "labels.json").read_text())
        if targets.names:
            assert tuple(labels.values()) == targets.names


def saved(tiny_bert: str, folder: Path, adapter: dict[str, Any] | None = None) -> tuple[Any, Any]:
    made = recipe(tiny_bert, adapter or LORA)
    adapted = build(made, FOUR)
    train(adapted, made)
    saving.save(adapted, made, FOUR, pretrained.load_tokenizer(made.model), folder)
    return made, adapted


def test_the_folder_holds_adapter_tokenizer_labels_and_card_and_nothing_else(tiny_bert: str, tmp_path: Path) -> None:
    saved(tiny_bert, tmp_path / "adapter")
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert files == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "labels.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert [file.name for file in tmp_path.iterdir()] == ["adapter"]


def test_labels_are_saved_for_programs(tiny_bert: str, tmp_path: Path) -> None:
    saved(tiny_bert, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "labels.json").read_text()) == {
        "id2label": {str(index): name for index, name in enumerate(FOUR.names)},
        "problem_type": "single_label_classification",
    }


def test_the_chat_template_is_saved(tiny_llama: str, tmp_path: Path) -> None:
    made = recipe(tiny_llama, LORA, LANGUAGE_MODEL)
    tokenizer = pretrained.load_tokenizer(made.model)
    saving.save(build(made, NO_LABELS), made, NO_LABELS, tokenizer, tmp_path / "a")
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "a").chat_template == tokenizer.chat_template
    assert not (tmp_path / "a" / "labels.json").exists()


def test_the_config_names_base_and_revision(tiny_bert: str, tmp_path: Path) -> None:
    plain, made = recipe(tiny_bert, LORA), recipe(tiny_bert, LORA, revision="main")
    base, tokenizer = loaded(plain), pretrained.load_tokenizer(plain.model)
    adapted = load.build(made, base, Setting("SEQ_CLS", tokenizer, 10, base.head_modules))
    saving.save(adapted, made, TWO, tokenizer, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (str(Path(tiny_bert).resolve()), "main")


def test_the_card_has_a_header_and_labels_that_cannot_break_it(tiny_bert: str, tmp_path: Path) -> None:
    saved(tiny_bert, tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "peft"
    assert header["pipeline_tag"] == "text-classification"
    assert tiny_bert not in str(header)
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 4 for line in table)
    assert "<b>" not in "".join(table)


@pytest.mark.parametrize("adapter", [LORA | {"init": "olora"}, {"kind": "full"}], ids=["olora", "full"])
def test_verify_finds_the_same_model_and_disturbs_nothing(adapter: Any, tiny_bert: str, tmp_path: Path) -> None:
    made, adapted = saved(tiny_bert, tmp_path / "a", adapter)
    inputs = batch(pretrained.load_tokenizer(made.model))
    adapted.train()
    adapted.get_submodule(next(name for name, _ in adapted.named_modules() if name)).eval()
    modes = [module.training for module in adapted.modules()]
    state = torch.get_rng_state()
    assert saving.verify(adapted, made, machine(), inputs, tmp_path / "a") < 1e-5
    assert [module.training for module in adapted.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("adapter", [LORA | {"init": "pissa"}, {"kind": "adalora"}])
def test_verify_accepts_bf16(adapter: Any, tiny_bert: str, tmp_path: Path) -> None:
    made = recipe(tiny_bert, adapter)
    adapted = build(made, precision="bf16")
    tokenizer = pretrained.load_tokenizer(made.model)
    saving.save(adapted, made, TWO, tokenizer, tmp_path / "a")
    saving.verify(adapted, made, machine("bf16"), batch(tokenizer), tmp_path / "a")


def test_verify_fails_on_other_weights(tiny_bert: str, tmp_path: Path) -> None:
    made, adapted = saved(tiny_bert, tmp_path / "a")
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_B" in name).add_(0.5)
    inputs = batch(pretrained.load_tokenizer(made.model))
    with pytest.raises(ModelError, match="does not load back to the trained model"):
        saving.verify(adapted, made, machine(), inputs, tmp_path / "a")


def test_verify_takes_equal_weights_for_equal_where_rounding_differs(
    tiny_bert: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, adapted = saved(tiny_bert, tmp_path / "a")
    inputs = batch(pretrained.load_tokenizer(made.model))
    monkeypatch.setattr(saving, "TOLERANCES", {"fp32": -1.0})  # as if the fast paths of a deep model had rounded
    assert saving.verify(adapted, made, machine(), inputs, tmp_path / "a") < 1e-5
    with torch.no_grad():
        next(p for name, p in adapted.named_parameters() if "lora_B" in name).add_(1e-3)
    with pytest.raises(ModelError, match="does not load back to the trained model"):
        saving.verify(adapted, made, machine(), inputs, tmp_path / "a")


def test_a_failed_save_leaves_the_earlier_folder(tiny_bert: str, tmp_path: Path, monkeypatch: Any) -> None:
    made, adapted = saved(tiny_bert, tmp_path / "a")
    before = (tmp_path / "a" / "adapter_model.safetensors").read_bytes()

    def no_space(*unused: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(made.adapter), "save", no_space)
    with pytest.raises(StorageError, match="No space left"):
        saving.save(adapted, made, FOUR, pretrained.load_tokenizer(made.model), tmp_path / "a")
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_verify_never_holds_two_models_on_the_device(tiny_bert: str, tmp_path: Path) -> None:
    made, adapted = saved(tiny_bert, tmp_path / "a")
    inputs = {name: value.to("cuda") for name, value in batch(pretrained.load_tokenizer(made.model)).items()}
    adapted.to("cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    saving.verify(adapted, made, replace(machine(), device="cuda"), inputs, tmp_path / "a")
    assert {parameter.device.type for parameter in adapted.parameters()} == {"cpu"}
    assert torch.cuda.max_memory_allocated() < 1.5 * before


def test_what_is_read_back_must_have_the_same_names_shapes_and_bits(tiny_bert: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    made, adapted = saved(tiny_bert, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    saving.compare(adapted, made, tmp_path / "a")
    right = load_file(file)
    name = min(right)
    values = right[name].flatten()
    near = torch.nextafter(values[:1], values[:1] + 1)
    wrong = [
        right | {name: torch.cat([near, values[1:]]).view_as(right[name])},
        right | {name: right[name].to(torch.bfloat16)},
        right | {"one.more": torch.ones(1)},
        {key: value for key, value in right.items() if key != name},
        {},
    ]
    for tensors in wrong:
        save_file(tensors, file)
        with pytest.raises(ModelError, match="does not hold the trained model"):
            saving.compare(adapted, made, tmp_path / "a")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match="can't be read back"):
        saving.compare(adapted, made, tmp_path / "a")
