from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CLASSIFIER, LANGUAGE_MODEL, TWO, build, machine, recipe
from test_adapters import ADAPTERS

from hf_finetune.models import load, memory, pretrained
from hf_finetune.models.ledger import Ledger, fake
from hf_finetune.models.memory import Estimate
from hf_finetune.tasks.base import State

MB = 1 << 20
GPU = replace(machine("bf16"), device="cuda")


def estimate(made: Any, rows: int = 4, tokens: int = 16, **shapes: tuple[int, int]) -> Estimate:
    return on(machine(), made, (rows, tokens), **shapes)


def on(device: Any, made: Any, train: tuple[int, int], evaluated: tuple[int, int] = (0, 0)) -> Estimate:
    targets = TWO if made.task.peft_task == "SEQ_CLS" else State()
    return memory.estimate(
        made, targets, pretrained.load_tokenizer(made.model), machine=device, train=train, evaluated=evaluated
    )


@pytest.mark.parametrize("name", ["lora", "dora", "pissa_modules_tokens", "adalora", "ia3", "full"])
def test_an_outline_has_the_parameters_of_the_real_model(name: str, tiny_bert: str) -> None:
    made = recipe(tiny_bert, ADAPTERS[name])
    outline = memory.outline(made, TWO, pretrained.load_tokenizer(made.model))
    assert load.parameter_counts(outline) == load.parameter_counts(build(made))
    assert {parameter.device.type for parameter in outline.parameters()} == {"meta"}


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_an_adapter_that_is_continued_is_outlined_by_its_config(kind: str, tiny_bert: str, tmp_path: Path) -> None:
    first = recipe(tiny_bert, ADAPTERS[kind])
    first.adapter.save(build(first), str(tmp_path / "adapter"))
    made = recipe(tiny_bert, {"kind": kind, "from": str(tmp_path)})
    counts = load.parameter_counts(build(made))
    outline = memory.outline(made, TWO, pretrained.load_tokenizer(made.model))
    assert load.parameter_counts(outline) == counts


def test_the_parts_add_up(tiny_llama: str) -> None:
    found = estimate(recipe(tiny_llama, {"kind": "full"}, LANGUAGE_MODEL))
    assert found.total == sum(found.parts.values())
    assert list(found.parts)[:2] == ["process and libraries", "weights"]


def test_more_rows_need_more_activations(tiny_llama: str) -> None:
    made = recipe(tiny_llama, ADAPTERS["lora"], LANGUAGE_MODEL)
    few, many = (on(GPU, made, (rows, 128)).parts for rows in (64, 256))
    assert 3.5 < many["activations"] / few["activations"] < 4.5


def test_checkpointing_saves_activations(tiny_llama: str) -> None:
    plain = recipe(tiny_llama, ADAPTERS["lora"], LANGUAGE_MODEL)
    frugal = replace(GPU, activation_checkpointing=True)
    needed = [on(device, plain, (256, 128)).parts["activations"] for device in (GPU, frugal)]
    assert needed[1] < 0.8 * needed[0]


def test_an_accelerator_holds_no_process_and_no_holes(tiny_llama: str) -> None:
    made = recipe(tiny_llama, ADAPTERS["lora"], LANGUAGE_MODEL)
    assert not {"process and libraries", "holes and kernels"} & on(GPU, made, (4, 128)).parts.keys()


@pytest.mark.parametrize("kind", ["multi_label", "regression"])
def test_every_problem_of_a_classifier_can_be_estimated(kind: str, tiny_bert: str) -> None:
    made = recipe(tiny_bert, ADAPTERS["lora"], CLASSIFIER | {"problem": kind})
    names = ("score",) if kind == "regression" else ("a", "b")
    tokenizer = pretrained.load_tokenizer(made.model)
    assert memory.estimate(made, State(names), tokenizer, machine=GPU, train=(4, 16)).parts["activations"]


def test_a_head_that_looks_for_the_ends_of_texts_gets_a_bound(tiny_t5: str) -> None:
    small, large = (
        estimate(recipe(tiny_t5, ADAPTERS["full"]), rows, evaluated=(rows, 16)).parts["a step at most"]
        for rows in (4, 64)
    )
    assert 0 < small < large


def test_ranks_exchange_gradients_in_a_copy(tiny_bert: str) -> None:
    made = recipe(tiny_bert, {"kind": "full"})
    adapted = build(made)
    two = memory.lasting_state(made, adapted, replace(machine(), world_size=2))
    assert two["gradients to exchange"] == 4 * load.parameter_counts(adapted)[0]


def test_sharded_weights_are_never_whole_on_an_accelerator_that_loads_them(tiny_llama: str) -> None:
    sharded = replace(GPU, world_size=8, is_sharded=True)
    shares = []
    for quantization in (None, "nf4"):
        made = recipe(tiny_llama, {"kind": "lora", "r": 4}, LANGUAGE_MODEL, quantization=quantization)
        outline = memory.outline(made, State(), pretrained.load_tokenizer(made.model))
        share, whole = (memory.loading_state(made, outline, device)["weights"] for device in (sharded, GPU))
        shares.append(share / whole)
    assert shares[0] < 0.3
    assert shares[1] == 1


def test_evaluation_can_be_the_peak(tiny_llama: str) -> None:
    made = recipe(tiny_llama, ADAPTERS["lora"], LANGUAGE_MODEL)
    assert on(GPU, made, (2, 16), evaluated=(512, 128)).peak == "evaluation"


def test_logits_have_an_account_of_their_own() -> None:
    ledger = Ledger(logits=7)
    with ledger:
        kept = torch.empty(2, 3, 7)
    assert ledger.peak == {"logits and loss": 4 * kept.numel()}


def test_adamw_keeps_two_fp32_moments_of_what_is_trained(tiny_bert: str) -> None:
    made = recipe(tiny_bert, {"kind": "full"})
    adapted = build(made)
    assert memory.lasting_state(made, adapted, machine())["optimiser state"] == 8 * load.parameter_counts(adapted)[0]


def test_nf4_takes_half_a_byte_and_scales_of_a_byte_for_64_weights() -> None:
    weight = torch.empty(4096, 4096, device="meta")
    blocks = 4096 * 4096 // 64
    assert memory.quantized_size(weight, "nf4") == 4096 * 4096 // 2 + blocks + 4 * (blocks // 256) + 4 * 272 + 4
    assert memory.quantized_size(weight, "int8") == 4096 * 4096 + 4 * 4096


def test_quantised_weights_are_those_of_the_body_only(tiny_llama: str) -> None:
    made = recipe(tiny_llama, ADAPTERS["lora"], LANGUAGE_MODEL, quantization="nf4")
    adapted = memory.outline(made, State(), pretrained.load_tokenizer(made.model))
    assert len(memory.quantized_layers(made, adapted)) == 2 * 7


def test_the_ledger_counts_what_lives_at_once() -> None:
    ledger = Ledger()
    with ledger:
        ledger.account = "tensors"
        first = torch.empty(1000)
        second = first * 2
        del first
        third = second.view(10, 100) + 1
    assert third.numel() == 1000
    assert ledger.peak == {"tensors": 2 * 4000}


def test_the_ledger_counts_what_torchs_own_tracker_counts(tiny_llama: str) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed._tools.mem_tracker import MemTracker
    from transformers import AutoModelForCausalLM

    made = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.device("meta"):
        network = type(made)(made.config)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        weights = fake(network, "cpu")

    def step() -> None:
        ids = torch.ones(4, 32, dtype=torch.long)
        network(input_ids=ids, labels=ids).loss.backward()
        network.zero_grad()

    ledger, tracker = Ledger(), MemTracker()
    ledger.ignore(weights)
    with mode, ledger:
        step()
    tracker.track_external(network)
    with mode, tracker:
        step()
    (found,) = tracker.get_tracker_snapshot("peak").values()
    resident = {id(w): w.untyped_storage().nbytes() for w in (*network.parameters(), *network.buffers())}
    assert sum(ledger.peak.values()) == found["Total"] - sum(resident.values())


def test_a_mask_is_taken_to_pick_everything() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), Ledger():
        picked = torch.empty(3, 4, 5)[torch.empty(3, 4, dtype=torch.bool)]
    assert picked.shape == (12, 5)


def test_the_peak_of_this_process_is_no_less_than_what_it_holds() -> None:
    assert (memory.peak("cpu") or 0) >= (memory.resident("VmRSS") or 0) > 50 * MB


@pytest.mark.slow
def test_the_peak_is_not_the_parents() -> None:
    block = torch.ones(100 * MB)
    code = "from hf_finetune.models import memory; print(memory.peak('cpu'))"
    child = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(child.stdout) < (memory.peak("cpu") or 0)
    assert block.numel()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="this C library keeps what it has")
def test_what_the_heap_holds_and_nobody_uses_is_given_back() -> None:
    # Each below what is mapped apart, with something small and lasting after it.
    blocks = [(torch.ones(2 * MB), torch.ones(1024)) for _ in range(32)]
    small = [keep for _, keep in blocks]
    before = memory.resident("VmRSS") or 0
    del blocks
    memory.give_back()
    assert before - (memory.resident("VmRSS") or 0) > 150 * MB
    assert len(small) == 32
