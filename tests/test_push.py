"""`hf-finetune push` and the end of a run with a `hub` block, against a Hub on the loopback, by the real client."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hubserver import Fault, Hub, refused, serving

ROOT = Path(__file__).parent.parent
TOKEN = "hf_" + "aBcDeFgHiJ" * 3
REPO = "me/reviews"

Push = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty Hub."""
    with serving(TOKEN) as made:
        yield made


def environment(url: str, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """Of a process that reaches this Hub and no other, with a cache of its own."""
    own = {"HF_ENDPOINT": url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
    kept = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    return kept | own | ({"HF_TOKEN": token} if token else {})


@pytest.fixture
def run(classifier: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    shutil.copytree(classifier, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def push(hub: Hub, run: Path, tmp_path: Path) -> Push:
    """Runs the command line."""

    def push(*words: str, url: str = hub.url, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hf_finetune", "push", str(run), *words]
        env = environment(url, tmp_path / "home", token)
        return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)

    return push


def test_a_push_makes_a_private_repository_with_the_adapter_and_a_tag(push: Push, hub: Hub, run: Path) -> None:
    done = push("--repo", REPO)
    assert done.returncode == 0, done.stderr
    assert hub.repos[REPO].private
    names = set(hub.files(REPO)) - {".gitattributes"}
    there = {file.relative_to(run / "adapter").as_posix() for file in (run / "adapter").rglob("*") if file.is_file()}
    assert names == there
    assert hub.files(REPO)["adapter_model.safetensors"] == (run / "adapter" / "adapter_model.safetensors").read_bytes()
    print(done.stdout, done.stderr, hub.repos[REPO].log, hub.repos[REPO].tags)
