"""A run that is stopped and goes on is, bit for bit, the run that was never stopped."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hf_finetune.errors import CheckpointError, DivergedError, Stopped

if TYPE_CHECKING:
    from conftest import Run

Runner = Callable[..., "Run"]
EXACT = ("step", "phase", "loss", "grad_norm", "learning_rate", "accuracy")
STEPS = ("training.steps=12", "model.dropout=0.1", "training.micro_batch=6", "training.eval_every=5")


STREAMED = (
    "data.streaming=true", "data.validation_share=null", "data.shuffle_buffer=16", "task.labels=[negative,positive]",
    "data.max_length=9", "data.overlong=drop", "data.workers=2", "training.eval_every=null",
)  # fmt: skip
"""Rows that are dropped, and micro-batches that two processes encode."""


RARER = (
    ("checkpoints.every=4", "training.log_every=5"),
    ("training.group_by_length=false", "training.schedule=cosine", "training.warmup_steps=3"),
    ("training.best_metric=loss", "training.early_stopping={patience: 1}", "training.eval_every=2"),
    ("training.best_metric=loss", "training.eval_every=2", "speed.cheap_dropout=false"),
)
"""Settings that `make test-slow` tries; `make test-faults` tries more."""


def facts(folder: Path) -> tuple[list[Any], str]:
    """Every number that does not depend on the clock, in full, and the hash of the adapter's weights."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = [[line.get(key) for key in EXACT] for line in lines if line["phase"] != "summary"]
    weights = next((folder / "adapter").glob("*.safetensors"))
    return kept, hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.fixture
def stop_at(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Sends a real signal to this process once a step is in metrics.jsonl."""
    ended = threading.Event()

    def arm(step: int, number: int = signal.SIGTERM) -> None:
        def watch() -> None:
            metrics = tmp_path / "run" / "metrics.jsonl"
            while not ended.is_set():
                if metrics.exists() and f'"step": {step},' in metrics.read_text():
                    os.kill(os.getpid(), number)
                    return
                time.sleep(0.002)

        threading.Thread(target=watch, daemon=True).start()

    yield arm
    ended.set()


def interrupted(run: Runner, stop_at: Callable[..., None], at: int, *overrides: str) -> Any:
    """A run that is stopped after a step, and then goes on; returns the stop."""
    stop_at(at)
    with pytest.raises(Stopped) as stopped:
        run(*overrides)
    run(*overrides)
    return stopped.value


@pytest.mark.parametrize(
    "setting",
    [
        (),
        ("training.steps=null", "training.epochs=3", "training.eval_every=epoch", "training.best_metric=accuracy"),
        ("adapter={kind: adalora, init_r: 4, target_r: 2, interval: 1}", "training.steps=14"),
        STREAMED,
        *(pytest.param(setting, marks=pytest.mark.slow) for setting in RARER),
    ],
    ids=lambda setting: " ".join(setting)[:60] or "plain",
)
def test_a_stopped_run_goes_on_bit_for_bit(
    setting: tuple[str, ...], run: Runner, stop_at: Callable[..., None], tmp_path: Path
) -> None:
    overrides = [*STEPS, *setting]
    run(*overrides)
    whole = facts(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "whole")
    stopped = interrupted(run, stop_at, 5 if "training.log_every=5" in setting else 3, *overrides)
    assert stopped.code == 143
    assert facts(tmp_path / "run") == whole
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGUSR1, 143)])
def test_other_signals_stop_too_and_status_is_true(  # noqa: PLR0917
    number: int, code: int, run: Runner, stop_at: Callable[..., None], tmp_path: Path, capsys: Any
) -> None:
    stop_at(2, number)
    with pytest.raises(Stopped) as stopped:
        run(*STEPS)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert stopped.value.code == status["exit_code"] == code
    assert status["resumable"]
    assert (tmp_path / "run" / status["checkpoint"] / "MANIFEST.json").is_file()
    assert not (tmp_path / "run" / "adapter").exists()
    assert f"to resume from {tmp_path / 'run' / status['checkpoint']}, run it again" in capsys.readouterr().out
    run(*STEPS)
    assert f"resuming from {tmp_path / 'run' / status['checkpoint']} at step" in capsys.readouterr().out


def test_a_second_signal_does_not_wait(run: Runner, stop_at: Callable[..., None], monkeypatch: Any) -> None:
    from hf_finetune.training import resume

    def save(*arguments: Any) -> None:
        time.sleep(0.6)  # sooner it would count as a copy of the first
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        raise AssertionError("not reached")

    monkeypatch.setattr(resume, "save_trained", save)
    stop_at(3)
    with pytest.raises(Stopped):
        run(*STEPS)


def test_a_changed_recipe_is_refused_and_a_longer_one_may_be_allowed(
    run: Runner, stop_at: Callable[..., None], tmp_path: Path
) -> None:
    stop_at(3)
    with pytest.raises(Stopped):
        run(*STEPS)
    for change in ("training.seed=7", "adapter.r=2", "training.batch_size=8", "data.max_length=16"):
        with pytest.raises(CheckpointError, match=change.partition("=")[0]):
            run(*STEPS, change)
    assert run(*STEPS, "training.micro_batch=16").status["state"] == "done"


def test_changed_data_are_refused(run: Runner, stop_at: Callable[..., None], tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    text = "text,label\n" + "".join(
        f"the film is {w} .,{w[0]}\n" for w in ("good", "bad", "fine", "poor", "so", "not") * 8
    )
    rows.write_text(text)
    off = ["data.checks.leakage=off", f"data.train={rows}"]
    stop_at(2)
    with pytest.raises(Stopped):
        run(*STEPS, *off)
    rows.write_text(text + "the story is dull .,b\n")
    with pytest.raises(CheckpointError, match="the data changed since the run began"):
        run(*STEPS, *off)


def test_damaged_checkpoints_are_passed_over_and_none_is_no_reason_to_start_anew(
    run: Runner, stop_at: Callable[..., None], tmp_path: Path, capsys: Any
) -> None:
    stop_at(9)
    with pytest.raises(Stopped):
        run(*STEPS, "checkpoints.every=2")
    newest, older = sorted((tmp_path / "run" / "checkpoints").iterdir(), key=lambda p: -int(p.name.split("-")[1]))
    (newest / "optimizer.pt").write_bytes(b"\0" + (newest / "optimizer.pt").read_bytes()[1:])
    stop_at(11)
    with pytest.raises(Stopped):
        run(*STEPS, "checkpoints.every=2")
    told = capsys.readouterr().out
    assert f"warning: {newest.name} is not used: " in told
    assert f"resuming from {older} at step" in told
    for checkpoint in (tmp_path / "run" / "checkpoints").iterdir():
        (checkpoint / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match="refusing to start from scratch"):
        run(*STEPS, "checkpoints.every=2")


def poisoned(monkeypatch: Any, steps: set[int]) -> None:
    """Makes the training loss NaN in some steps."""
    from hf_finetune.tasks.base import Loss
    from hf_finetune.tasks.text_classification import TextClassification

    original, calls = TextClassification.loss, {"count": 0}

    def loss(*arguments: Any) -> Loss:
        calls["count"] += 1
        found = original(*arguments)
        return Loss(found.sum * float("nan")) if calls["count"] in steps else found

    monkeypatch.setattr(TextClassification, "loss", loss)


def test_a_loss_that_is_not_finite_ends_the_run_before_the_step(run: Runner, monkeypatch: Any, tmp_path: Path) -> None:
    poisoned(monkeypatch, {5})
    with pytest.raises(DivergedError, match="not finite at step 5"):
        run("training.steps=8", "checkpoints.every=2")
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["loss"]) == (5, "nan")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["exit_code"], status["checkpoint"]) == (6, "checkpoints/checkpoint-4")


def test_adalora_prunes_to_its_budget_though_steps_are_left_out(run: Runner, monkeypatch: Any) -> None:
    poisoned(monkeypatch, {2, 4, 8})  # the last pruning is after step 8
    adapter = "adapter={kind: adalora, init_r: 4, target_r: 2, interval: 2, final_share: 0.2}"
    done = run("training.steps=10", "training.on_nonfinite=skip", adapter)
    config = json.loads((done.folder / "adapter" / "adapter_config.json").read_text())
    ranks = [sum(kept) for kept in config["rank_pattern"].values()]
    assert sum(ranks) == 2 * len(ranks)


def test_a_run_that_takes_no_step_is_not_done(run: Runner, monkeypatch: Any) -> None:
    poisoned(monkeypatch, {1, 2, 3})
    with pytest.raises(DivergedError, match="not finite at any of the 3 steps: nothing was trained"):
        run("training.steps=3", "training.on_nonfinite=skip")


def test_steps_that_are_not_finite_can_be_left_out_but_not_without_end(run: Runner, monkeypatch: Any) -> None:
    poisoned(monkeypatch, {3, 5})
    done = run("training.steps=8", "training.on_nonfinite=skip")
    rates = [line["learning_rate"] for line in done.lines("train")]
    assert len(set(rates)) == 6, "the schedule waits for steps that are taken"
    assert done.lines("summary")[0]["steps_not_taken"] == 2
    assert [line["step"] for line in done.lines("train") if line["loss"] == "nan"] == [3, 5]
    assert all(isinstance(line["loss"], float) for line in done.lines("eval"))
    poisoned(monkeypatch, {3, 5})
    with pytest.raises(DivergedError, match="after 1 skipped steps"):
        run("training.steps=8", "training.on_nonfinite=skip", "training.max_skipped=1", restart=True)


def test_a_loss_that_leaps_and_stays_there_ends_the_run(run: Runner, monkeypatch: Any) -> None:
    from hf_finetune.tasks.base import Loss
    from hf_finetune.tasks.text_classification import TextClassification

    original, calls = TextClassification.loss, {"count": 0}

    def loss(*arguments: Any) -> Loss:
        calls["count"] += 1
        found = original(*arguments)
        return Loss(found.sum * 50) if calls["count"] >= 14 else found

    monkeypatch.setattr(TextClassification, "loss", loss)
    with pytest.raises(DivergedError, match=r"at step 15 is more than 3 times the usual"):
        run("training.steps=20", "training.loss_spike={patience: 2}")
