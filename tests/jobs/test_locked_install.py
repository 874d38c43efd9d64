"""S20: the locked set for CPUs is downloaded once, and installs without any network, by its hashes alone."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from supply.pins import read

ROOT = Path(__file__).parent.parent.parent
LOCK = ROOT / "requirements" / "cpu.txt"
WITHOUT_NETWORK = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--user", "--map-root-user", "--net")
"""An empty network namespace: not even the loopback interface is up."""

pytestmark = [pytest.mark.jobs, pytest.mark.timeout(600)]


def run(words: Sequence[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, env={**os.environ, **more}, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file of the lock for this machine, from whatever index pip is configured with."""
    folder = tmp_path_factory.mktemp("wheels")
    flags = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--requirement", str(LOCK)]
    done = run([sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder), *flags], PIP_CONSTRAINT="")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A new environment's Python."""
    folder = tmp_path_factory.mktemp("environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return str(folder / "bin" / "python")


def offline(python: str, wheels: Path, lock: Path) -> subprocess.CompletedProcess[str]:
    """Install with neither network nor configuration."""
    flags = ["--no-index", "--find-links", str(wheels), "--require-hashes", "--no-compile", "--requirement", str(lock)]
    alone = {"PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": "", "PIP_CONSTRAINT": ""}
    return run([*WITHOUT_NETWORK, python, "-m", "pip", "install", "--quiet", *flags], **alone)


def test_a_file_with_another_content_is_refused(python: str, wheels: Path, tmp_path: Path) -> None:
    wheel = next(wheels.glob("mdurl-*.whl"))
    shutil.copy(wheel, tmp_path)
    with (tmp_path / wheel.name).open("ab") as file:
        file.write(b"\0")
    pin = next(pin for pin in read(LOCK) if pin.name == "mdurl")
    (tmp_path / "lock.txt").write_text(pin.render())
    done = offline(python, tmp_path, tmp_path / "lock.txt")
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr


def test_the_whole_set_installs_without_a_network_and_is_consistent(python: str, wheels: Path) -> None:
    done = offline(python, wheels, LOCK)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run([python, "-m", "pip", "check"]).returncode == 0
    code = "from hf_finetune import cli; import torch, transformers, peft; print(torch.__version__)"
    done = run([*WITHOUT_NETWORK, python, "-c", code], PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    (locked,) = [pin.version for pin in read(LOCK) if pin.name == "torch" and "== 'linux'" in pin.marker]
    assert done.stdout.strip() == locked


def test_the_wheel_holds_the_gallery(python: str, tmp_path: Path) -> None:
    lock = ["--require-hashes", "--requirement", str(ROOT / "requirements" / "build.txt")]
    done = run([python, "-m", "pip", "install", "--quiet", *lock], PIP_CONSTRAINT="")
    assert done.returncode == 0, done.stderr[-3000:]
    subprocess.run([python, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)], cwd=ROOT, check=True)
    shutil.unpack_archive(next(tmp_path.glob("*.whl")), tmp_path, "zip")
    code = "from hf_finetune.pipeline import gallery; gallery.copy('quickstart'); print(gallery.FOLDER)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == f"{tmp_path / 'hf_finetune' / 'recipes'}\n"
    assert (tmp_path / "quickstart" / "train.jsonl").is_file()
