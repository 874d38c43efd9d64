"""`hf-finetune compare`, on folders of real runs and of runs that never came to their end."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from hf_finetune.cli import main
from hf_finetune.errors import RecipeError
from hf_finetune.reports.compare import compare

EVIL = "a|b <i>*x*</i> \x1b[2J"
RECIPE = """\
task: {{kind: {kind}, text: text{label}}}
model: {{name: "{model}"}}
data: {{train: train.csv}}
adapter: {{kind: lora, r: {r}}}
training: {{epochs: 2, learning_rate: 0.001}}
output: {output}
"""


def folder(place: Path, lines: list[dict[str, Any]], state: str = "done", **recipe: Any) -> str:
    """A run folder with what `compare` reads."""
    place.mkdir()
    given: dict[str, Any] = {"kind": "text_classification", "label": ", label: label", "model": "tiny", "r": 4} | recipe
    (place / "recipe.yaml").write_text(RECIPE.format(output=place, **given), encoding="utf-8")
    reason = None if state == "done" else f"it was {state}"
    (place / "status.json").write_text(json.dumps({"state": state, "reason": reason, "step": 9}))
    (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(place)


def done(loss: float, accuracy: float, **more: Any) -> list[dict[str, Any]]:
    """The last lines of a finished run."""
    rates = {"seconds": 75.0, "samples_per_second": 12.34}
    scores = {"validation_loss": loss, "validation_accuracy": accuracy, "validation_f1.good": 0.5}
    return [{"step": 10, "phase": "train", "loss": 1.0}, {"step": 10, "phase": "summary"} | rates | scores | more]


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    """Two finished runs."""
    return [folder(tmp_path / "a", done(0.5, 0.8)), folder(tmp_path / "b", done(0.6, 0.9), r=8)]


def command(*words: str) -> int:
    """The exit code of the command."""
    try:
        main.main(["compare", *words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def cells(text: str) -> Iterator[list[str]]:
    """Columns of a table, which are apart by two spaces or more."""
    return ([cell.strip() for cell in line.split("  ") if cell.strip()] for line in text.splitlines() if line.strip())


def test_what_differs_and_which_is_best(two: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*two) == 0
    rows = list(cells(capsys.readouterr().out))
    assert rows[0] == two
    assert ["adapter.r", "4", "8"] in rows
    assert ["validation_loss", "0.5000 *", "0.6000"] in rows
    assert ["validation_accuracy", "0.8000", "0.9000 *"] in rows
    assert ["training time", "1:15", "1:15"] in rows
    assert ["samples/s", "12.3", "12.3"] in rows
    assert [row for row in rows if row[0] in ("output", "model.name", "validation_f1.good")] == []


def test_every_metric_only_where_asked_for(two: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command(*two, "--all") == 0
    assert ["validation_f1.good", "0.5000", "0.5000"] in list(cells(capsys.readouterr().out))


def test_an_unfinished_run_is_shown_with_its_last_evaluation_and_never_best(
    two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"step": s, "epoch": s / 9, "phase": "eval", "loss": 0.1 * s, "runtime": 1.0} for s in (3, 1)]
    running = folder(tmp_path / "c", [*lines, {"step": 4, "phase": "train", "samples_per_second": 7.0}], "preempted")
    with (Path(running) / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 5, "phase": "tr')
    assert command(two[0], running) == 0
    out = capsys.readouterr().out
    rows = list(cells(out))
    assert ["state", "done", "preempted"] in rows
    assert ["steps", "10", "4"] in rows
    assert ["metrics of", "the end", "step 1"] in rows
    assert ["validation_loss", "0.5000", "0.1000"] in rows
    assert ["validation_accuracy", "0.8000", "-"] in rows
    assert f"{running}: preempted: it was preempted" in out


def test_runs_of_different_tasks(two: list[str], tmp_path: Path) -> None:
    lines = [{"step": 5, "phase": "summary", "validation_loss": 2.0, "validation_perplexity": 7.4}]
    other = folder(tmp_path / "lm", lines, kind="causal_lm", label="")
    compared = compare([two[0], other])
    assert compared.metrics == {
        "validation_loss": [0.5, 2.0], "validation_accuracy": [0.8, None], "validation_perplexity": [None, 7.4]
    }  # fmt: skip
    assert list(compared.best) == ["validation_loss"]
    assert compared.differences["task.kind"] == ["text_classification", "causal_lm"]
    assert "task.label" in compared.differences


def test_runs_of_several_tasks_are_ranked_by_task(
    two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, loss in (("c", 1.5), ("d", 1.2)):
        scores = {"validation_loss": loss, "validation_perplexity": 4.0}
        folder(tmp_path / name, [{"step": 10, "phase": "summary", **scores}], kind="causal_lm", label="")
    compared = compare([str(tmp_path)])
    assert [Path(run.path).name for run in compared.runs] == ["b", "a", "d", "c"]
    assert [one.sort for one in compared.by_task] == ["validation_accuracy", "validation_loss"]
    assert compared.best["validation_loss"] == [1, 2], "the best of each task"
    monkeypatch.setenv("COLUMNS", "60")
    assert command(str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 60
    first, second = shown.split("causal_lm\n")
    assert first.startswith("text_classification, single_label\n")
    assert "accuracy" not in second
    assert "2 runs, 2 finished, greatest validation_accuracy" in " ".join(first.split())
    assert command(str(tmp_path), "--format", "csv") == 0
    header, *rows = csv.reader(capsys.readouterr().out.splitlines())
    assert {"task.kind", "validation_perplexity", "validation_accuracy"} < set(header)
    assert len(rows) == 4
    with pytest.raises(RecipeError, match=r"no such folder; did you mean "):
        compare([str(tmp_path / "aa")])


def test_json_holds_everything(two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = folder(tmp_path / "c", [{"step": 1, "phase": "eval", "loss": "nan"}], "failed")
    assert command(*two, bad, "--format", "json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [run["state"] for run in told["runs"]] == ["done", "done", "failed"]
    assert told["runs"][2]["metrics"] == {"validation_loss": "nan"}
    assert told["sorted_by"] == "validation_accuracy"
    assert told["differences"] == {"adapter.r": [8, 4, 4]}
    assert told["best"] == {"validation_loss": [1], "validation_accuracy": [0]}
    assert told["runs"][0]["recipe"]["training.learning_rate"] == 0.001


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """A folder of six runs: three finished, one in a folder below, two broken."""
    runs = tmp_path / "runs"
    runs.mkdir()
    for name, accuracy, r in (("a", 0.8, 4), ("b", 0.9, 8), ("c", 0.85, 16)):
        folder(runs / name, done(1 - accuracy / 2, accuracy, test_accuracy=1 - accuracy), r=r)
    (runs / "below").mkdir()
    folder(runs / "below" / "d", [{"step": 3, "phase": "eval", "loss": 0.6, "accuracy": 0.82}], "interrupted")
    for name, content in (("bad", "a: ["), ("worse", "\x00")):
        (runs / name).mkdir()
        (runs / name / "recipe.yaml").write_text(content)
        (runs / name / "status.json").write_text("{{{")
        (runs / name / "metrics.jsonl").write_text('[1]\n{"phase": 3}\n')
    (runs / ".hidden").mkdir()
    return runs


def test_a_folder_of_runs_makes_a_leaderboard(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(many)) == 0
    out = capsys.readouterr().out
    rows = list(cells(out))
    assert [row[0] for row in rows[3:9]] == ["b", "c", "below/d", "a", "bad", "worse"]
    assert rows[3][1:3] == ["done", "0.9000 *"]
    assert rows[5][1:3] == ["interrupted", "0.8200"]
    assert rows[7][1:3] == ["broken", "-"]
    assert "6 runs, 3 finished, greatest validation_accuracy first" in out
    assert f"{many}/bad: broken: can't be read" in out
    assert command(str(many), "--sort", "test_accuracy") == 0
    assert [row[0] for row in list(cells(capsys.readouterr().out))[3:6]] == ["a", "c", "b"]
    assert command(str(many / "a"), str(many / "b"), "--sort", "loss") == 0
    assert [row[0] for row in list(cells(capsys.readouterr().out))[3:5]] == ["b", "a"]
    assert command(str(many), "--sort", "acuracy") == 2
    assert "--sort: no run has the metric 'acuracy'" in capsys.readouterr().err


def test_a_leaderboard_fits_its_terminal_and_says_what_it_leaves_out(
    many: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hf_finetune.log.text.width", lambda: 60)
    assert command(str(many)) == 0
    out = capsys.readouterr().out
    table, remarks = out.split("\n\n")
    assert max(map(len, table.splitlines())) <= 60
    assert "learning" not in out  # equal in all of them
    assert ["c", "done", "0.8500", "16", "1:15"] in list(cells(table))
    assert "they do not fit" in " ".join(remarks.split())


def test_every_format_of_a_leaderboard_has_all_of_it(many: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(str(many), "--format", "csv") == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [Path(row["run"]).name for row in rows] == ["b", "c", "d", "a", "bad", "worse"]
    assert (rows[0]["adapter.r"], rows[0]["validation_accuracy"], rows[4]["adapter.r"]) == ("8", "0.9", "")
    assert command(str(many), "--format", "md") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert lines[2].startswith("| b | done | 0.9000 |")


def test_runs_are_sorted_by_what_they_were_selected_by(many: Path) -> None:
    for name in ("a", "b", "c"):
        file = many / name / "recipe.yaml"
        file.write_text(file.read_text().replace("learning_rate", "best_metric: loss, learning_rate"))
    ranked = compare([str(many)])
    assert ranked.sort == "validation_loss"
    assert [Path(run.path).name for run in ranked.runs][:3] == ["b", "c", "a"]


def test_no_text_breaks_out_of_its_cell(two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = folder(tmp_path / "x|y", done(0.5, 0.8), model=EVIL.replace("\x1b", "\\e"))
    assert command(two[0], odd, "--format", "markdown") == 0
    out = capsys.readouterr().out
    table = out.split("\n\n")[2].splitlines()
    assert {line.replace("\\|", "").count("|") for line in table} == {4}
    assert "x\\|y" in table[0]
    assert not {"\x1b", "<i>", " *x*"} & {part for part in ("\x1b", "<i>", " *x*") if part in out}
    assert "| validation_accuracy | 0.8000 | 0.8000 |" in out
    assert command(two[0], odd) == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda place: None, "there is no such folder"),
        (lambda place: place.mkdir(), "holds no run of hf_finetune"),
        (lambda place: (place.mkdir(), (place / "recipe.yaml").write_text("a: [")), "can't be read"),
    ],
    ids=["nothing", "empty", "no YAML"],
)
def test_a_folder_without_a_run_is_named(
    make: Callable[[Path], Any], says: str, two: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "odd")
    assert command(*two, str(tmp_path / "odd")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"hf_finetune: error: {tmp_path / 'odd'}")
    assert says in line


def test_a_folder_with_a_recipe_alone_is_unknown(two: list[str], tmp_path: Path) -> None:
    bare = folder(tmp_path / "bare", [])
    for name in ("status.json", "metrics.jsonl"):
        (Path(bare) / name).unlink()
    compared = compare([bare])
    assert [(run.state, run.step, run.metrics) for run in compared.runs] == [("unknown", None, {})]
    assert compared.differences == compared.metrics == {}


def test_a_run_that_was_killed_does_not_pass_for_a_running_one(tmp_path: Path) -> None:
    runs = [folder(tmp_path / name, [], "running") for name in ("killed", "alive")]
    for path, beat in zip(runs, ("2026-01-01T00:00:00+00:00", datetime.now(UTC).isoformat()), strict=True):
        (Path(path) / "status.json").write_text(json.dumps({"state": "running", "heartbeat": beat}))
    assert [run.state for run in compare(runs).runs] == ["lost", "running"]


def test_a_real_run_is_read_whole(run: Callable[..., Any]) -> None:
    first = run("training.epochs=1")
    compared = compare([str(first.folder)])
    assert compared.metrics["validation_accuracy"] == [first.outcome.scores["validation"]["accuracy"]]
    assert compared.runs[0].step == first.outcome.steps == 5
    assert compared.runs[0].recipe["adapter.kind"] == "lora"


def test_nothing_heavy_is_imported(two: list[str]) -> None:
    code = "import sys; from hf_finetune.cli.main import main; main(sys.argv[1:]); print(' '.join(sys.modules))"
    told = subprocess.run([sys.executable, "-c", code, "compare", *two], capture_output=True, text=True, check=True)
    modules = {name.partition(".")[0] for name in told.stdout.splitlines()[-1].split()}
    assert modules & {"torch", "transformers", "datasets", "peft", "numpy", "pandas", "sklearn"} == set()
