"""`hf-finetune check` as a person meets it: everything at once, nothing loaded, a plan at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import RECIPE
from forked import Server
from huggingface_hub import constants

from hf_finetune.cli import main

LIGHT = (
    "import sys; from hf_finetune.cli.main import main\ntry: main(sys.argv[1:])\nfinally: print(' '.join(sys.modules))"
)


@pytest.fixture
def recipe(tmp_path: Path, tiny_bert: str, reviews: Callable[[int], str]) -> Path:
    """A small recipe that can run."""
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(model=tiny_bert, data=reviews(96), output=tmp_path / "run"))
    return file


@pytest.fixture
def check(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `check` in this process: exit code, stdout, stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        code = 0
        try:
            main.main(["check", *map(str, arguments)])
        except SystemExit as end:
            code = int(end.code or 0)
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


def test_a_recipe_that_can_run_gets_a_plan(recipe: Path, check: Callable[..., Any]) -> None:
    code, out, err = check(recipe)
    assert (code, err) == (0, "")
    names = " ".join(line.split()[0] for line in out.splitlines()[:-1])
    assert names == "task model train validation labels steps padding machine memory checkpoints disk"
    assert "72 rows" in out
    assert "10 steps of 16 rows" in out
    assert out.splitlines()[-1].endswith("this recipe can run")
    assert not (recipe.parent / "run").exists()
    assert "\n  chosen " in check(recipe, "--verbose")[1]


def test_of_a_stream_the_first_rows_are_looked_at(recipe: Path, check: Callable[..., Any]) -> None:
    streamed = ["data.streaming=true", "data.validation_share=null", "training.epochs=null", "training.steps=2"]
    streamed.append("task.labels=[negative,positive]")
    code, out, err = check(recipe, *streamed)
    assert code == 0, err
    assert "all 96 rows of a stream looked at: 96 rows," in out
    assert out.endswith(": this recipe can run\n")
    many = recipe.parent / "many.csv"
    many.write_text("text,label\n" + "the film is good,positive\n" * 1_000 + "the film is good,\n")
    code, out, err = check(recipe, *streamed, f"data.train={many}")
    assert code == 0, err
    assert "first 1,000 rows of a stream looked at: 1,000 rows," in out
    assert out.endswith("this recipe can run; training rows after the first 1,000 are checked as they are read\n")
    many.write_text("text,label\nthe film is good,\nthe film is bad,positiv\n")
    code, _, err = check(recipe, *streamed, f"data.train={many}")
    assert (code, err.count("error: "), err.count("; the row: ")) == (3, 2, 2)


def test_the_plan_says_what_the_run_then_does(recipe: Path, check: Callable[..., Any]) -> None:
    from hf_finetune.pipeline.train import train as run_recipe

    said = json.loads(check(recipe, "--format", "json")[1])
    plan, numbers = said["plan"], said["numbers"]
    outcome = run_recipe(recipe).outcome
    assert outcome is not None
    trained, total = outcome.parameters
    assert f"{total:,} parameters, {trained:,} trained" in plan["model"]
    assert plan["steps"].startswith(f"{outcome.steps} steps")
    assert (numbers["parameters"], numbers["trained_parameters"]) == (total, trained)
    train, counted = outcome.prepared.reports["train"], numbers["splits"]["train"]
    assert (numbers["total_steps"], counted["kept_rows"]) == (outcome.steps, train.kept)
    assert (counted["all_tokens"], counted["longest_tokens"]) == (train.tokens, train.longest)
    assert sum(numbers["memory_parts_bytes"].values()) == numbers["memory_bytes"] > 1_000_000
    assert numbers["disk_free_bytes"] > numbers["disk_bytes"] > 0
    assert float(plan["padding"].rstrip("%")) / 100 == pytest.approx(outcome.rates["padding_share"], abs=0.03)


def test_mistakes_of_recipe_data_and_model_come_in_one_report(recipe: Path, check: Callable[..., Any]) -> None:
    rows = "text,label\n" + "the film is good,positive\n" * 8 + ",negative\nthe plot is weak,negative\n"
    (recipe.parent / "bad.csv").write_text(rows)
    code, _, err = check(
        recipe, f"data.train={recipe.parent}/bad.csv", "adapter.target_modules=[quary]", "data.max_length=300",
        "training.warmup_steps=999",
    )  # fmt: skip
    assert code == 2
    told = [line for line in err.splitlines() if "error" in line]
    assert all(line.startswith("hf_finetune: error: ") for line in told)
    wanted = ["training.warmup_steps", "empty_text", "adapter.target_modules", "data.max_length"]
    assert [sum(key in line for line in told) for key in wanted] == [1, 1, 1, 1]


@pytest.mark.parametrize("verb", ["check", "train"])
def test_recipe_mistakes_take_a_moment_and_no_torch(verb: str, recipe: Path) -> None:
    recipe.write_text(recipe.read_text().replace("dropout", "dropuot").replace("lora,", "lora, dropuot: 0.1,"))
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", LIGHT, verb, str(recipe)], capture_output=True, text=True, check=False, timeout=60
    )
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    assert done.returncode == 2
    assert f"{recipe}:4: adapter.dropuot: unknown key; did you mean 'dropout'?" in done.stderr
    modules = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert modules & {"torch", "transformers", "datasets", "peft", "accelerate", "numpy", "pandas"} == set()
    assert seconds < 2  # of processor time: under half a second on a quiet machine, twice as much beside other work


def test_findings_for_machines(recipe: Path, check: Callable[..., Any]) -> None:
    code, out, err = check(recipe, "--format", "json", "task.label=lable", "training.learning_rate=0")
    report = json.loads(out)
    assert (code, report["exit_code"], err) == (2, 2, "")
    first = report["findings"][0]
    assert (first["level"], first["exit_code"], first["key"]) == ("error", 2, "training.learning_rate")
    assert {finding["exit_code"] for finding in report["findings"]} == {2, 3}


def test_a_warning_stops_nothing_and_can_be_an_error(recipe: Path, check: Callable[..., Any]) -> None:
    short = ("data.max_length=6", "data.checks.leakage=off")
    code, out, err = check(recipe, *short)
    assert code == 0, err
    assert "warning: " in err
    assert "are cut to 6 tokens" in err
    assert out.splitlines()[-1].startswith("0 errors, ")
    assert check(recipe, *short, "data.checks.cut=error")[0] == 3
    assert check(recipe, *short, "data.checks.cut=off")[2].count("are cut to") == 0


def test_each_value_is_explained(recipe: Path, check: Callable[..., Any]) -> None:
    base = recipe.rename(recipe.parent / "base.yaml")
    recipe.write_text("extends: base.yaml\ntraining: {learning_rate: 1e-4}\n")
    _, out, _ = check(recipe, "--explain", "adapter.r=2")
    origins = {line.split()[0]: line.rpartition("# ")[2] for line in out.splitlines() if "# " in line}
    assert origins["training.learning_rate"] == f"{recipe}:2"
    assert origins["training.batch_size"] == f"{base}:5"
    assert (origins["adapter.r"], origins["adapter.dropout"]) == ("command line", "default")


def test_rows_are_shown_as_the_model_sees_them(recipe: Path, check: Callable[..., Any]) -> None:
    _, out, _ = check(recipe, "--show", "2")
    assert "[CLS]" in out
    assert "positive" in out


def test_the_data_report_is_written_also_where_the_data_are_bad(recipe: Path, check: Callable[..., Any]) -> None:
    page = recipe.parent / "data.html"
    code, _, err = check(recipe, "--report", page, "data.max_length=5", "data.checks.cut=error")
    assert code == 3
    assert "<!doctype html>" in page.read_text()[:100].lower()
    assert f"data report: {page}" in err


def test_an_earlier_run_in_the_folder_is_a_finding(recipe: Path, check: Callable[..., Any]) -> None:
    run = recipe.parent / "run"
    run.mkdir()
    (run / "thesis.tex").write_text("years of work")
    code, _, err = check(recipe)
    assert code == 2
    assert f"{recipe}:6: output: " in err
    assert "no run of hf_finetune" in err


def test_a_failed_check_leaves_the_folder_free_for_the_next_try(recipe: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main.main(["train", str(recipe), "adapter.target_modules=[quary]"])
    assert end.value.code == 4
    status = json.loads((recipe.parent / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 4)
    main.main(["train", str(recipe), "training.epochs=1"])
    assert json.loads((recipe.parent / "run" / "status.json").read_text())["state"] == "done"


def test_labels_are_counted_in_the_rows_that_are_used(recipe: Path, check: Callable[..., Any]) -> None:
    rows = [{"text": f"a film {'so ' * n}fine", "label": ("good", "bad")[n % 2]} for n in range(24)]
    file = recipe.parent / "some.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in [*rows, {"text": "", "label": "good"}]))
    out = check(recipe, f"data.train={file}", "data.validation_share=null", "data.checks.empty_text=warn")[1]
    assert "bad 12, good 12" in out


def test_rows_to_show_are_a_number(recipe: Path, check: Callable[..., Any]) -> None:
    for word in ["-1", "two"]:
        code, _, err = check(recipe, "--show", word)
        assert code == 2
        assert f"must be a number of rows, not {word!r}" in err


def test_json_holds_whatever_is_asked_for(recipe: Path, check: Callable[..., Any]) -> None:
    told = json.loads(check(recipe, "--explain", "--show", "1", "--format", "json")[1])
    assert {"key": "adapter.dropout", "value": "0.0", "origin": "default"} in told["origins"]
    assert told["rows"][0].startswith("row 1: ")


def test_values_of_a_recipe_with_mistakes_are_not_explained_silently(recipe: Path, check: Callable[..., Any]) -> None:
    code, _, err = check(recipe, "--explain", "training.epochs=0")
    assert code == 2
    assert "no values to explain: correct the errors first" in err


def test_a_report_that_cannot_be_written_is_an_error_like_others(recipe: Path, check: Callable[..., Any]) -> None:
    code, out, _ = check(recipe, "--report", recipe.parent / "nowhere" / "page.html", "--format", "json")
    assert code == json.loads(out)["exit_code"] == 5


@pytest.mark.parametrize("leaves", [True, False])
def test_neither_a_closed_pipe_nor_a_narrow_encoding_is_a_traceback(
    server: Server, leaves: bool, recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    reader = subprocess.Popen(["head", "-c", "1"] if leaves else ["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    done = server.run("check", str(recipe), "--explain", "--show", "1", streams=(None, reader.stdin, None))
    said, _ = reader.communicate()
    assert (done.returncode, done.stderr, len(said) == 1) == (0, "", leaves)


def test_what_the_hub_lacks_is_asked_for_once(
    recipe: Path, check: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path.rpartition("/")[2])
            self.send_error(404)

        do_GET = do_HEAD  # noqa: N815 (the library's name)

        def log_message(self, *_: object) -> None:
            """Keep quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{hub.server_port}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        code, _, _ = check(recipe, "model.name=owner/nothing")
        hub.shutdown()
    assert code == 4
    assert "config.json" in asked
    assert not any(name.startswith("tokenizer") for name in asked)
