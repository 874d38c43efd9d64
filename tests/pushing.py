"""Runs that are pushed to a Hub on the loopback, in this process or in others."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from hf_finetune.cli.main import main

ROOT = Path(__file__).parent.parent
TOKEN = "hf_" + "aBcDeFgHiJ" * 3
REPO = "me/reviews"


def environment(url: str, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """Of a process that reaches this Hub and no other, with a cache of its own."""
    own = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    kept = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    return kept | own | ({"HF_TOKEN": token} if token else {})


def reach(monkeypatch: pytest.MonkeyPatch, url: str, home: Path, token: str | None = TOKEN) -> None:
    """Have this process and those that it starts reach a Hub; only the latter read HF_ENDPOINT anew."""
    monkeypatch.delenv("HF_TOKEN", raising=False)
    for name, value in environment(url, home, token).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))


def command(*words: str) -> int:
    """Exit code of the command line, in this process."""
    try:
        main(list(words))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def start(env: dict[str, str], *words: str, **options: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", "hf_finetune", *words], env=env, cwd=ROOT, **{**pipes, **options})


def advised(text: str) -> list[str]:
    """The words of the command that a message says to try."""
    line = next(line for line in text.splitlines() if "try it again with: " in line)
    return shlex.split(line.partition("try it again with: ")[2])[1:]
