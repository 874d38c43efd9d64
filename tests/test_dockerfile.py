"""What can be said of the Dockerfile without building it; tests/jobs/test_image.py builds and runs it."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "Dockerfile").read_text()


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not installed: pip install '.[jobs]'")
    done = subprocess.run([program, "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_s23_the_base_is_pinned_by_digest() -> None:
    assert re.search(r"^ARG BASE=python:3\.\d+\.\d+-slim-\w+@sha256:[0-9a-f]{64}$", TEXT, re.MULTILINE)
    assert re.findall(r"^FROM (\S+)", TEXT, re.MULTILINE) == ["${BASE}", "${BASE}"]


def test_s20_every_package_is_held_to_a_hash() -> None:
    installs = re.findall(r"pip install ((?:[^\n]|\\\n)*?)(?:\s&&|\n[A-Z#]|\n\n)", TEXT.replace("\\\n", " "))
    assert len(installs) == 3
    assert all("--require-hashes" in words or "--no-index" in words for words in installs)


def test_what_is_copied_is_let_through() -> None:
    let_through = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [line.split()[1:-1] for line in TEXT.splitlines() if line.startswith("COPY") and "--from" not in line]
    assert {word for words in copied for word in words} == let_through
    assert all((ROOT / name).exists() for name in let_through)
