"""Adapters that others saved with PEFT, and that go on training here."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hubserver import Repo, serving
from huggingface_hub import constants
from models import CLASSIFIER, LANGUAGE_MODEL, TWO, build, logits, recipe
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, set_seed

from hf_finetune import check, load_run, train
from hf_finetune.adapters._continued import find
from hf_finetune.errors import CheckpointError, Findings, ModelError
from hf_finetune.inference import merge
from hf_finetune.models import load, pretrained
from hf_finetune.run import lock
from hf_finetune.tasks.base import State

TARGETS = ["q_proj", "v_proj"]
CONFIGS: dict[str, Any] = {
    "lora": LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=4, target_modules=TARGETS, init_lora_weights="gaussian"),
    "dora_tokens": LoraConfig(r=2, use_dora=True, target_modules=TARGETS, trainable_token_indices=[5, 9]),
    "full_head": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=".*mlp.up_proj", modules_to_save=["lm_head"]),
    "some_layers": LoraConfig(r=2, target_modules=TARGETS, layers_to_transform=[1], use_rslora=True),
    "embeddings": LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "embed_tokens"]),
    "ia3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
}
LORA = {"kind": "lora"}


def saved(base: str, config: Any, folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Path:
    """An adapter with weights that do something, as PEFT saves it."""
    set_seed(3)
    adapted: Any = get_peft_model(auto.from_pretrained(base, **options), config)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    adapted.save_pretrained(str(folder))
    return folder


def classifying(base: str, folder: Path) -> Path:
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"])
    return saved(base, config, folder, AutoModelForSequenceClassification, num_labels=2)


def told(name: str, adapter: dict[str, Any], task: dict[str, Any] = CLASSIFIER, labels: State = TWO) -> list[str]:
    """What is said of a model and an adapter before weights load."""
    made, findings = recipe(name, adapter, task), Findings()
    load.examine(made, labels, pretrained.load_tokenizer(made.model), findings)
    return [f"{finding.level} {finding.problem}" for finding in findings]


@pytest.mark.parametrize("name", CONFIGS)
def test_training_begins_with_the_very_model_that_peft_loads(name: str, tiny_llama: str, tmp_path: Path) -> None:
    folder = saved(tiny_llama, CONFIGS[name], tmp_path / "theirs")
    kind = "ia3" if name == "ia3" else "lora"
    made = recipe(tiny_llama, {"kind": kind, "from": str(folder)}, LANGUAGE_MODEL)
    found = told(tiny_llama, {"kind": kind, "from": str(folder)}, LANGUAGE_MODEL)
    assert [line for line in found if line.startswith("error")] == []
    base: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager")
    plain = logits(base, made)
    theirs = logits(PeftModel.from_pretrained(base, str(folder)), made)
    ours = build(made, State())
    assert torch.equal(logits(ours, made), theirs)
    assert not torch.equal(theirs, plain)
    made.adapter.save(ours, str(tmp_path / "ours"))
    before, after = (load_peft_weights(str(place), device="cpu") for place in (folder, tmp_path / "ours"))
    assert after.keys() == {key for key in before if not key.endswith("base_layer.weight")}
    assert all(torch.equal(before[key], after[key]) for key in after)


def test_a_head_goes_on_under_the_labels_that_fit(tiny_bert: str, tmp_path: Path) -> None:
    folder = classifying(tiny_bert, tmp_path)
    adapter = LORA | {"from": str(folder)}
    (line,) = told(tiny_bert, adapter)
    assert "does not say which labels its head has; they are taken as 0 negative, 1 positive" in line
    (line,) = told(tiny_bert, adapter, labels=State(names=("a", "b", "c")))
    assert "error" in line
    assert "has classifier.weight for 2 labels, this run has 3; train on rows with its labels" in line
    assert told(tiny_bert, adapter, labels=load.UNKNOWN) == [], "data that can't be read have no labels to compare"
    made = recipe(tiny_bert, adapter)
    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=2, attn_implementation="eager")
    assert torch.equal(logits(build(made), made), logits(PeftModel.from_pretrained(base, str(folder)), made))


def rewritten(**fields: Any) -> Callable[[Path], None]:
    """Change fields of an adapter's configuration."""

    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))

    return change


def reweighted(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Change an adapter's weights."""

    def write(folder: Path) -> None:
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file({name: value.clone() for name, value in tensors.items()}, folder / "adapter_model.safetensors")

    return write


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


EMBEDDING = "base_model.model.model.embed_tokens.weight"
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "adapter", "says"),
    [
        (
            pickled,
            {},
            ["has its weights only as adapter_model.bin, a format that can run code; load it"],
        ),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"x" * 99), {}, ["can't be read"]),
        (rewritten(peft_type="LOHA"), {}, ["holds a loha adapter; that can't go on training here; merge it"]),
        (rewritten(task_type="SEQ_CLS"), {}, ["was trained for SEQ_CLS, and this task is CAUSAL_LM"]),
        (
            rewritten(init_lora_weights="pissa", bias="all", peft_version="9.0", of_tomorrow=3),
            {},
            [
                "sets init_lora_weights 'pissa', which takes a part of the base away; save it where it was made with",
                "sets bias 'all': that can't go on training here; merge it",
                "sets of_tomorrow '3', which this version of PEFT does not know",
            ],
        ),
        (lambda folder: None, {"kind": "ia3"}, ["holds a lora adapter; set adapter.kind to lora"]),
        (lambda folder: None, {"revision": "main"}, ["belongs to an adapter on the Hub"]),
        (
            reweighted(lambda tensors: tensors.update({FIRST: torch.zeros(4, 8)})),
            {"r": 8, "alpha": 3.0},
            [
                "8 contradicts the adapter in `from`, which has 4; remove it",
                "3.0 contradicts the adapter in `from`, which has 4; remove it",
                "q_proj.lora_A.weight: 4 x 8, this model needs 4 x 32; name the base that it was trained on",
            ],
        ),
        (
            reweighted(lambda tensors: tensors.pop(FIRST)),
            {},
            ["lacks 1 weights that this model needs, e.g. model.layers.0"],
        ),
        (
            reweighted(lambda tensors: tensors.update({FIRST.replace(".0.", ".7."): tensors[FIRST]})),
            {},
            ["has 1 weights that this model has no place for, e.g. model.layers.7"],
        ),
        (rewritten(target_modules=["c_attn"]), {}, ["does not fit this model: PEFT refuses"]),
        (
            reweighted(lambda tensors: tensors.update({EMBEDDING: torch.zeros(999, 32)})),
            {},
            ["has a model.embed_tokens of 999 rows, the model of", "merge it into its base"],
        ),
    ],
)
def test_what_does_not_go_on_is_said_before_weights_load(
    change: Callable[[Path], None], adapter: dict[str, Any], says: list[str], tiny_llama: str, tmp_path: Path
) -> None:
    change(saved(tiny_llama, CONFIGS["lora"], tmp_path))
    found = [
        line for line in told(tiny_llama, LORA | {"from": str(tmp_path)} | adapter, LANGUAGE_MODEL) if "error" in line
    ]
    for text in says:
        assert any(text in line for line in found), found
    assert len(found) == len([text for text in says if not text.startswith("merge")]), found


def test_another_name_of_the_base_is_told_and_embeddings_of_another_base_are_refused(
    tiny_llama: str, tmp_path: Path
) -> None:
    folder = saved(tiny_llama, CONFIGS["lora"], tmp_path / "theirs")
    moved = str(shutil.copytree(tiny_llama, tmp_path / "moved"))
    (line,) = told(moved, LORA | {"from": str(folder)}, LANGUAGE_MODEL)
    assert line.startswith("warning")
    assert f"was trained on {tiny_llama}, which has another name than {moved}" in line
    base = load_file(Path(tiny_llama) / "model.safetensors")["model.embed_tokens.weight"]
    made = recipe(tiny_llama, LORA | {"from": str(folder)}, LANGUAGE_MODEL)
    reweighted(lambda tensors: tensors.update({EMBEDDING: base}))(folder)
    build(made, State())
    reweighted(lambda tensors: tensors.update({EMBEDDING: base + 1}))(folder)
    with pytest.raises(ModelError, match=r"has another model\.embed_tokens than the base, and does not train it"):
        build(made, State())


@pytest.fixture
def repo(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_llama: str) -> Any:
    """An adapter on a Hub; yields the repository and the Hub."""
    folder = saved(tiny_llama, CONFIGS["lora"], tmp_path / "theirs")
    with serving("none") as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        made = hub.repos["them/chat-lora"] = Repo(private=False)
        weights = (folder / "adapter_model.safetensors").read_bytes()
        hub.large[hashlib.sha256(weights).hexdigest()] = weights
        made.commit({file.name: file.read_bytes() for file in folder.iterdir()}, "first", "main")
        yield made, hub


PAIRS = [
    {"prompt": f"what is {a} ?", "chosen": f"{a} is fine .", "rejected": f"{b} {b} {b}"}
    for a, b in (
        ("one", "ten"),
        ("two", "nine"),
        ("three", "eight"),
        ("four", "one"),
        ("five", "two"),
        ("six", "seven"),
    )
]


def test_an_adapter_of_the_hub_is_the_reference_of_preferences_and_stays_the_one_that_it_was(
    repo: Any, tiny_llama: str, tmp_path: Path
) -> None:
    kept, hub = repo
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    made = {
        "task": {"kind": "preference", "prompt": "prompt", "chosen": "chosen", "rejected": "rejected"},
        "model": {"name": tiny_llama, "attention": "eager"},
        "data": {"train": str(tmp_path / "pairs.jsonl"), "validation_share": 0.3, "max_length": 64},
        "adapter": {"kind": "lora", "from": "them/chat-lora"},
        "training": {"steps": 2, "batch_size": 4, "learning_rate": 1e-9, "precision": "fp32"},
        "checkpoints": {"every": 1},
        "tracking": {"images": False},
        "output": str(tmp_path / "run"),
    }  # fmt: skip
    commit = str(kept.at("main"))
    found = check(made)
    assert found.ok, found
    pin = f"commit {commit} (not pinned; adapter.revision: {commit} keeps it)"
    assert found.plan["adapter"] == f"goes on from them/chat-lora, {pin}, r 4, alpha 4, trained on {tiny_llama}"
    run = train(made)
    locked = lock.read(str(tmp_path / "run" / "run.lock.json")).adapter
    assert locked == lock.Input(source="them/chat-lora", commit=commit)
    card = (run.adapter / "README.md").read_text()
    assert f"went on from [them/chat-lora](https://huggingface.co/them/chat-lora) at revision `{commit}`" in card
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first = next(row for row in rows if row["phase"] == "eval")
    assert first["margin"] == pytest.approx(0, abs=1e-4), "the reference is the adapter, not the base"
    # A finished run knows its commit, whatever the branch has now.
    kept.commit(hub.files("them/chat-lora") | {"README.md": b"moved on"}, "second", "main")
    found_again = load_run(tmp_path / "run").evaluate(split="validation")["metrics"]
    assert found_again["loss"]["value"] == pytest.approx(run.metrics["validation"]["loss"], rel=1e-4)
    merge.merge(str(tmp_path / "run"), merge.Options(to=str(tmp_path / "merged")))
    with pytest.raises(CheckpointError, match="the adapter that goes on training changed since the run began"):
        train(made, ["training.steps=4"], allow_change=["training.steps"])
    assert hub.asked("chat-lora")


def test_a_repository_without_an_adapter_or_with_a_pickled_one_is_refused(repo: Any, tiny_llama: str) -> None:
    _, hub = repo
    hub.repos["them/model"] = Repo(private=False)
    hub.repos["them/model"].commit({"config.json": b"{}"}, "first", "main")
    config = hub.files("them/chat-lora")["adapter_config.json"]
    hub.repos["them/old"] = Repo(private=False)
    hub.repos["them/old"].commit({"adapter_config.json": config, "adapter_model.bin": b"x"}, "first", "main")
    for name, text in (
        ("them/model", "has no adapter_config.json, so it is no adapter of PEFT; a whole model goes into model.name"),
        ("them/old", "has its weights only as adapter_model.bin, a format that can run code"),
        ("them/none", "there is no such folder, and of the Hub:"),
    ):
        (line,) = told(tiny_llama, LORA | {"from": name}, LANGUAGE_MODEL)
        assert text in line


def test_without_a_network_an_adapter_of_the_cache_goes_on(
    repo: Any, tiny_llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = find("them/chat-lora")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert find("them/chat-lora", asks=True) == folder
    assert told(tiny_llama, LORA | {"from": "them/chat-lora"}, LANGUAGE_MODEL) == []
    (line,) = told(tiny_llama, LORA | {"from": "them/unknown"}, LANGUAGE_MODEL)
    assert "them/unknown can't be loaded" in line
