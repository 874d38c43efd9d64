"""Trackers besides TensorBoard: what of a run arrives there, and that they can't change or end it."""

from __future__ import annotations

import csv
import importlib.util
import json
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hf_finetune.errors import RecipeError
from hf_finetune.pipeline.check import look
from hf_finetune.pipeline.check import read as read_recipe
from hf_finetune.run.journal import read
from hf_finetune.tracking import others

SHORT = (
    "training.steps=3",
    "training.epochs=null",
    "training.eval_every=2",
    "training.log_every=1",
    "tracking.tensorboard=false",
)
SECRET = "0123456789abcdef" * 3


def needs(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"needs {name}: pip install {name}")


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_csv_has_every_number_of_every_line(run: Callable[..., Any]) -> None:
    done = run(*SHORT, "tracking.also=[csv]")
    lines = read(done.folder / "metrics.jsonl")
    assert {line["phase"] for line in lines} >= {"train", "eval", "summary"}
    for line, row in zip(lines, rows(done.folder), strict=True):
        assert {key: value for key, value in row.items() if value} == {key: str(value) for key, value in line.items()}


def test_a_csv_ends_where_a_resumed_run_begins(tmp_path: Path) -> None:
    lines = [{"step": step, "phase": "train", "loss": 1 / step} for step in (1, 2, 3)]
    first = others.Csv(tmp_path / "metrics.csv")
    first.start([])
    for line in lines:
        first.add(line, None, None, None)
    again = others.Csv(tmp_path / "metrics.csv")
    again.start(lines[:2])
    again.add({"step": 3, "phase": "eval", "a,b": float("nan")}, None, None, None)
    assert [(row["step"], row["loss"], row["a,b"]) for row in rows(tmp_path)] == [
        ("1", "1.0", ""), ("2", "0.5", ""), ("3", "", "nan")
    ]  # fmt: skip


def test_a_csv_that_cannot_be_written_costs_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lost = others.Csv(tmp_path / "none" / "metrics.csv")
    for step in range(3):
        lost.add({"step": step, "phase": "train", "loss": 1.0}, None, None, None)
    assert capsys.readouterr().err.count("rows are lost, training goes on") == 1


def test_what_is_not_installed_is_an_error_of_check(
    tmp_path: Path, classifier: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    text = (classifier.parent / "recipe.yaml").read_text()
    recipe.write_text(f"{text}tracking:\n  report: false\n  also: [wandb, csv, mlflow]\n")
    lines = len(text.splitlines())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reading, _ = read_recipe(recipe)
    found = look(reading, folder=False).located(reading.locate)
    assert [str(problem) for problem in found.errors] == [
        f"{recipe}:{lines + 3}: tracking.also: {name} is not installed; pip install {name}"
        for name in ("wandb", "mlflow")
    ]


def test_models_are_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    others.check(["wandb", "csv"])
    monkeypatch.setenv("WANDB_LOG_MODEL", "end")
    with pytest.raises(RecipeError, match="WANDB_LOG_MODEL would send it the model; unset it"):
        others.check(["wandb"])
    others.check(["csv"])


def expected(folder: Path) -> dict[str, dict[int, float]]:
    """Numbers by name, then step, as trackers are sent them."""
    found: dict[str, dict[int, float]] = {}
    for line in read(folder / "metrics.jsonl"):
        for key, value in others.flat(line).items():
            found.setdefault(key, {})[line["step"]] = value
    return found


@needs("mlflow")
def test_mlflow_has_the_numbers(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(mlflow, "is_tracking_uri_set", lambda: True)
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    done = run(*SHORT, "tracking.also=[mlflow]")
    (kept,) = mlflow.search_runs(output_format="list", search_all_experiments=True)
    assert (kept.info.run_name, kept.info.status) == (done.folder.name, "FINISHED")
    assert float(kept.data.params["training.learning_rate"]) == 3e-3
    client = mlflow.MlflowClient()
    wanted = expected(done.folder)
    assert {"loss", "grad_norm", "eval_accuracy", "eval_final_accuracy", "summary_seconds"} <= set(wanted)
    assert set(kept.data.metrics) == set(wanted)
    for key, values in wanted.items():
        assert {one.step: one.value for one in client.get_metric_history(kept.info.run_id, key)} == pytest.approx(
            values
        )


def logged(content: bytes) -> Iterator[bytes]:
    """Records of a file of wandb, which is a log of LevelDB after 7 bytes: blocks of 32 KiB, of checked pieces."""
    place, record = 7, b""
    while place + 7 <= len(content):
        if 32_768 - place % 32_768 < 7:  # no room for the head of a piece
            place += 32_768 - place % 32_768
        size, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        record += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


@needs("wandb")
def test_wandb_has_the_numbers_and_no_secret(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wandb.proto import wandb_internal_pb2

    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("API_KEY", SECRET), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    done = run(*SHORT, "tracking.also=[wandb]")
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    seen: dict[str, dict[int, float]] = {}
    settings: dict[str, Any] = {}
    for data in logged(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "run":
            assert record.run.display_name == done.folder.name
        settings |= {one.key or one.nested_key[0]: json.loads(one.value_json) for one in record.config.update}
        settings |= {one.key or one.nested_key[0]: json.loads(one.value_json) for one in record.run.config.update}
        row = {(one.key or "/".join(one.nested_key)): json.loads(one.value_json) for one in record.history.item}
        for key, value in row.items():
            seen.setdefault(key, {})[int(row.get("train/global_step", -1))] = value
    wanted = expected(done.folder)
    names = {key: f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}" for key in wanted}
    for key, values in wanted.items():
        assert seen[names[key]] == pytest.approx(values)
    assert settings["training.learning_rate"] == 3e-3
    assert not {"output_dir", "hub_token", "logging_dir"} & set(settings)
    written = [path.read_bytes() for path in (*tmp_path.rglob("*"), *done.folder.rglob("*")) if path.is_file()]
    assert not [content for content in written if SECRET.encode() in content]


@needs("trackio")
def test_trackio_has_the_numbers(run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    done = run(*SHORT, "tracking.also=[trackio]")
    from trackio.sqlite_storage import SQLiteStorage

    logs = SQLiteStorage.get_logs("huggingface", done.folder.name)
    losses = {log["train/global_step"]: log["train/loss"] for log in logs if "train/loss" in log}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in done.lines("train")})


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in ("mlflow", "wandb")])
def test_a_tracker_that_refuses_costs_one_warning(
    name: str,
    run: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    for key, value in (
        ("MLFLOW_TRACKING_URI", f"file:{tmp_path}/file/mlruns"), ("MLFLOW_ALLOW_FILE_STORE", "true"),
        ("WANDB_MODE", "nonsense"), ("WANDB_SILENT", "true"),
    ):  # fmt: skip
        monkeypatch.setenv(key, value)
    if name == "mlflow":
        import mlflow

        monkeypatch.setattr(mlflow, "is_tracking_uri_set", lambda: False)
    else:
        import wandb

        wandb.teardown()  # reads its variables once
    done = run(*SHORT, f"tracking.also=[{name}]")
    assert done.status["state"] == "done"
    assert capsys.readouterr().err.count(f"{name} gets no more numbers") == 1


@pytest.mark.parametrize("name", ["csv", *(pytest.param(name, marks=needs(name)) for name in others.CALLBACKS)])
def test_a_tracker_changes_no_number(
    name: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key, value in (
        ("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri()), ("MLFLOW_ALLOW_FILE_STORE", "true"),
        ("WANDB_MODE", "offline"), ("WANDB_DIR", str(tmp_path)), ("TRACKIO_DIR", str(tmp_path)),
    ):  # fmt: skip
        monkeypatch.setenv(key, value)
    losses = [
        [
            line.get("loss")
            for line in read(run(*SHORT, f"tracking.also=[{also}]", restart=True).folder / "metrics.jsonl")
        ]
        for also in (name, "")
    ]
    assert losses[0] == losses[1]


def test_the_controller_of_a_trainjob_hears_of_the_progress(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[tuple[str | None, dict[str, Any]]] = []

    class Controller(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            heard.append((self.headers["Authorization"], json.loads(body)["trainerStatus"]))
            self.send_response(200)
            self.end_headers()

    (tmp_path / "token").write_text("secret-of-the-pod\n")
    with ThreadingHTTPServer(("127.0.0.1", 0), Controller) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", f"http://127.0.0.1:{server.server_port}/status")
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_TOKEN", str(tmp_path / "token"))
        done = run(*SHORT)
        server.shutdown()
    assert {token for token, _ in heard} == {"Bearer secret-of-the-pod"}
    assert (heard[0][1]["progressPercentage"], heard[-1][1]["progressPercentage"]) == (0, 100)
    last = {one["name"]: float(one["value"]) for one in heard[-1][1]["metrics"]}
    losses = [line["loss"] for line in read(done.folder / "metrics.jsonl") if line["phase"] == "train"]
    assert last["loss"] == losses[-1]
    assert "eval_final_accuracy" in last
