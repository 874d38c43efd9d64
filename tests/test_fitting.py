"""Micro-batch and activation checkpointing fit what is free, change nothing that is learned, and stay as they were."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import CHAT_RECIPE, RECIPE
from models import machine
from test_resume import facts, stop_at

from hf_finetune import device
from hf_finetune.cli import main
from hf_finetune.data.job import Job
from hf_finetune.errors import Findings, RecipeError, Stopped
from hf_finetune.models.memory import bound
from hf_finetune.pipeline import examine as pipeline_examine
from hf_finetune.pipeline.examine import MARGIN, Made, choose, examine, search, step_bytes
from hf_finetune.recipe import Recipe
from hf_finetune.run import lock
from hf_finetune.run.lock import Choice

if TYPE_CHECKING:
    from conftest import Run

__all__ = ["stop_at"]
Runner = Callable[..., "Run"]
Ready = tuple[Job, Any]
"""A job, and its model on the meta device."""
FEW, FEWER = "600kB", "300kB"
"""Free memory for a quarter of the rule's 16 rows; for two, if activations are recomputed."""
KNOWN: dict[tuple[int, bool], int] = {}
"""Estimates of the one recipe whose choices are tried at many amounts of free memory."""


def prepared(folder: Path, text: str, *overrides: str) -> Ready:
    file = folder / "recipe.yaml"
    file.write_text(text)
    made = Recipe.load(str(file), list(overrides))
    parts = examine(made, device.alone(made), Findings())
    assert parts.job is not None
    return parts.job, parts.outline


@pytest.fixture
def ready(tmp_path: Path, tiny_bert: str, reviews: Callable[[int], str]) -> Callable[..., Ready]:
    """A run up to its weights."""
    text = RECIPE.format(model=tiny_bert, data=reviews(96), output=tmp_path / "run")
    return lambda *overrides: prepared(tmp_path, text, *overrides)


@pytest.fixture
def needed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The estimate of a step, made once for each way to take it."""

    def find(job: Job, rows: int, *, again: bool) -> int:
        if (rows, again) not in KNOWN:
            KNOWN[rows, again] = step_bytes(job, rows, again=again)
        return KNOWN[rows, again]

    monkeypatch.setattr(pipeline_examine, "step_bytes", find)
    return find


def values(made: Made) -> tuple[int, bool]:
    return made["micro_batch"].value, made["activation_checkpointing"].value


def searched(made: Ready, free: int) -> tuple[int, bool]:
    return values(search(*made, free)[0])


def test_where_memory_is_plenty_nothing_is_estimated(ready: Callable[..., Ready]) -> None:
    why = "by rule: there is plenty of memory"
    found, _ = choose(*ready(), 10**9)
    assert found == {"micro_batch": Choice(16, why), "activation_checkpointing": Choice(False, why)}
    unknown, _ = choose(*ready(), None)
    assert unknown["micro_batch"] == Choice(16, "by rule: how much memory is free is unknown")


def test_rows_are_halved_until_they_fit_and_then_recomputed(
    ready: Callable[..., Ready], needed: Callable[..., int]
) -> None:
    made = ready()
    for rows, again in ((16, False), (8, False), (4, False), (2, False), (2, True), (1, True)):
        just_enough = int(needed(made[0], rows, again=again) / MARGIN) + 1
        assert searched(made, just_enough) == (rows, again)
    for again in (False, True):
        found = [KNOWN[rows, again] for rows in (16, 8, 4, 2, 1) if (rows, again) in KNOWN]
        assert found == sorted(found, reverse=True)
    assert all(KNOWN[rows, True] < KNOWN[rows, False] for rows in (2, 16))


@pytest.mark.usefixtures("needed")
def test_where_nothing_fits_the_most_frugal_way_is_kept(ready: Callable[..., Ready]) -> None:
    found, lacking = search(*ready(), 1000)
    assert values(found) == (1, True)
    assert lacking == KNOWN[1, True] > 1000


@pytest.mark.usefixtures("needed")
def test_a_model_that_can_not_recompute_takes_fewer_rows(
    ready: Callable[..., Ready], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ready()
    monkeypatch.setattr(type(made[1]), "supports_gradient_checkpointing", False)
    assert searched(made, 1000) == (1, False)


@pytest.mark.usefixtures("needed")
def test_what_the_recipe_says_stays(ready: Callable[..., Ready]) -> None:
    asked = ready("training.micro_batch=8")
    assert searched(asked, 1_500_000) == (8, False)
    assert searched(asked, 1000) == (8, True)
    assert searched(ready("training.activation_checkpointing=false"), 1000) == (1, False)
    assert searched(ready("training.activation_checkpointing=true"), 300_000) == (2, True)
    both = ready("training.micro_batch=8", "training.activation_checkpointing=true")
    asked_for = {"micro_batch": Choice(8, "asked for"), "activation_checkpointing": Choice(True, "asked for")}
    assert choose(*both, 1) == (asked_for, 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_bound_is_above_the_estimate(precision: str, tmp_path: Path, tiny_llama: str) -> None:
    rows = [{"question": "what is one plus two ?", "answer": "three " * (n % 9 + 1)} for n in range(64)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = CHAT_RECIPE.format(model=tiny_llama, data=tmp_path / "rows.jsonl", output=tmp_path / "run")
    job, outline = prepared(tmp_path, text, f"training.precision={precision}", "data.checks.leakage=off")
    assert job.lengths is not None
    longest = int(job.lengths.max())
    found = step_bytes(job, 16, again=False)
    assert found < bound(outline, job.machine, (16, longest)) < 10 * found


# ---- how much is free ----


def test_a_rank_reckons_with_no_more_than_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for said, amount in [("8GB", 8 * 10**9), ("1.5 MiB", 3 << 19), ("600kb", 600_000), (" 1234 ", 1234)]:
        whole = device.memory_available(machine()) or 0
        monkeypatch.setenv("HF_FINETUNE_MEMORY", said)
        assert device.memory_available(machine()) == min(amount, whole)
        monkeypatch.setenv("HF_FINETUNE_MEMORY", "9999 GB")
        assert (device.memory_available(machine()) or 0) < 9999 * 10**9


def test_what_is_no_amount_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for said in ["much", "-1", "1 TB of it", "1e9"]:
        monkeypatch.setenv("HF_FINETUNE_MEMORY", said)
        with pytest.raises(RecipeError, match=f"HF_FINETUNE_MEMORY={said} is not an amount of memory; write e.g. 8GB"):
            device.memory_available(machine())


def test_the_tightest_control_group_counts_and_cached_files_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def group(path: Path, limit: str, used: int, cached: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / "memory.max").write_text(f"{limit}\n")
        (path / "memory.current").write_text(f"{used}\n")
        (path / "memory.stat").write_text(f"anon 7\ninactive_file {cached}\nactive_file 9\n")

    group(tmp_path / "job" / "step", "max", 50, 0)
    group(tmp_path / "job", "1000", 900, 300)
    (tmp_path / "mine").write_text("4:memory:/elsewhere\n0::/job/step\n")
    monkeypatch.setattr(device, "CGROUP", tmp_path)
    monkeypatch.setattr(device, "MEMBERSHIP", tmp_path / "mine")
    assert device.memory_available(machine()) == 400
    assert device.memory_available(replace(machine(), local_world_size=2)) == 200
    group(tmp_path / "job" / "step", "50", 50, 0)
    assert device.memory_available(machine()) == 0
    group(tmp_path, "10", 50, 0)  # a container sees its own group as the root
    assert device.memory_available(machine()) == 0


# ---- whole runs ----


def chosen(folder: Path) -> dict[str, Any]:
    found = lock.choices(folder / "run.lock.json")
    assert found is not None
    return {name: found.value(name) for name in ("micro_batch", "activation_checkpointing")}


def test_what_is_learned_does_not_depend_on_the_memory(
    run: Runner, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses, reports = [], []
    wanted = [(16, False), (4, False), (2, True)]
    for said, (rows, again) in zip(("", FEW, FEWER), wanted, strict=True):
        monkeypatch.setenv("HF_FINETUNE_MEMORY", said)
        done = run("training.steps=3", "model.dropout=0", restart=True)
        assert chosen(done.folder) == {"micro_batch": rows, "activation_checkpointing": again}
        losses.append([value for line in done.lines("train") for value in (line["loss"], line["grad_norm"])])
        reports.append((done.folder / "report.md").read_text())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)
    why = r"micro batch 4 \(estimated: 4 rows need \d\d\d kB of 600 kB free, 16 rows need 1 MB\)"
    assert re.search(why, reports[1])
    assert re.search(r"activation checkpointing yes \(estimated: without it 2 rows need 2\d\d kB\)", reports[2])
    assert "fp32, sdpa attention, activation checkpointing" in capsys.readouterr().out


def test_estimating_leaves_no_trace_in_the_numbers(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = facts(run("training.steps=3", "model.dropout=0.1").folder)
    monkeypatch.setenv("HF_FINETUNE_MEMORY", "3MB")
    done = run("training.steps=3", "model.dropout=0.1", restart=True)
    made = json.loads((done.folder / "run.lock.json").read_text())["choices"]["made"]["micro_batch"]
    assert (made["value"], made["why"]) == (16, "by rule: 16 rows need 1 MB of 3 MB free")
    assert facts(done.folder) == plain


@pytest.mark.parametrize(("at_first", "later"), [(FEW, "")])
def test_a_run_goes_on_bit_for_bit_with_another_amount_of_memory(  # noqa: PLR0917
    at_first: str, later: str, run: Runner, stop_at: Callable[..., None], tmp_path: Path, monkeypatch: Any
) -> None:
    steps = ("training.steps=8", "model.dropout=0.1")
    monkeypatch.setenv("HF_FINETUNE_MEMORY", at_first)
    whole = facts(run(*steps).folder)
    was = chosen(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "whole")
    stop_at(3)
    with pytest.raises(Stopped):
        run(*steps)
    monkeypatch.setenv("HF_FINETUNE_MEMORY", later)
    run(*steps)
    assert facts(tmp_path / "run") == whole
    assert chosen(tmp_path / "run") == was


def test_the_plan_says_what_would_be_chosen_and_what_is_too_much(
    ready: Callable[..., Ready], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ready()
    monkeypatch.setenv("HF_FINETUNE_MEMORY", "1kB")
    main.main(["check", "--verbose", str(tmp_path / "recipe.yaml")])
    told = capsys.readouterr()
    assert "chosen       micro batch 1 (estimated: 1 row needs " in told.out
    assert "of up to 1\n" in told.out
    assert "cpu, 1 threads each, fp32, sdpa attention, activation checkpointing" in told.out
    assert "of memory are needed and 1 kB are free; lower data.max_length\n" in told.err
    monkeypatch.setenv("HF_FINETUNE_MEMORY", "much")
    with pytest.raises(SystemExit) as end:
        main.main(["check", str(tmp_path / "recipe.yaml")])
    assert end.value.code == 2
    assert "error: HF_FINETUNE_MEMORY=much is not an amount of memory" in capsys.readouterr().err


def test_a_run_that_may_not_fit_is_warned_of(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_FINETUNE_MEMORY", "1kB")
    done = run("training.steps=1", "training.micro_batch=2")
    (warning,) = done.outcome.warnings
    assert str(warning).endswith("of memory are needed and 1 kB are free; lower it, or lower data.max_length")
    assert "training.micro_batch: about " in (done.folder / "report.md").read_text()


@pytest.mark.slow
def test_all_ranks_reckon_with_the_least_of_them(ready: Callable[..., Ready], tmp_path: Path) -> None:
    ready()
    script = str(Path(__file__).with_name("least_memory.py"))
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, *launcher, script, str(tmp_path / "recipe.yaml"), str(tmp_path), "9GB", FEW]
    environment = os.environ | {"ACCELERATE_USE_CPU": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert told == [[4, False], [4, False]]  # alone, rank 0 would take its 8 rows
