"""What is chosen by measuring: when, what is kept of it, and that a resumed run goes on with the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from pydantic import TypeAdapter
from test_resume import facts, interrupted, stop_at

from hf_finetune.errors import Stopped
from hf_finetune.models import paths as models_paths
from hf_finetune.models import tuning
from hf_finetune.models.paths import Paths
from hf_finetune.models.tuning import Bench
from hf_finetune.pipeline import train
from hf_finetune.run import lock as run_lock
from hf_finetune.run.lock import Choice, Choices

if TYPE_CHECKING:
    from conftest import Run

__all__ = ["stop_at"]
Runner = Callable[..., "Run"]
CHAT = 'task={kind: causal_lm, prompt: "the {label} film", completion: text}'


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder that knows nothing yet."""
    monkeypatch.setenv("HF_FINETUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tuning"


@pytest.fixture
def long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run is long enough to measure."""
    monkeypatch.setattr(tuning, "WORTH", 1)


def bench_of(run: Runner, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Bench:
    """The bench of a run that took one step."""
    kept: list[Any] = []
    plain = train.take_fast_paths

    def keep(training: train.Training) -> None:
        kept.append(training.bench)
        plain(training)

    monkeypatch.setattr(train, "take_fast_paths", keep)
    run("training.steps=1", *overrides)
    bench: Bench = kept[0]
    return bench


def chosen(done: Run) -> Choices:
    found = run_lock.choices(done.folder / "run.lock.json")
    assert found is not None
    return found


def test_a_short_run_goes_by_rules_and_leaves_no_memo(run: Runner, own_cache: Path) -> None:
    made = chosen(run("training.steps=2", "training.precision=fp32")).made
    assert made["attention"] == Choice("sdpa", "by rule: the run is too short to measure")
    assert made["precision"] == Choice("fp32", "asked for")
    assert made["compiled"].value is False
    assert not own_cache.exists()


@pytest.mark.usefixtures("long")
def test_a_long_run_measures_and_the_next_one_remembers(run: Runner, own_cache: Path) -> None:
    done = run("training.steps=2")
    first, report = chosen(done).made["attention"], (done.folder / "report.md").read_text()
    assert re.fullmatch(r"measured, (eager|sdpa) takes \d+\.\d\d x the time", first.why)
    assert f"attention {first.value} ({first.why})" in report
    (kept,) = own_cache.glob("attention-*.json")
    seconds = json.loads(kept.read_text())
    assert min(seconds, key=lambda name: seconds[name]) == first.value
    other = {"eager": "sdpa", "sdpa": "eager"}[first.value]
    kept.write_text(json.dumps({other: 1.0, first.value: 2.0}))
    second = chosen(run("training.steps=2", restart=True)).made["attention"]
    assert second == Choice(other, f"measured earlier, {first.value} takes 2.00 x the time")


@pytest.mark.usefixtures("long")
def test_a_damaged_memo_is_measured_again(run: Runner, own_cache: Path) -> None:
    run("training.steps=2")
    (kept,) = own_cache.glob("attention-*.json")
    kept.write_text("[1]")
    assert chosen(run("training.steps=2", restart=True)).made["attention"].why.startswith("measured, ")


def test_runs_that_measure_together_believe_the_first(
    run: Runner, monkeypatch: pytest.MonkeyPatch, own_cache: Path
) -> None:
    bench = bench_of(run, monkeypatch)
    first, second = {"eager": 1.0, "sdpa": 2.0}, {"eager": 2.0, "sdpa": 1.0}
    assert bench.keep("attention", first) == first
    assert bench.keep("attention", second) == first == bench.recall("attention")
    next(own_cache.glob("attention-*.json")).write_text("[1]")
    assert bench.keep("attention", second) == second == bench.recall("attention")


@pytest.mark.usefixtures("long")
def test_what_a_recipe_names_is_not_measured(run: Runner, own_cache: Path) -> None:
    made = chosen(run("training.steps=2", "model.attention=eager")).made
    assert made["attention"] == Choice("eager", "asked for")
    assert not own_cache.exists()


def test_measuring_leaves_no_trace(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(run, monkeypatch, "model.dropout=0.1")
    model, random = bench.adapted.eval(), torch.get_rng_state()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    choice = tuning._choose_attention(replace(bench, micro_batches=10_000))
    assert choice.is_measured
    assert torch.equal(torch.get_rng_state(), random)
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert bench.base.config._attn_implementation == bench.machine.attention


def test_packed_rows_are_measured_and_checked_too(
    run: Runner, monkeypatch: pytest.MonkeyPatch, tiny_llama: str
) -> None:
    bench = bench_of(run, monkeypatch, CHAT, f"model.name={tiny_llama}", "data.packing=true", "data.max_length=64")
    assert all("position_ids" in batch for batch in bench.batches)
    assert tuning._choose_attention(replace(bench, micro_batches=10_000)).is_measured


def test_shapes_go_from_short_to_long_and_are_those_of_the_run(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(run, monkeypatch, "training.micro_batch=4")
    shapes = [tuple(batch["input_ids"].shape) for batch in bench.batches]
    assert len(shapes) == 3
    assert {rows for rows, _ in shapes} == {4}
    assert shapes == sorted(shapes)


@pytest.mark.usefixtures("long")
def test_a_resumed_run_goes_on_with_what_was_chosen(
    run: Runner, stop_at: Callable[..., None], own_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(3)
    with pytest.raises(Stopped):
        run("training.steps=12", "training.precision=auto")
    lock = tmp_path / "run" / "run.lock.json"
    kept = json.loads(lock.read_text())
    other = {"eager": "sdpa", "sdpa": "eager"}[kept["choices"]["made"]["attention"]["value"]]
    precision = {"bf16": "fp32", "fp32": "bf16"}[kept["choices"]["made"]["precision"]["value"]]
    kept["choices"]["made"]["attention"]["value"] = other
    kept["choices"]["made"]["precision"]["value"] = precision
    lock.write_text(json.dumps(kept))
    capsys.readouterr()
    done = run("training.steps=12", "training.precision=auto")
    assert f"{precision}, {other} attention" in capsys.readouterr().out
    assert chosen(done).value("attention") == other
    assert chosen(done).value("precision") == precision


def test_a_lost_lock_is_told(
    run: Runner, stop_at: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop_at(3)
    with pytest.raises(Stopped):
        run("training.steps=12")
    (tmp_path / "run" / "run.lock.json").write_text("{")
    run("training.steps=12")
    assert "note: run.lock.json is missing or damaged: its choices are made anew" in capsys.readouterr().out


def test_choices_survive_the_lock() -> None:
    choices = Choices("cpu").plus("attention", Choice("eager", "asked for")).plus("compiled", Choice(True, "measured"))
    assert TypeAdapter(Choices).validate_json(TypeAdapter(Choices).dump_json(choices)) == choices
    assert choices.describe() == "attention eager (asked for), compiled yes (measured)"


# ---- compiled layers ----


@pytest.mark.usefixtures("long")
def test_layers_with_dropout_are_not_compiled(run: Runner) -> None:
    made = chosen(run("training.steps=1", "model.dropout=0.1")).made["compiled"]
    assert made == Choice(False, "by rule: the model has dropout in its layers, or no layers that repeat")


@pytest.mark.usefixtures("long")
def test_without_a_compiler_nothing_is_compiled(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    made = chosen(run("training.steps=1", "model.dropout=0", "adapter.dropout=0")).made["compiled"]
    assert made == Choice(False, "by rule: there is no C++ compiler")


@pytest.mark.usefixtures("long")
def test_a_run_that_ends_before_compiling_pays_is_not_compiled(run: Runner, tiny_llama: str) -> None:
    made = chosen(run("training.steps=2", CHAT, f"model.name={tiny_llama}", "adapter.dropout=0")).made["compiled"]
    assert made == Choice(False, "by rule: the run is too short")


def known(plain: float, quick: float, cost: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier runs measured this."""
    monkeypatch.setattr(Bench, "recall", lambda bench, question: {"plain": plain, "compiled": quick, "cost": cost})


@pytest.mark.parametrize(("plain", "quick", "cost", "pays"), [(1.0, 0.8, 30.0, True), (1.0, 0.8, 300.0, False)])
def test_compiling_must_pay_within_the_run(  # noqa: PLR0917
    plain: float, quick: float, cost: float, pays: bool, run: Runner, monkeypatch: pytest.MonkeyPatch, tiny_llama: str
) -> None:
    bench = bench_of(run, monkeypatch, CHAT, f"model.name={tiny_llama}", "adapter.dropout=0")
    known(plain, quick, cost, monkeypatch)
    paths = Paths(bench.job.task, bench.job.targets)
    choice = tuning.choose_compilation(replace(bench, micro_batches=1000), paths)
    assert choice.value is pays
    assert paths.is_compiled is pays
    paths.remove()


needs_compiler = pytest.mark.skipif(not models_paths.has_compiler(), reason="needs a C++ compiler")
LLAMA = (CHAT, "adapter.dropout=0", "model.dropout=0", "training.log_every=1", "training.eval_every=5")


@pytest.mark.slow
@needs_compiler
def test_compiled_layers_learn_the_same_and_go_on_bit_for_bit(
    run: Runner, stop_at: Callable[..., None], tmp_path: Path, tiny_llama: str
) -> None:
    setting = [*LLAMA, "training.steps=12", f"model.name={tiny_llama}"]
    plain = [line["loss"] for line in run(*setting).lines("train")]
    quick = run(*setting, "speed.compile=true", restart=True)
    assert [line["loss"] for line in quick.lines("train")] == pytest.approx(plain, rel=2e-2)
    whole = facts(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "whole")
    interrupted(run, stop_at, 3, *setting, "speed.compile=true")
    assert facts(tmp_path / "run") == whole


@pytest.mark.slow
@needs_compiler
@pytest.mark.usefixtures("long")
def test_compiling_is_tried_measured_and_compared(
    run: Runner, own_cache: Path, monkeypatch: pytest.MonkeyPatch, tiny_llama: str
) -> None:
    monkeypatch.setattr(tuning, "WORTH_SECONDS", 0.0)
    made = chosen(run("training.steps=2", *LLAMA, f"model.name={tiny_llama}")).made["compiled"]
    assert re.fullmatch(r"measured: \d\.\d\d x the time of a step, \d+ s to compile", made.why)
    (kept,) = own_cache.glob("compile-*.json")
    seconds = json.loads(kept.read_text())
    assert seconds.keys() == {"plain", "compiled", "cost"}
    # What compiling cost is spent by now, so only the steps to come count.
    assert made.value is (seconds["compiled"] < tuning.GAIN * seconds["plain"])
