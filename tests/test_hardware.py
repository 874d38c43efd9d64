"""What the machine is asked to do."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from models import recipe

from hf_finetune import device
from hf_finetune.adapters.lora import Lora
from hf_finetune.device import Machine
from hf_finetune.errors import RecipeError

if TYPE_CHECKING:
    from conftest import Run


def test_cores_follow_the_affinity() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert device.cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)


def test_an_asked_precision_is_used_on_a_cpu() -> None:
    for asked, chosen in [("fp32", "fp32"), ("bf16", "bf16")]:
        assert device._precision(asked, "cpu") == chosen


def test_automatic_precision_on_a_cpu_needs_native_bf16() -> None:
    assert device._precision("auto", "cpu") == ("bf16" if device.cpu_has_bf16() else "fp32")


def test_fp16_on_a_cpu_is_an_error() -> None:
    made = recipe("any", {"kind": "lora"})
    made = made.model_copy(update={"training": made.training.model_copy(update={"precision": "fp16"})})
    machine = device.alone(made)
    assert machine.precision in ("bf16", "fp32")
    with pytest.raises(RecipeError, match=r"training\.precision: fp16 needs a CUDA device"):
        device.check(made, machine)


def test_a_rank_without_a_row_is_an_error() -> None:
    machine = device.Machine("cpu", 0, 0, 8, 8, 1, "fp32", "eager")
    with pytest.raises(RecipeError, match=r"training\.batch_size: 4 rows are fewer than the 8 ranks"):
        device.check(recipe("any", {"kind": "lora"}), machine)


def test_bf16_on_a_cpu_avoids_the_slow_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    for asked, precision, chosen in [("auto", "bf16", "eager"), ("auto", "fp32", "sdpa"), ("sdpa", "bf16", "sdpa")]:
        made = recipe("any", {"kind": "lora"}, attention=asked)
        training = made.training.model_copy(update={"precision": precision})
        assert device.alone(made.model_copy(update={"training": training})).attention == chosen


def test_frozen_weights_are_kept_in_the_dtype_of_the_arithmetic() -> None:
    machine = device.Machine("cpu", 0, 0, 1, 1, 1, "bf16", "eager")
    assert machine.base_dtype(frozen=True) == torch.bfloat16
    assert machine.base_dtype(frozen=False) == torch.float32


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP needs a launcher"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, "DeepSpeed needs GPUs"),
    ],
)
def test_dividing_where_it_would_not_happen_is_refused(
    environment: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Run]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RecipeError, match=says):
        run()


def test_adafactor_is_refused_with_fsdp(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Run]) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(RecipeError, match=r"training\.optimizer: adafactor does not update sharded weights"):
        run("training.optimizer=adafactor")


def test_a_model_lies_on_its_device_before_anything_is_computed_with_it(
    run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    places: list[torch.device] = []
    plain = Lora.apply

    def note(adapter: Lora, model: Any, setting: Any) -> Any:
        places.append(model.device)
        return plain(adapter, model, setting)

    monkeypatch.setattr(Lora, "apply", note)
    # The meta device stands for a GPU: nothing there has a value, so the run fails as soon as it computes one.
    monkeypatch.setattr(Machine, "place", torch.device("meta"))
    with pytest.raises(Exception, match="meta"):
        run("training.steps=1")
    assert places == [torch.device("meta")]


def test_attention_takes_deterministic_kernels_and_nothing_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn import functional

    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(functional, "scaled_dot_product_attention", functional.scaled_dot_product_attention)
    plain, seen = functional.scaled_dot_product_attention, []
    query = torch.randn(1, 2, 8, 4, requires_grad=True)
    (expected,) = torch.autograd.grad(plain(query, query, query, is_causal=True).sum(), query)
    try:
        device.enforce_determinism()
        assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        out = functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        made: Any = out.grad_fn
        made.register_prehook(lambda _: seen.append(torch.is_deterministic_algorithms_warn_only_enabled()))
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        (gradient,) = torch.autograd.grad(out.sum(), query)
        assert seen == [False], "an error within, which makes torch take the deterministic kernel"
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.equal(gradient, expected)
    finally:
        torch.use_deterministic_algorithms(mode=False)
        torch.backends.cudnn.deterministic = False
