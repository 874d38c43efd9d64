"""fp16: its loss scaler leaves steps out; the run counts them, goes on where that helps, and ends where it does not.

accelerate makes a scaler on accelerators alone. torch has one for CPUs too: put in its place, the run is autocast to
fp16 and scaled as on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from test_resume import facts, interrupted, stop_at

from hf_finetune import device as device_module
from hf_finetune.errors import DivergedError
from hf_finetune.pipeline import train
from hf_finetune.training.trainer import FinetuneTrainer

if TYPE_CHECKING:
    from conftest import Run

__all__ = ["stop_at"]

Runner = Callable[..., "Run"]
FP16 = ("training.precision=fp16", "training.steps=12", "training.micro_batch=16")
HIGH = 2.0**22
"""A first scale with which gradients overflow at a few steps, whatever the model."""


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets a CPU train in fp16, from a first scale."""

    def start(scale: float) -> None:
        original = FinetuneTrainer.create_accelerator_and_postprocess

        def create(trainer: Any) -> None:
            original(trainer)
            trainer.accelerator.native_amp = True
            trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)

        monkeypatch.setattr(FinetuneTrainer, "create_accelerator_and_postprocess", create)
        monkeypatch.setattr(device_module, "_precision", lambda asked, device: asked)
        # A large product takes a CPU half a minute in fp16, and is made for nothing but a share in the report.
        monkeypatch.setattr(train, "matmul_peak", lambda machine: 1e9)

    return start


def test_steps_that_overflow_are_counted_and_the_run_goes_on(run: Runner, scaled: Any, tmp_path: Path) -> None:
    scaled(HIGH)
    done = run(*FP16, "tracking.images=false")
    lost = [line.get("steps_not_taken", 0) for line in done.lines("train")]
    assert lost[:2] == [1, 2]
    assert 2 <= lost[-1] < 12
    assert done.lines("train")[0]["loss_scale"] == HIGH / 2
    taken = 12 - lost[-1]
    rates = [line["learning_rate"] for line in done.lines("train")]
    assert len(set(rates)) == taken, "the schedule waits for steps that are taken"
    assert done.lines("summary")[0]["steps_not_taken"] == done.outcome.not_taken == lost[-1]
    for report in ("report.html", "report.md"):
        assert f"{lost[-1]} were not taken" in (tmp_path / "run" / report).read_text()


def test_a_run_whose_gradients_overflow_at_any_scale_diverges(
    run: Runner, scaled: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled(2.0**4)
    overflowing(monkeypatch)
    with pytest.raises(DivergedError, match=r"training.precision: gradients overflow in fp16: 5 steps in a row until"):
        run(*FP16)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["steps_not_taken"], last["loss_scale"]) == (5, 5, 1.0)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 6)
    assert not (tmp_path / "run" / "adapter").exists()


def test_a_run_that_is_too_short_for_one_step_is_not_done(
    run: Runner, scaled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled(HIGH)
    overflowing(monkeypatch)
    with pytest.raises(DivergedError, match="not finite at any of the 12 steps: nothing was trained"):
        run(*FP16)


def overflowing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients that are infinite in the backward pass, of a loss that is finite."""
    original = FinetuneTrainer.compute_loss

    def infinite(*arguments: Any, **options: Any) -> Any:
        found = original(*arguments, **options)
        if torch.is_tensor(found) and found.requires_grad:
            loss: Any = found  # torch leaves this method untyped
            loss.register_hook(lambda gradient: gradient * float("inf"))
        return found

    monkeypatch.setattr(FinetuneTrainer, "compute_loss", infinite)


def test_a_loss_that_is_not_finite_is_no_matter_of_the_scale(
    run: Runner, scaled: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from test_resume import poisoned

    scaled(2.0**10)
    poisoned(monkeypatch, {3})
    with pytest.raises(DivergedError, match="not finite at step 3"):
        run(*FP16)


@pytest.mark.slow
def test_a_stopped_run_goes_on_with_its_scale(run: Runner, scaled: Any, stop_at: Any, tmp_path: Path) -> None:
    scaled(HIGH)
    run(*FP16)
    whole = facts(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "whole")
    interrupted(run, stop_at, 4, *FP16)
    assert facts(tmp_path / "run") == whole


def test_every_disk_has_the_scale(run: Runner, scaled: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The first rank of a node with a disk of its own writes; the Trainer would have rank 0 of the run alone save."""
    from transformers import TrainingArguments

    scaled(2.0**10)
    monkeypatch.setattr(TrainingArguments, "should_save", False)
    run(*FP16, "checkpoints.every=6")
    for step in (6, 12):
        assert (tmp_path / "run" / "checkpoints" / f"checkpoint-{step}" / "scaler.pt").is_file()


def test_adalora_prunes_though_steps_overflow(run: Runner, scaled: Any) -> None:
    scaled(HIGH)
    adapter = "adapter={kind: adalora, init_r: 4, target_r: 2, interval: 2, warmup_share: 0.1, final_share: 0.2}"
    done = run(*FP16, "training.steps=24", adapter)
    assert 2 <= done.outcome.not_taken < 15
    config = json.loads((done.folder / "adapter" / "adapter_config.json").read_text())
    ranks = [sum(left) for left in config["rank_pattern"].values()]
    assert sum(ranks) == 2 * len(ranks)
