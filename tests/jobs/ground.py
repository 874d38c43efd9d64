"""What the tests of jobs stand on: Debian's programs, and a place that outlives a test run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def needs(**programs: str) -> None:
    """Skip where a machine can't run a test; on Debian as root that is a failure, for there all of it can be had.

    Args:
        programs: Name of a program: Debian package that has it.
    """
    lacking = sorted({package for program, package in programs.items() if shutil.which(program) is None})
    is_root = os.geteuid() == 0
    if is_root and not lacking:
        return
    why = f"apt-get install {' '.join(lacking)}" if lacking else "root makes namespaces"
    if is_root and Path("/etc/debian_version").exists():
        pytest.fail(f"can't run here: {why}")
    pytest.skip(f"can't run here: {why}")


def kept(name: str) -> Path:
    """A folder that git ignores and later runs find again; `HF_FINETUNE_JOBS` moves it."""
    folder = Path(os.environ.get("HF_FINETUNE_JOBS", ROOT / ".jobs")) / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder
