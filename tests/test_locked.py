"""`--locked`: a run done once more is the same bits, or is refused before it leaves a trace."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RECIPE
from test_resume import facts, stop_at

from hf_finetune.cli import main
from hf_finetune.models import tuning

__all__ = ["stop_at"]
ROOT = Path(__file__).parent.parent
QUICK = ["tracking.images=false", "tracking.report=false"]


def go(*words: object) -> int:
    """Run a command in this process; returns its exit code."""
    try:
        main.main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def tree(folder: Path) -> dict[str, str]:
    """Hash of every file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("kind", ["classifier", "chatter"])
def test_a_repeat_is_the_same_bits_and_leaves_the_run_alone(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    first: Path = request.getfixturevalue(kind)
    before = tree(first)
    assert go("train", "--locked", first / "run.lock.json", f"output={tmp_path / 'run'}", *QUICK) == 0
    assert facts(tmp_path / "run") == facts(first)
    assert len(facts(first)[0]) > 10
    assert tree(first) == before
    locks = [json.loads((folder / "run.lock.json").read_text()) for folder in (first, tmp_path / "run")]
    for lock in locks:
        lock.pop("recipe")
    assert locks[0] == locks[1]


def test_what_was_chosen_by_measuring_is_taken_over(
    classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "WORTH", 1)  # every run is long enough to measure
    monkeypatch.setenv("HF_FINETUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "first").mkdir()
    lock = tmp_path / "first" / "run.lock.json"
    content = json.loads((classifier / "run.lock.json").read_text())
    made = content["choices"]["made"]
    other = {"eager": "sdpa", "sdpa": "eager"}[made["attention"]["value"]]
    made["attention"] = {"value": other, "why": "measured, long ago"}
    made["fast_paths"]["value"]["fused_lora"] = False
    lock.write_text(json.dumps(content))
    assert go("train", "--locked", lock, f"output={tmp_path / 'run'}", *QUICK) == 0
    report = (tmp_path / "run" / "report.md").read_text()
    assert f"attention {other} (measured, long ago)" in report
    assert "fused lora" not in report
    assert not (tmp_path / "cache" / "tuning").exists()
    kept = json.loads((tmp_path / "run" / "run.lock.json").read_text())["choices"]
    assert kept == content["choices"]


def test_drift_is_refused_whole_and_leaves_no_trace(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "first").mkdir()
    lock = tmp_path / "first" / "run.lock.json"
    content = json.loads((classifier / "run.lock.json").read_text())
    content["data"]["data.train"]["files"][0]["sha256"] = "0" * 64
    content["packages"]["peft"] = "0.1"
    content["hardware"]["ranks"] = 4
    lock.write_text(json.dumps(content))
    words = ["--locked", lock, f"output={tmp_path / 'run'}", "training.seed=1"]
    for verb in ("train", "check"):
        assert go(verb, *words) == 9
        errors = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
        assert [line.split(": ")[3] for line in errors] == [
            "training.seed", "data.train", "lock.packages.peft", "lock.hardware.ranks",
        ]  # fmt: skip
        assert all(line.startswith(f"hf_finetune: error: {lock}: ") for line in errors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first"]
    assert go("check", *words, "--format", "json") == 9
    document = json.loads(capsys.readouterr().out)
    assert {finding["exit_code"] for finding in document["findings"]} == {9}
    assert len(document["findings"]) == 4


def test_what_is_allowed_is_told_and_trained(
    classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "first").mkdir()
    lock = tmp_path / "first" / "run.lock.json"
    content = json.loads((classifier / "run.lock.json").read_text())
    content["packages"]["peft"] = "0.1"
    lock.write_text(json.dumps(content))
    words = ["--locked", lock, f"output={tmp_path / 'run'}", "--allow-change", "lock.packages.peft", *QUICK]
    assert go("check", *words) == 0
    assert go("train", *words) == 0
    assert capsys.readouterr().out.count("note: lock.packages.peft was 0.1, is ") == 2
    assert facts(tmp_path / "run") == facts(classifier)


def test_a_stopped_repeat_goes_on_by_the_same_command(
    classifier: Path, tmp_path: Path, stop_at: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--locked", classifier / "run.lock.json", f"output={tmp_path / 'run'}", *QUICK]
    stop_at(3)
    assert go(*words) == 143
    assert go(*words) == 0
    assert "resuming from" in capsys.readouterr().out
    assert facts(tmp_path / "run") == facts(classifier)
    assert go(*words) == 0
    assert "already holds this run, finished" in capsys.readouterr().out


def test_neither_recipe_nor_lock_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert go("train") == 2
    assert "no recipe is given; name a YAML file, or --locked RUN/run.lock.json" in capsys.readouterr().err


def test_a_damaged_lock_is_one_line_without_torch(classifier: Path, tmp_path: Path) -> None:
    lock = tmp_path / "run.lock.json"
    lock.write_text((classifier / "run.lock.json").read_text()[:999])
    code = (
        "import sys; from hf_finetune.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: sys.exit(10 + end.code if 'torch' in sys.modules else end.code)"
    )
    command = [sys.executable, "-c", code, "train", "--locked", str(lock)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert f"error: {lock}: is not JSON: damaged" in done.stderr


@pytest.mark.slow
def test_two_processes_repeat_bit_for_bit_and_one_is_refused(
    tmp_path: Path, tiny_bert: str, reviews: Callable[[int], str]
) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_bert, data=reviews(96), output=tmp_path / "run"))
    launch = ["-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu_2_processes.yaml"]

    def start(*words: str) -> str:
        command = [sys.executable, *words, *QUICK]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        return done.stdout + done.stderr

    start(*launch, "-m", "hf_finetune", str(tmp_path / "recipe.yaml"))
    locked = ["hf_finetune", "train", "--locked", str(tmp_path / "run" / "run.lock.json")]
    said = start(*launch, "-m", *locked)
    assert (tmp_path / "run-repeat" / "adapter").exists(), said
    assert facts(tmp_path / "run-repeat") == facts(tmp_path / "run")
    shutil.rmtree(tmp_path / "run-repeat")
    refused = start("-m", *locked)
    assert "lock.hardware.ranks: was 2, is 1: bits may differ; start as many processes" in refused
    assert not (tmp_path / "run-repeat").exists()
