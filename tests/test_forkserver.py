"""A process of the fork server is as good as a real one: streams, environment, exit code and signals are its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from forked import Server

SPEAK = [["speak", {}]]


def test_code_and_streams_are_those_of_the_process(server: Server) -> None:
    done = server.run("schema")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("{")
    done = server.run("nothing.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no such file" in done.stderr


def test_a_crash_is_its_own_and_leaves_the_server(server: Server) -> None:
    done = server.run("schema", plugins=[["no_such_plugin", {}]])
    assert done.returncode == 1
    assert "KeyError: 'no_such_plugin'" in done.stderr
    assert server.run("schema").returncode == 0


def test_environment_folder_and_input_are_those_of_the_test(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAID", "here")
    monkeypatch.delenv("HOME")
    done = server.run("schema", plugins=SPEAK, read="one\ntwo\n", cwd=tmp_path)
    assert done.stderr.splitlines() == ["here", "None", str(tmp_path), "['one\\n', 'two\\n']"]
    assert server.run("schema", plugins=SPEAK, env={"SAID": "there"}).stderr.splitlines()[:2] == ["there", "None"]


def test_it_is_killed_by_its_id(server: Server) -> None:
    child = server.start("schema", plugins=[["die", {"number": int(signal.SIGSTOP), "wait": 0}]])
    assert child.poll() is None
    child.send(signal.SIGKILL)
    assert child.wait() == child.poll() == -signal.SIGKILL


def test_one_that_does_not_end_is_a_failure(server: Server) -> None:
    child = server.start("schema", plugins=[["die", {"number": int(signal.SIGSTOP), "wait": 0}]])
    with pytest.raises(TimeoutError, match="still runs"):
        child.wait(0.2)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_it_says_byte_for_byte_what_a_real_process_says(server: Server, tmp_path: Path, unbuffered: str) -> None:
    recipe = tmp_path / "ręcipe.yaml"
    recipe.write_text("task: {kind: text_clasification}\n")
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUNBUFFERED": unbuffered}
    command = [sys.executable, "-m", "hf_finetune", "check", str(recipe)]
    real = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    done = server.run("check", str(recipe), env=env)
    assert (done.returncode, done.stdout, done.stderr) == (real.returncode, real.stdout, real.stderr)
