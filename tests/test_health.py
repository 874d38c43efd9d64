"""What HEALTHCHECK and probes are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from hf_finetune.launch import health

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp()


def status(run: Path, state: str, silent: float) -> None:
    """A run whose heart beat last so many seconds ago."""
    beat = datetime.fromtimestamp(NOW - silent, UTC).isoformat()
    run.joinpath("status.json").write_text(json.dumps({"state": state, "step": 7, "heartbeat": beat}))


def test_a_run_is_alive_as_long_as_its_heart_beats(tmp_path: Path) -> None:
    for state, silent, age, said in [
        ("running", 5, 1000, (0, "running, step 7")),
        ("running", 70, 1000, (1, "no heartbeat for 70 s")),
        ("running", 7000, 30, (0, "starting")),
        ("preempted", 7000, 1000, (0, "preempted")),
        ("done", 7000, 1000, (0, "done")),
    ]:
        status(tmp_path, state, silent)
        found, line = health.look(tmp_path, NOW - age, NOW)
        assert (found, said[1] in line) == (said[0], True), line


def test_a_run_that_has_not_begun_is_starting(tmp_path: Path) -> None:
    assert health.look(tmp_path / "none", NOW, NOW)[0] == 0


def test_a_status_that_is_damaged_is_unhealthy(tmp_path: Path) -> None:
    tmp_path.joinpath("status.json").write_text("{")
    assert health.look(tmp_path, NOW - 1000, NOW)[0] == 1


def test_the_command_finds_the_run_and_imports_nothing_heavy(tmp_path: Path) -> None:
    status(tmp_path, "running", -1e9)
    pointer = tmp_path / "pointer"
    heavy = "print(sorted(sys.modules.keys() & {'torch', 'pydantic', 'yaml', 'numpy'}))"
    ask = "runpy.run_module('hf_finetune.launch.health', run_name='__main__')"
    code = f"import sys, runpy\ntry: {ask}\nfinally: {heavy}"
    os.environ[health.VARIABLE] = str(pointer)
    try:
        health.point_to(tmp_path)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    finally:
        del os.environ[health.VARIABLE]
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}: running, step 7\n[]\n")
