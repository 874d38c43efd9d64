"""`hf-finetune tensorboard`: a real TensorBoard, started, asked, and ended."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

from hf_finetune.errors import RecipeError
from hf_finetune.tracking import logdir
from hf_finetune.tracking.logdir import LogDir


def test_the_verb_starts_tensorboard_and_ctrl_c_ends_it_quietly(classifier: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "hf_finetune",
        "tensorboard",
        str(classifier),
        "--port",
        "0",
        "--host",
        "127.0.0.1",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        line = started.stdout.readline()
        found = re.fullmatch(rf"TensorBoard of {classifier}: (http://127\.0\.0\.1:\d+/)\S* \(Ctrl-C ends it\)\n", line)
        assert found, line
        with urlopen(found[1], timeout=60) as answer:
            assert answer.status == 200
        runs: list[str] = []
        end = time.monotonic() + 60
        while not runs and time.monotonic() < end:  # the events are read in the background
            with urlopen(f"{found[1]}data/runs", timeout=60) as answer:
                runs = json.load(answer)
            time.sleep(0.1)
        started.send_signal(signal.SIGINT)
        assert started.communicate(timeout=60) == ("", "")
    assert started.returncode == 0
    assert runs == [classifier.name], "by its name, and not as `.`"


def test_why_tensorboard_does_not_start_is_said(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"TensorBoard ended: .*999999"):
        logdir.serve(LogDir(str(classifier)), "it", ["--port=999999"])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="pip install tensorboard"):
        logdir.serve(LogDir(str(classifier)), "it", [])
