"""What is printed to resume a run is a command that resumes it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from hf_finetune.run import invocation

TRAIN = ["recipe.yaml", "data.train=my rows.csv", "--restart"]
VENV = "/opt/venv/bin"


def test_the_command_is_the_one_that_was_given_without_restart(monkeypatch: pytest.MonkeyPatch) -> None:
    for parent, own, before in [
        ([f"{VENV}/python", f"{VENV}/accelerate", "launch", "a.py"], None, f"{VENV}/accelerate launch a.py"),
        (["python3", "-m", "accelerate.commands.launch", "a.py"], None, "python3 -m accelerate.commands.launch a.py"),
        (["python", "-m", "hf_finetune.launch"], None, "python -m hf_finetune.launch"),
        (["torchrun", "--nproc_per_node", "2", "a.py"], None, "torchrun --nproc_per_node 2 a.py"),
        (["timeout", "9", "hf-finetune", "train"], [f"{VENV}/python", f"{VENV}/hf-finetune"], f"{VENV}/hf-finetune"),
        (["bash"], [f"{VENV}/python3.11", "-m", "hf_finetune"], f"{VENV}/python3.11 -m hf_finetune"),
        ([], ["pytest"], "hf-finetune"),
    ]:
        words = ["train", *TRAIN] if "hf-finetune" in before else TRAIN
        monkeypatch.setattr(invocation, "_words", list(words))
        monkeypatch.setattr(invocation, "_parent", [*parent, *TRAIN])
        monkeypatch.setattr(sys, "orig_argv", [*(own or ["python"]), *(words if own != ["pytest"] else ())])
        monkeypatch.setattr(os, "access", lambda path, mode: str(path).startswith(VENV))
        verb = "train " if "hf-finetune" in before else ""
        assert invocation.resume_command() == f"{before} {verb}recipe.yaml 'data.train=my rows.csv'"
        assert invocation.same_command() == "the same command without --restart"


def test_a_program_below_the_working_directory_is_named_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "r.yaml"]
    monkeypatch.setattr(invocation, "_words", words)
    program = [str(Path.cwd() / ".venv/bin/python"), "-m", "hf_finetune"]
    monkeypatch.setattr(sys, "orig_argv", [*program, *words])
    monkeypatch.setenv("PATH", "")
    assert invocation.resume_command() == ".venv/bin/python -m hf_finetune train r.yaml"


def test_a_program_that_its_name_alone_starts_is_named_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train", "r.yaml"]
    python, script = tmp_path / "python", tmp_path / "hf-finetune"
    for program in (python, script):
        program.touch(mode=0o755)
    monkeypatch.setattr(invocation, "_words", words)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setenv("PATH", str(tmp_path))
    for line in ([str(python), str(script)], [str(python), "-m", "hf_finetune"]):
        monkeypatch.setattr(sys, "orig_argv", [*line, *words])
        assert invocation.resume_command() == "hf-finetune train r.yaml"
    monkeypatch.setenv("PATH", str(tmp_path / "elsewhere"))
    assert invocation.resume_command() == f"{python} -m hf_finetune train r.yaml"
