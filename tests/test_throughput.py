"""Rates, parts of a step, and FLOPs: against clocks of the test's own, and torch's count of operations."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import models
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hf_finetune.models.pretrained import load_tokenizer
from hf_finetune.tracking.throughput import DATA, FORWARD, PARTS, Flops, StepTimes, Tally, matmul_peak

if TYPE_CHECKING:
    from conftest import Run


def test_each_part_of_a_step_gets_its_time() -> None:
    times, began = StepTimes("cpu"), time.perf_counter()
    for _ in range(2):
        with times.part(DATA):
            time.sleep(0.01)
        for _ in range(2):
            with times.micro_batch():
                with times.part(FORWARD):
                    time.sleep(0.02)
                time.sleep(0.03)
        time.sleep(0.04)
        times.optimizer_stepped()
    took, found = time.perf_counter() - began, times.means(2)
    wanted = {"seconds_data": 0.01, "seconds_forward": 0.04, "seconds_backward": 0.06, "seconds_optimizer": 0.04}
    # On a busy machine a sleep may last longer, but never less: no part has the time of another.
    assert found.keys() == wanted.keys()
    assert all(found[name] >= least for name, least in wanted.items())
    assert 0.9 * took <= 2 * sum(found.values()) <= took
    assert times.means(1) == dict.fromkeys(wanted, 0.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_timed_by_its_own_clock_without_waiting() -> None:
    times, big = StepTimes("cuda"), torch.randn(8192, 8192, device="cuda")
    torch.cuda.synchronize()
    began = time.perf_counter()
    with times.micro_batch():
        with times.part(FORWARD):
            for _ in range(20):
                big @ big
        big @ big
    launched = time.perf_counter() - began
    torch.cuda.synchronize()
    whole, found = time.perf_counter() - began, times.means(1)
    assert launched < whole / 2
    assert found["seconds_forward"] == pytest.approx(whole * 20 / 21, rel=0.2)


def test_every_log_has_the_parts_and_they_fit_into_the_step(run: Callable[..., Run]) -> None:
    for line in run("training.micro_batch=4", "training.log_every=3", "training.max_grad_norm=0.5").lines("train"):
        parts = [line[f"seconds_{name}"] for name in PARTS]
        assert all(part > 0 for part in parts)
        assert sum(parts) <= line["seconds_step"] * 1.01
        assert 0 < line["matmul_share"] < 1
        assert line["memory"] > 1e8
        assert line["grad_norm_clipped"] == min(line["grad_norm"], 0.5)


def test_the_summary_says_what_the_machine_can_do(run: Callable[..., Run]) -> None:
    done = run("training.max_grad_norm=null", "training.eval_every=epoch")
    summary = done.lines("summary")[0]
    assert summary["matmul_peak"] > 1e9
    shares = [line["matmul_share"] for line in done.lines("train")]
    assert min(shares) <= summary["matmul_share"] <= max(shares)
    assert not any("grad_norm_clipped" in line for line in done.lines("train"))


def test_an_evaluation_at_the_end_of_an_epoch_is_no_training_time(run: Callable[..., Run], monkeypatch: Any) -> None:
    from hf_finetune.training.trainer import FinetuneTrainer

    original = FinetuneTrainer.prediction_step

    def slow(self: Any, *arguments: Any, **options: Any) -> Any:
        time.sleep(1)
        return original(self, *arguments, **options)

    monkeypatch.setattr(FinetuneTrainer, "prediction_step", slow)
    lines = run("training.epochs=2", "training.eval_every=epoch").lines("train")
    assert max(line["seconds_step"] for line in lines[1:]) < 0.9


@pytest.mark.parametrize(("kind", "name"), [("lora", "tiny_llama"), ("full", "tiny_bert")])
def test_flops_are_those_that_torch_counts(kind: str, name: str, request: pytest.FixtureRequest) -> None:
    adapter: dict[str, Any] = {
        "lora": {"kind": "lora", "r": 4, "alpha": 8, "target_modules": "all-linear"},
        "full": {"kind": "full"},
    }
    task = models.LANGUAGE_MODEL if name == "tiny_llama" else models.CLASSIFIER
    recipe = models.recipe(request.getfixturevalue(name), adapter[kind], task, attention="eager")
    adapted = models.build(recipe)
    ids = torch.ones(3, 24, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().sum().backward()
    counted = counter.get_total_flops()
    # torch leaves out, as nobody needs it, the gradient of what enters the lowest layer.
    assert Flops.of(adapted).training(ids.numel(), 3, 3 * 24**2) == pytest.approx(counted, rel=0.13)


def test_flops_follow_the_formula() -> None:
    flops = Flops(token=1000, token_trained=100, row=50, row_trained=50, attention=8)
    assert flops.training(10, 2, 30) == 10 * (4000 + 200) + 2 * (200 + 100) + 3 * 8 * 30
    share = Tally(rows=2, tokens=10, squares=30, seconds=0.5).matmul_share(flops, 1e6)
    assert share == {"matmul_share": pytest.approx(43_320 / 5e5)}
    assert Tally().matmul_share(flops, 1e6) == {}


def test_measuring_the_machine_draws_no_random_number() -> None:
    state = torch.random.get_rng_state()
    assert 1e8 < matmul_peak(models.machine()) < 1e14
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_loader_counts_tokens_and_squares_of_documents_packed_or_not(tmp_path: Path, tiny_llama: str) -> None:
    from hf_finetune.data.batches import Division, GlobalBatches, PackedRows, Rows, train_loader
    from hf_finetune.tasks.base import State
    from hf_finetune.tasks.causal_lm import CausalLM

    task, lengths = CausalLM(kind="causal_lm", text="text"), [2, 3, 5]
    encoded = [{"input_ids": [7] * n, "labels": [7] * n, "size": n} for n in lengths]
    rows = Rows(_Columns(encoded), task)
    tokenizer = load_tokenizer(models.recipe(tiny_llama, {"kind": "full"}, models.LANGUAGE_MODEL).model)
    collate = partial(task.collate, processor=tokenizer, state=State())
    packed = PackedRows(rows, [[0, 1, 2]])
    for data, batches, collator in (
        (rows, GlobalBatches(lengths, Division(3, 3), 0), collate),
        (packed, GlobalBatches([10], Division(1, 1), 0), collate),
    ):
        (batch,) = train_loader(data, batches, collator, pin=False)
        assert (int(batch["tokens"]), int(batch["squares"]), int(batch["rows"])) == (
            10,
            4 + 9 + 25,
            len(batch["labels"]),
        )
        assert int(batch["slots"]) == batch["input_ids"].numel()


class _Columns(list[dict[str, Any]]):
    """Rows that can be asked for by a list of numbers, as a data set can."""

    def __getitem__(self, indices: Any) -> Any:
        chosen = [list.__getitem__(self, index) for index in indices]
        return {name: [row[name] for row in chosen] for name in chosen[0]}


def test_rates_survive_a_checkpoint_of_an_earlier_version() -> None:
    earlier = {"rows": 4.0, "tokens": 8.0, "slots": 10.0, "seconds": 2.0}
    assert Tally(**json.loads(json.dumps(earlier))).rates()["tokens_per_second"] == 4
