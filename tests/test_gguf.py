"""GGUF files as base models: what is unpacked is the model that was packed, and it trains, predicts and merges."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CHATML, save_llama
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from hf_finetune import check, predict, train

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
gguf = pytest.importorskip("gguf")
ROWS = "\n".join(json.dumps({"prompt": "one plus two", "completion": "equals three"}) for _ in range(16))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama whose tokens are bytes, with words that merge two of them."""
    folder = tmp_path_factory.mktemp("plain")
    letters = sorted(ByteLevel.alphabet())
    vocabulary = {word: number for number, word in enumerate([*SPECIAL, *letters, "on", "re"])}
    tokenizer = Tokenizer(BPE(vocabulary, [("o", "n"), ("r", "e")]))
    tokenizer.pre_tokenizer, tokenizer.decoder = ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    made = fast(tokenizer_object=tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2])
    made.chat_template = CHATML
    made.save_pretrained(folder)
    save_llama(folder, len(vocabulary))
    return folder


def packed(folder: Path, file: Path, *, without: str = "") -> Path:
    """Write it as llama.cpp's converter does, without one of its tensors."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    model_of = json.loads((folder / "tokenizer.json").read_text())["model"]
    config = model.config
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    words = sorted(model_of["vocab"], key=model_of["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL if word in SPECIAL else gguf.TokenType.NORMAL for word in words])
    writer.add_token_merges([" ".join(merge) for merge in model_of["merges"]])
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    writer.add_chat_template(CHATML)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name in ("lm_head.weight", without):
            continue  # it is the embedding
        values = tensor.float().numpy()
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name:  # llama.cpp turns pairs of neighbours, transformers halves
                split = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
                values = split.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_FINETUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "train.jsonl").write_text(ROWS)
    return tmp_path


def recipe(model: str) -> dict[str, Any]:
    return {
        "task": {"kind": "causal_lm", "prompt": "prompt", "completion": "completion"},
        "model": {"name": model},
        "data": {"train": "train.jsonl", "max_length": 64},
        "training": {"steps": 2, "batch_size": 4, "precision": "fp32", "learning_rate": 1e-3},
        "tracking": {"images": False, "tensorboard": False},
        "output": "run",
    }


def test_what_is_unpacked_is_what_was_packed_and_trains(here: Path, plain: Path) -> None:
    file = packed(plain, here / "tiny.gguf")
    found = check(recipe("tiny.gguf"))
    assert found.ok, str(found)
    (folder,) = (place for place in (here / "cache/models").iterdir() if place.is_dir())
    assert f"unpacked to fp32 in {folder}" in found.plan["model"]
    made = json.loads((folder / "gguf.json").read_text())
    assert made["file"] == "tiny.gguf"
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    before = (folder / "model.safetensors").stat().st_mtime_ns
    tokenizers = [AutoTokenizer.from_pretrained(place) for place in (plain, folder)]
    assert tokenizers[0]("one more <|im_end|>").input_ids == tokenizers[1]("one more <|im_end|>").input_ids
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        packed_one, unpacked = (
            AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)(ids).logits for place in (plain, folder)
        )
    assert torch.allclose(packed_one, unpacked, atol=1e-5)
    run = train(recipe("tiny.gguf"))
    assert (folder / "model.safetensors").stat().st_mtime_ns == before, "it is unpacked once"
    config = json.loads((run.folder / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder)
    lock = json.loads((run.folder / "run.lock.json").read_text())
    assert [entry["name"] for entry in lock["model"]["files"]] == ["tiny.gguf"]
    answers = list(predict("run", rows=[{"prompt": "one plus two"}]))
    assert answers
    merged = here / "merged"
    subprocess.run([sys.executable, "-m", "hf_finetune", "merge", "run", "--to", str(merged)], check=True)
    assert AutoModelForCausalLM.from_pretrained(merged).num_parameters() > 0
    file.rename(here / "moved.gguf")
    assert [problem.key for problem in check(recipe("tiny.gguf")).problems] == ["model.name"]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:4000]), "can't be loaded"),
        (lambda file: file.write_bytes(b"GGUF" + bytes(60)), "can't be loaded"),
        (lambda file: file.write_text("no model"), "can't be loaded"),
    ],
    ids=["cut off", "no content", "text"],
)
def test_what_is_no_whole_model_is_an_error_of_one_line(here: Path, plain: Path, spoil: Any, said: str) -> None:
    spoil(packed(plain, here / "tiny.gguf"))
    found = check(recipe("tiny.gguf"))
    assert found.exit_code == 4
    (problem,) = (problem for problem in found.problems if problem.key == "model.name")
    assert said in problem.message
    assert "\n" not in problem.message
    assert not [place for place in (here / "cache").rglob("*") if place.suffix == ".safetensors"]


def test_missing_weights_are_not_drawn(here: Path, plain: Path) -> None:
    packed(plain, here / "part.gguf", without="model.layers.1.mlp.up_proj.weight")
    (problem,) = check(recipe("part.gguf")).problems
    assert "lacks 1 weights, e.g. model.layers.1.mlp.up_proj.weight" in problem.message
