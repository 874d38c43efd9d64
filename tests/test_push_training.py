"""A run with a `hub` block: it uploads itself at its end, and the best checkpoint meanwhile."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import RECIPE, Run
from hubserver import Fault, Hub, Repo, refused
from pushing import REPO, advised, command, environment, start

from hf_finetune.errors import PushError

Start = Callable[..., Run]
BEST = ("training.best_metric=loss", "training.eval_every=1", "hub.every=best", f"hub.repo={REPO}")
PREDICT = """
import json, os, re, sys, torch
rows, found = json.loads(sys.argv[1]), []
for card, folder in (sys.argv[2:4], sys.argv[4:6]):
    os.chdir(folder)
    scope = {}
    exec(re.search(r"```python\\n(.*?)```", open(card).read(), re.S).group(1), scope)
    with torch.no_grad():
        found.append([scope["model"](**scope["tokenizer"](row, return_tensors="pt")).logits.tolist() for row in rows])
json.dump(found, sys.stdout)
assert not any(name.startswith("hf_finetune") for name in sys.modules)
"""


@pytest.mark.slow
def test_a_run_on_a_base_of_the_hub_loads_back_by_its_repository_id_with_equal_predictions(
    hub: Hub, tmp_path: Path, tiny_bert: str, reviews: Callable[[int], str]
) -> None:
    hub.repos["me/tiny"] = Repo(private=True)
    files = {file.name: file.read_bytes() for file in Path(tiny_bert).iterdir()}
    card = b"---\nlicense: other\nlicense_name: tiny\nlicense_link: LICENSE\n---\n# Tiny\n"
    hub.repos["me/tiny"].commit({**files, "README.md": card}, "initial commit", "main")
    hub.large |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(model="me/tiny", data=reviews(96), output=tmp_path / "run"))
    env = environment(hub.url, tmp_path / "home")
    process = start(env, "train", str(recipe), "training.steps=3", f"hub.repo={REPO}", "tracking.report=false")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "uploaded to " in output
    uploaded = tmp_path / "README.md"
    uploaded.write_bytes(hub.files(REPO)["README.md"])
    assert b"base_model: me/tiny\n" in uploaded.read_bytes()
    assert "license_link: https://huggingface.co/me/tiny/blob/main/LICENSE" in uploaded.read_text()
    elsewhere, adapter = tmp_path / "elsewhere", tmp_path / "run" / "adapter"
    elsewhere.mkdir()
    rows = json.dumps(["the film is good .", "the plot was very dull ."])
    words = [rows, str(uploaded), str(elsewhere), str(adapter / "README.md"), str(adapter)]
    fresh = environment(hub.url, tmp_path / "fresh")
    logits = json.loads(subprocess.check_output([sys.executable, "-c", PREDICT, *words], env=fresh))
    assert logits[0] == logits[1]


def test_f32_a_push_that_fails_loses_nothing_and_is_repeated_by_the_command_that_is_told(
    run: Start, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", refused())
    with pytest.raises(PushError) as failure:
        run("training.steps=2", f"hub.repo={REPO}", "hub.timeout=3")
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("done", 8)
    assert status["reason"] == str(failure.value)
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()
    assert (tmp_path / "run/report.md").is_file()
    capsys.readouterr()
    with pytest.raises(PushError):
        run("training.steps=2", f"hub.repo={REPO}", "hub.timeout=3")
    assert "already holds this run, finished" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/status.json").read_text()) == status
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    words = advised(status["reason"])
    assert words == ["push", str(tmp_path / "run")]
    assert (command(*words), command(*words)) == (0, 0)
    assert len(hub.repos[REPO].log) == 2
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert (status["state"], status["exit_code"], status["reason"]) == ("done", 0, None)


def test_a_scheduler_that_gives_the_same_command_again_uploads_what_failed(
    run: Start, hub: Hub, tmp_path: Path
) -> None:
    hub.faults = [Fault("POST .*/commit/", status=403, times=1)]
    words = ("training.steps=2", f"hub.repo={REPO}")
    with pytest.raises(PushError):
        run(*words)
    for _ in range(2):
        assert run(*words).outcome is None
        status = json.loads((tmp_path / "run/status.json").read_text())
        assert (status["state"], status["exit_code"], status["reason"]) == ("done", 0, None)
    assert len(hub.repos[REPO].log) == 2


def test_the_best_checkpoint_is_uploaded_while_training_goes_on_and_the_run_stays_the_same(
    run: Start, hub: Hub
) -> None:
    done = run("training.steps=20", *BEST)
    messages = [message for _, message in hub.repos[REPO].log[1:]]
    assert re.fullmatch(r"Run \w+, best checkpoint so far, step \d+", messages[0])
    assert re.fullmatch(r"Run \w+", messages[-1])
    assert len(hub.repos[REPO].tags) == 1
    plain = run("training.steps=20", *BEST[:2], restart=True)
    assert [line["loss"] for line in plain.lines("train")] == [line["loss"] for line in done.lines("train")]
    assert not list(done.folder.glob(".upload-*"))


@pytest.mark.slow
def test_f34_uploads_of_the_best_that_fail_are_counted_in_the_report_and_end_nothing(
    run: Start, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults = [Fault("POST .*/commit/", status=403, times=1)]
    done = run("training.steps=20", *BEST, "tracking.report=true")
    assert done.status["exit_code"] == 0
    assert [message for _, message in hub.repos[REPO].log][-1].startswith("Run ")
    told = r"hub.every: 1 of \d+ uploads of the best checkpoint so far failed, the last one: the Hub answered 403"
    assert re.search(told, (done.folder / "report.md").read_text())
    assert "warning: the best checkpoint so far was not uploaded" in capsys.readouterr().err


def test_an_upload_that_hangs_never_holds_up_training(run: Start, hub: Hub) -> None:
    hub.faults = [Fault("GET /api/models", "hang", times=1)]
    done = run("training.steps=12", *BEST)
    assert done.status["exit_code"] == 0
    assert len(hub.repos[REPO].log) == 2
