"""The command line as a person meets it: real processes, exit codes, one line an error."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import QUICK, RECIPE
from forked import Server

from hf_finetune.cli import main as cli_main
from hf_finetune.cli.main import main
from hf_finetune.cli.verbs import VERBS

Done = subprocess.CompletedProcess[str]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def recipe(tmp_path: Path, tiny_bert: str, reviews: Callable[[int], str]) -> str:
    """A small recipe that runs."""
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(model=tiny_bert, data=reviews(32), output=tmp_path / "run"))
    return str(file)


def hf_finetune(*arguments: str, launcher: tuple[str, ...] = ("-m", "hf_finetune")) -> Done:
    """Run a command in a process of its own."""
    command = [sys.executable, *launcher, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, timeout=600)


def test_a_recipe_alone_means_train(recipe: str, tmp_path: Path) -> None:
    done = hf_finetune(recipe, "training.epochs=1")
    assert done.returncode == 0, done.stderr
    assert "  hf-finetune tensorboard " in done.stdout
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "done"
    assert [line for line in done.stderr.splitlines() if line.strip()] == []


def test_every_mistake_is_told_once_with_its_line(recipe: str) -> None:
    text = Path(recipe).read_text().replace("r: 4", "ranks: 4").replace("5e-3", "fast").replace("3e-3", "fast")
    Path(recipe).write_text(text)
    done = hf_finetune(recipe, "training.epochs=-1", "data.overlong=truncat")
    assert done.returncode == 2
    errors = done.stderr.splitlines()
    assert len(errors) == 4
    assert all(line.startswith("hf_finetune: error: ") for line in errors)
    assert any(f"{recipe}:4: adapter.ranks: " in line for line in errors)
    assert any(f"{recipe}:5: training.learning_rate: " in line for line in errors)
    assert any("did you mean 'truncate'" in line for line in errors)


@pytest.mark.parametrize(
    ("override", "code", "says"),
    [
        ("data.train=nowhere.csv", 3, "nowhere.csv"),
        ("model.name=./no/such/model", 4, "no/such/model"),
        ("adapter.target_modules=[qery]", 4, "query"),
        ("training.warmup_steps=1000", 2, "error: command line: training.warmup_steps: 1000 is more than all"),
        ("output=/proc/none", 5, "/proc/none"),
    ],
)
def test_what_is_wrong_decides_the_exit_code(server: Server, recipe: str, override: str, code: int, says: str) -> None:
    done = server.run(recipe, override)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_mistakes_of_a_recipe_are_told_without_loading_torch(recipe: str) -> None:
    code = (
        "import sys; from hf_finetune.cli.main import main\n"
        "try: main([sys.argv[1], 'training.epochs=0'])\n"
        "except SystemExit as end: sys.exit(10 + end.code if 'torch' in sys.modules else end.code)"
    )
    done = subprocess.run([sys.executable, "-c", code, recipe], capture_output=True, text=True, check=False)
    assert done.returncode == 2


def test_a_missing_recipe_and_an_unknown_verb() -> None:
    assert "no such file" in hf_finetune("nothing.yaml").stderr
    assert hf_finetune("nothing.yaml").returncode == 2
    assert hf_finetune("trian").returncode == 2


def test_nothing_at_all_is_a_usage_error() -> None:
    done = hf_finetune()
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: hf-finetune" in done.stderr


def test_help_takes_a_moment_and_imports_next_to_nothing() -> None:
    code = (
        "import sys, time\nfrom hf_finetune.cli.main import main\n"
        "try: main([*sys.argv[1:], '--help'])\n"
        "except SystemExit: print(time.process_time(), *{name.partition('.')[0] for name in sys.modules})"
    )
    seconds = []
    for words in [[], *([verb.name] for verb in VERBS)]:
        lines = hf_finetune(*words, launcher=("-c", code)).stdout.splitlines()
        assert lines[0].startswith(" ".join(["usage: hf-finetune", *words]))
        took, *modules = lines[-1].split()
        seconds.append(float(took))
        assert {"torch", "transformers", "numpy", "pydantic", "yaml", "rich"} & set(modules) == set()
    assert min(seconds) < 0.3


def test_common_flags_stand_anywhere(recipe: str) -> None:
    for words in [["--quiet", "{}"], ["{}", "--quiet"], ["train", "--quiet", "{}"], ["--quiet", "train", "{}"]]:
        found = cli_main.parse(cli_main.complete([word.format(recipe) for word in words]))
        assert (found.quiet, found.recipe, found.log_format, found.debug) == (True, recipe, None, False)


def test_a_recipe_after_a_flag_with_a_value_means_train(recipe: str) -> None:
    assert cli_main.complete(["--log-format", "json", recipe])[0] == "train"
    assert cli_main.complete(["--log-format", "json", "check", recipe])[0] == "--log-format"


def test_the_board_of_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in [[], ["--rebuild"]]:
        with pytest.raises(SystemExit) as end:
            main(["tensorboard", str(tmp_path / "none"), *words])
        assert end.value.code == 2
        assert str(tmp_path / "none") in capsys.readouterr().err


def test_the_schema_is_printed() -> None:
    done = hf_finetune("schema")
    assert set(json.loads(done.stdout)["properties"]) >= {"task", "model", "data", "adapter", "training"}


CONFIG = str(ROOT / "accelerate_configs" / "cpu_2_processes.yaml")
TWO = ("-m", "accelerate.commands.launch", "--config_file", CONFIG, "--main_process_port", "0", "-m", "hf_finetune")


@pytest.mark.slow
def test_two_processes_print_once(recipe: str) -> None:
    done = hf_finetune("--log-format", "json", recipe, "training.epochs=1", *QUICK, launcher=TWO)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["level"] for line in done.stdout.splitlines()].count("error") == 0
    assert done.stdout.count("hf-finetune tensorboard") == 1
    assert "2 x cpu" in done.stdout


@pytest.mark.slow
def test_two_processes_both_end(recipe: str, tmp_path: Path) -> None:
    failed = hf_finetune(recipe, "task.label=lable", launcher=TWO)
    assert failed.returncode == 1
    assert failed.stderr.count("did you mean 'label'") == 1
    assert not (tmp_path / "run").exists(), "a mistake that is seen at once leaves no trace"
    failed = hf_finetune(recipe, "data.max_length=4", "data.overlong=error", launcher=TWO)
    assert failed.returncode == 1
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 3)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_accelerate_launch_uses_every_core(recipe: str) -> None:
    code = (
        "import os, sys, runpy; os.sched_setaffinity(0, range(os.cpu_count()))\n"
        "sys.argv = ['accelerate', '-m', 'hf_finetune', *sys.argv[1:]]\n"
        "runpy.run_module('accelerate.commands.launch', run_name='__main__')"
    )
    done = hf_finetune(recipe, "training.epochs=1", *QUICK, launcher=("-c", code))
    assert done.returncode == 0, done.stderr
    assert f"{os.cpu_count()} threads each" in done.stdout


def test_sigterm_leaves_a_true_status(server: Server, recipe: str, tmp_path: Path) -> None:
    reading, writing = os.pipe()
    child = server.start(recipe, "training.epochs=10000", streams=(None, writing, None))
    os.close(writing)
    with os.fdopen(reading) as said:
        assert any(line.startswith("step 1/") for line in said)
        child.send(signal.SIGTERM)
        assert child.wait() == 143
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 143)


def test_a_dropped_key_is_told(server: Server, recipe: str, tiny_bert: str) -> None:
    text = Path(recipe).read_text().replace(f"{{name: {tiny_bert}}}", "{name: some/model, revision: abcdef0}")
    Path(recipe).write_text(text)
    done = server.run(recipe, f"model.name={tiny_bert}", "training.epochs=1", *QUICK)
    assert done.returncode == 0, done.stderr
    assert "note: model.revision of the recipe is not used, because model.name was overridden" in done.stdout


def test_what_is_found_later_has_its_line_too(server: Server, recipe: str) -> None:
    Path(recipe).write_text(Path(recipe).read_text().replace("target_modules: all-linear", "target_modules: [qery]"))
    assert f"error: {recipe}:4: adapter.target_modules: " in server.run(recipe).stderr


def _asks_for_too_much(_arguments: argparse.Namespace) -> None:
    import torch

    torch.empty(1 << 60, dtype=torch.uint8)


def test_no_memory_ends_any_verb_with_7(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (compare,) = (verb for verb in VERBS if verb.name == "compare")
    monkeypatch.setattr(cli_main, "VERBS", [compare._replace(run=_asks_for_too_much)])
    with pytest.raises(SystemExit) as end:
        main(["compare", "a", "b"])
    assert end.value.code == 7
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("hf_finetune: error: out of memory: ")
