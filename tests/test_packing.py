"""Packed rows train on the same thing as their documents one by one, and models that mix documents are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    BloomConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    masking_utils,
    set_seed,
)

from hf_finetune.errors import ModelError
from hf_finetune.tasks._tokens import PACKED_ATTENTION, check_packing, packed, padded
from hf_finetune.tasks.base import IGNORE, State
from hf_finetune.tasks.causal_lm import CausalLM

TASK = CausalLM(text="text")
SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = {**SMALL, "sliding_window": 5, "head_dim": 8}
CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "mistral": lambda: MistralConfig(**SLIDING),
    "gemma2": lambda: Gemma2Config(**SLIDING),
    "gemma3": lambda: Gemma3TextConfig(**SLIDING, layer_types=["sliding_attention", "full_attention"]),
    "gpt2": lambda: GPT2Config(
        vocab_size=50,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        use_cache=False,
        attn_pdrop=0.0,
        embd_pdrop=0.0,
        resid_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
# transformers has no sdpa for Gemma 2: its scores are capped.
OFFERED = [(name, how) for name in CONFIGS for how in PACKED_ATTENTION if (name, how) != ("gemma2", "sdpa")]
DOCUMENTS = [
    {"input_ids": [(3 + 7 * n + length) % 50 for n in range(length)], "labels": []} for length in (9, 1, 12, 4, 17)
]
for document in DOCUMENTS:
    document["labels"] = [IGNORE, *document["input_ids"][1:]]
PACKS = [DOCUMENTS[:3], DOCUMENTS[3:4], DOCUMENTS[4:]]


def build(config: Any, attention: str) -> Any:
    set_seed(0)
    auto: Any = AutoModelForCausalLM
    return auto.from_config(config, attn_implementation=attention, dtype=torch.float32)


def loss_and_gradients(model: Any, batch: dict[str, torch.Tensor]) -> tuple[float, list[torch.Tensor]]:
    model.zero_grad()
    loss = TASK.loss(model, batch, State()).sum / TASK.count(batch, State())
    torch.autograd.backward(loss)
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


def test_packed_and_padded_loss_and_gradients_agree() -> None:
    for name, attention in OFFERED:
        model = build(CONFIGS[name](), attention)
        assert model.config._attn_implementation == attention
        padded_loss, padded_gradients = loss_and_gradients(model, padded(DOCUMENTS, 0))
        packed_loss, packed_gradients = loss_and_gradients(model, packed(PACKS, 0))
        assert packed_loss == pytest.approx(padded_loss, abs=1e-4)
        for one, other in zip(packed_gradients, padded_gradients, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_these_models_pass_the_check() -> None:
    for name, attention in OFFERED:
        model = build(CONFIGS[name](), attention).train()
        model.config.use_cache = True
        check_packing(model)
        assert model.training
        assert not model.config.use_cache


def test_the_check_passes_in_bf16() -> None:
    check_packing(build(CONFIGS["llama"](), "sdpa").to(torch.bfloat16))


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=4),
        MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, state_size=4),
    ],
    ids=["alibi", "state space"],
)
def test_models_that_ignore_position_ids_are_refused(config: Any) -> None:
    with pytest.raises(ModelError, match=r"position ids.*data\.packing: false"):
        check_packing(build(config, "eager"))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_a_model_that_sees_no_documents_is_refused(dtype: torch.dtype) -> None:
    model = build(CONFIGS["llama"](), "sdpa").to(dtype)
    for layer in model.model.layers:  # so little is seen that in bf16 it could pass for rounding
        layer.self_attn.o_proj.weight.data.mul_(0.1)
    forward = model.forward
    model.forward = lambda input_ids, position_ids: forward(
        input_ids=input_ids, attention_mask=torch.ones_like(input_ids), position_ids=position_ids
    )
    with pytest.raises(ModelError, match="see each other"):
        check_packing(model)


def test_a_model_that_does_not_restart_positions_is_refused() -> None:
    model = build(CONFIGS["gpt2"](), "sdpa")
    model.transformer.wpe.weight.data.mul_(50)
    embed = model.transformer.wpe.forward
    model.transformer.wpe.forward = lambda position_ids: embed(torch.arange(position_ids.shape[1])[None])
    with pytest.raises(ModelError, match="ignores position ids"):
        check_packing(model)


def test_a_packed_row_restarts_positions_and_never_predicts_across_documents() -> None:
    batch = packed([[{"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3], "labels": [3]}], PACKS[1]], 9)
    assert "attention_mask" not in batch
    assert batch["input_ids"].tolist()[0] == [1, 2, 3, 9]
    assert batch["position_ids"].tolist()[0] == [0, 1, 0, 0]
    assert batch["labels"].tolist()[0] == [IGNORE, 2, IGNORE, IGNORE]
    assert batch["position_ids"].tolist()[1] == [0, 1, 2, 3]


def test_padding_is_masked_and_not_trained() -> None:
    batch = padded([{"input_ids": [1], "labels": [1]}, {"input_ids": [2, 3], "labels": [2, 3]}], 9)
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 9], [2, 3]],
        "attention_mask": [[1, 0], [1, 1]],
        "labels": [[1, IGNORE], [2, 3]],
    }


def test_masked_rows_count_nothing_packed_or_not() -> None:
    assert TASK.count(padded([TASK.masked(DOCUMENTS[0])], 0), State()) == 0
    assert TASK.count(packed([TASK.masked(PACKS[0])], 0), State()) == 0
    assert DOCUMENTS[0]["labels"] != [IGNORE] * 9


@pytest.mark.parametrize("quantization", ["int8", "nf4"])
def test_quantised_models_pass_although_they_round(quantization: str, tmp_path: Path) -> None:
    network = quantised(quantization, tmp_path)
    with torch.no_grad():  # an outlier, which int8 keeps apart, for all tokens of a batch together
        for layer in network.model.layers:
            layer.input_layernorm.weight[3] *= 40
    check_packing(network)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_documents_that_see_each_other_are_noticed(
    quantization: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = build(CONFIGS["llama"](), "sdpa") if quantization is None else quantised(quantization, tmp_path)
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", torch.zeros_like)
    with pytest.raises(ModelError, match="packed rows would see each other"):
        check_packing(network)


def quantised(quantization: str, folder: Path) -> Any:
    """A small Llama with weights of 4 or 8 bits."""
    build(CONFIGS["llama"](), "sdpa").save_pretrained(folder)
    bits: Any = BitsAndBytesConfig
    config = bits(load_in_8bit=quantization == "int8", load_in_4bit=quantization == "nf4", bnb_4bit_quant_type="nf4")
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(folder, quantization_config=config, device_map={"": "cpu"})
