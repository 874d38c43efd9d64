"""The entry point of a job: which processes it starts, and the exit code that it ends with."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_finetune.errors import RecipeError
from hf_finetune.run import processes
from hf_finetune.run.processes import Node


def test_a_node_is_alone_where_nothing_is_said() -> None:
    assert Node.of({}) == Node(1)


def test_what_the_command_line_says_counts_more_than_a_variable() -> None:
    assert Node.of({"PET_NPROC_PER_NODE": "4"}, "2") == Node(2)
    assert Node.of({"PET_NPROC_PER_NODE": "4"}, "auto") == Node(1)


def test_what_torchrun_and_kubeflow_set_is_understood() -> None:
    said = {
        "PET_NPROC_PER_NODE": "4",
        "PET_NNODES": "3",
        "PET_NODE_RANK": "2",
        "PET_MASTER_ADDR": "a",
        "PET_MASTER_PORT": "5",
    }
    node = Node.of(said)
    assert node == Node(4, 3, 2, "a", 5)
    assert node.all_processes == 12
    assert Node.of({"PET_NPROC_PER_NODE": "auto", "PET_MASTER_ADDR": "a"}) == Node(1)


def test_a_place_that_can_not_be_is_refused() -> None:
    for said, word in [
        ({"PET_NPROC_PER_NODE": "many"}, "PET_NPROC_PER_NODE"),
        ({"PET_NPROC_PER_NODE": "0"}, "1 at least"),
        ({"PET_NNODES": "1:4"}, "PET_NNODES"),
        ({"PET_NNODES": "2", "PET_NODE_RANK": "2", "PET_MASTER_ADDR": "a"}, "counts from 0"),
        ({"PET_NNODES": "2"}, "PET_MASTER_ADDR"),
    ]:
        with pytest.raises(RecipeError, match=word):
            Node.of(said)


def test_the_code_is_what_the_status_says_of_this_run() -> None:
    before = {"state": "preempted", "exit_code": 143}
    assert processes.reported(before, {"state": "failed", "exit_code": 7}) == 7
    assert processes.reported(before, before) == 0, "an earlier run's"
    assert processes.reported(before, {"state": "running", "exit_code": None}) == 0
    assert processes.reported({}, {"state": "done", "exit_code": 8}) == 8
    assert processes.exit_code(-signal.SIGTERM) == 143


@pytest.fixture
def start(tmp_path: Path, tiny_bert: str, reviews: Callable[[int], str]) -> Callable[..., subprocess.Popen[str]]:
    """Starts a small recipe by the entry point."""
    from conftest import RECIPE

    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_bert, data=reviews(96), output=tmp_path / "run"))

    def begin(*words: str, **variables: str) -> subprocess.Popen[str]:
        command = [
            sys.executable,
            "-m",
            "hf_finetune.launch",
            str(tmp_path / "recipe.yaml"),
            "tracking.images=false",
            *words,
        ]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, env=os.environ | variables, **pipe)  # type: ignore[call-overload, no-any-return]

    return begin


def ends(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and output."""
    output, _ = process.communicate(timeout=180)
    return process.returncode, output


def status(folder: Path) -> dict[str, Any]:
    """Of the run."""
    found: dict[str, Any] = json.loads((folder / "run" / "status.json").read_text())
    return found


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.slow)])
def test_a_signal_is_handed_on_and_143_comes_back(
    start: Callable[..., subprocess.Popen[str]], tmp_path: Path, processes: str
) -> None:
    process = start("training.epochs=500", "tracking.report=false", PET_NPROC_PER_NODE=processes)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and '"step": 3,' in metrics.read_text()):
        assert process.poll() is None, ends(process)[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.terminate()
    code, output = ends(process)
    assert code == 143, output
    assert (status(tmp_path)["state"], status(tmp_path)["resumable"]) == ("preempted", True)
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_mistake_of_one_of_two_processes_is_told_once(start: Callable[..., subprocess.Popen[str]]) -> None:
    code, output = ends(start("data.max_length=4000", PET_NPROC_PER_NODE="2"))
    assert code in (2, 4), output
    assert output.count("hf_finetune: error:") == 1, output
    assert "Traceback" not in output


def test_a_recipe_with_mistakes_ends_with_2_before_anything_starts(start: Callable[..., subprocess.Popen[str]]) -> None:
    code, output = ends(start("training.epochs=-1", PET_NPROC_PER_NODE="2"))
    assert code == 2
    assert output.count("error:") == 1


def test_a_launcher_configuration_that_is_not_there_is_refused(start: Callable[..., subprocess.Popen[str]]) -> None:
    code, output = ends(start(HF_FINETUNE_LAUNCHER_CONFIG="none.yaml"))
    assert (code, "none.yaml: no such file" in output) == (2, True)


def test_a_file_for_the_health_check_that_can_not_be_written_is_told(
    start: Callable[..., subprocess.Popen[str]],
) -> None:
    code, output = ends(start(HF_FINETUNE_RUN_FILE="/proc/none"))
    assert (code, "HF_FINETUNE_RUN_FILE: /proc/none can't be written" in output) == (5, True)
    assert "Traceback" not in output


@pytest.fixture
def on_a_terminal(tmp_path: Path, tiny_bert: str, reviews: Callable[[int], str]) -> Callable[..., tuple[int, str]]:
    """Types `hf-finetune train` at a terminal of 80 columns, and Ctrl-C once `until` is on it; exit code and screen."""
    from conftest import RECIPE
    from screens import Terminal

    (tmp_path / "recipe.yaml").write_text(RECIPE.format(model=tiny_bert, data=reviews(96), output="run"))

    def typed(*words: str, until: str = "") -> tuple[int, str]:
        command = [sys.executable, "-m", "hf_finetune", "train", "recipe.yaml", "tracking.images=false", *words]
        with Terminal(80) as terminal:
            process = subprocess.Popen(
                command,
                cwd=tmp_path,
                env=os.environ | {"TERM": "xterm", "CI": ""},
                stdin=terminal.theirs,
                stdout=terminal.theirs,
                stderr=terminal.theirs,
                start_new_session=True,
                preexec_fn=lambda: fcntl.ioctl(terminal.theirs, termios.TIOCSCTTY, 0),
            )
            deadline = time.monotonic() + 150
            while until and until not in terminal.output:
                assert process.poll() is None, terminal.output
                assert time.monotonic() < deadline, terminal.output
                time.sleep(0.02)
            if until:
                os.write(terminal.ours, b"\x03")
            code = process.wait(150)
        assert "Traceback" not in terminal.output
        return code, "\n".join(terminal.screen())

    return typed


def test_a_mistake_is_one_message_that_breaks_between_words(on_a_terminal: Callable[..., tuple[int, str]]) -> None:
    code, screen = on_a_terminal("--processes", "2", "training.learning_rat=1e-3")
    assert (code, screen.count("hf_finetune:")) == (2, 1)
    assert max(map(len, screen.split("\n"))) <= 80
    assert "did you mean 'learning_rate'?" in " ".join(screen.split())


def test_data_that_are_not_there_end_with_3(on_a_terminal: Callable[..., tuple[int, str]]) -> None:
    code, screen = on_a_terminal("--processes", "2", "data.train=none.jsonl")
    assert (code, screen.count("hf_finetune:")) == (3, 1)
    assert "none.jsonl" in screen


@pytest.mark.slow
@pytest.mark.parametrize("processes", ["auto", "2"])
def test_ctrl_c_leaves_a_checkpoint_and_no_traceback(
    on_a_terminal: Callable[..., tuple[int, str]], tmp_path: Path, processes: str
) -> None:
    code, screen = on_a_terminal("--processes", processes, "training.epochs=500", until="step 2/")
    assert code == 130
    assert screen.split("\n")[-1].strip()
    assert screen.count("stopped by SIGINT") == 1
    assert (status(tmp_path)["state"], status(tmp_path)["resumable"]) == ("interrupted", True)
