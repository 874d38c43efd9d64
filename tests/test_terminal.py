"""What is seen of a run: live on a real pseudo-terminal, as JSON lines, as plain lines, or nothing at all."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import QUICK, RECIPE
from forked import Server
from screens import Terminal

from hf_finetune import log
from hf_finetune.cli import main as cli_main
from hf_finetune.errors import Problem
from hf_finetune.log import lines as log_lines
from hf_finetune.log.lines import Message, Phase

ROOT = Path(__file__).parent.parent
BAR = "━"
HIDDEN = "\x1b[?25l"
Start = Callable[..., "subprocess.Popen[bytes]"]
PAINT = re.compile(r"\x1b\[[\d;]*m")


@pytest.fixture
def recipe(tmp_path: Path, tiny_bert: str, reviews: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> str:
    """A small recipe that runs and reads its data: no other test has prepared the same."""
    monkeypatch.setenv("HF_FINETUNE_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(model=tiny_bert, data=reviews(32), output=tmp_path / "run"))
    return str(file)


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Terminal]]:
    """Makes a terminal that this process writes to from then on; pytest's capture would win over a fixture that did."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    with Terminal() as shown, shown.stream() as stream, pytest.MonkeyPatch.context() as patch:

        def start() -> Terminal:
            patch.setattr(sys, "stdout", stream)
            patch.setattr(sys, "stderr", stream)
            return shown

        yield start
        log.close()


@pytest.fixture
def closed() -> Iterator[None]:
    """Whatever manner a test chooses ends with it."""
    yield
    log.close()


def wait_for(text: str, shown: Terminal, seconds: float = 180) -> None:
    until = time.monotonic() + seconds
    while text not in shown.output and time.monotonic() < until:
        time.sleep(0.02)
    assert text in shown.output


def main(*words: str) -> int:
    """The command line in this process; its exit code."""
    try:
        cli_main.main(words)
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def objects(text: str) -> list[dict[str, Any]]:
    """Each line as the JSON object that it must be."""
    lines = [json.loads(line) for line in text.splitlines()]
    assert all({"time", "level", "event", "message"} <= line.keys() for line in lines)
    return lines


# ---- live ----


def test_a_run_shows_bars_and_leaves_nothing_but_its_lines(recipe: str, live: Callable[[], Terminal]) -> None:
    screen = live()
    assert main(recipe, "training.epochs=2", "checkpoints.every=2") == 0
    wait_for("hf-finetune tensorboard", screen)
    for phase in (
        "reading data",
        f"tokenising train {BAR}",
        "loading the model",
        f"training {BAR}",
    ):
        assert phase in PAINT.sub("", screen.output)
    assert all(part in screen.output for part in ("/4 steps", " left", "grad norm", "accuracy"))
    left = screen.screen()
    assert [line for line in left if BAR in line or "gone" in line] == []
    assert [line.split("/")[0] for line in left if line.startswith("step ")] == [f"step {n}" for n in (1, 2, 3, 4)]
    assert HIDDEN not in screen.output


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes on a terminal, none of which outlives the test."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(shown: Terminal, *command: str) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name != "CI"} | {"TERM": "xterm"}
        environment["COLUMNS"] = "80"
        end = shown.theirs
        words = [sys.executable, *command]
        started.append(subprocess.Popen(words, cwd=ROOT, stdin=end, stdout=end, stderr=end, env=environment))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


def test_ctrl_c_leaves_a_clean_terminal_and_so_does_sigterm(server: Server, recipe: str) -> None:
    words = (recipe, "training.epochs=10000", "training.log_every=20", *QUICK)
    env = {name: value for name, value in os.environ.items() if name != "CI"} | {"TERM": "xterm", "COLUMNS": "80"}
    with Terminal() as shown:
        process = server.start(*words, env=env, streams=(shown.theirs,) * 3)
        wait_for("step 20/", shown)
        process.send(signal.SIGINT)
        assert process.wait(180) == 130
        resumed = server.start(*words, env=env, streams=(shown.theirs,) * 3)
        wait_for("resuming from", shown)
        wait_for("step 60/", shown)
        resumed.send(signal.SIGTERM)
        assert resumed.wait(180) == 143
    assert HIDDEN not in shown.output
    assert f"training {BAR}" in PAINT.sub("", shown.output)
    told = [line for line in shown.screen() if "stopped by " in line]
    assert [line.split(" at ")[0] for line in told] == ["stopped by SIGINT", "stopped by SIGTERM"]
    assert [line for line in shown.screen() if BAR in line or " elapsed" in line] == []


def test_a_process_that_ends_by_force_leaves_a_clean_terminal(start: Start) -> None:
    code = (
        "import os, time; from hf_finetune import log\n"
        "log.open_for()\n"
        "it = log.begin(log.lines.Phase('waiting', 3)); it.detail, it.outcome = 'for', 'ever'; time.sleep(0.6)\n"
        "log.last_words(['rank 1 died'], 10); time.sleep(0.6); os._exit(10)"
    )
    with Terminal() as shown:
        assert start(shown, "-c", code).wait(180) == 10
    assert BAR in shown.output
    assert shown.screen() == ["hf_finetune: error: rank 1 died"]


def test_drawn_lines_are_never_wider_than_the_terminal(start: Start) -> None:
    code = (
        "import time; from hf_finetune import log\n"
        "log.open_for()\n"
        "with log.phase('working') as it: it.detail = 'x' * 300; time.sleep(300)"
    )
    with Terminal(40) as shown:
        process = start(shown, "-c", code)
        wait_for("x" * 36, shown)
        narrow = max(map(len, shown.screen()))
        shown.resize(100)
        wait_for("x" * 96, shown)
        wide = max(map(len, shown.screen()))
        process.kill()
        process.wait()
    assert (narrow, wide) == (40, 100)


def test_what_others_print_stands_above_the_display(live: Callable[[], Terminal]) -> None:
    screen = live()
    log.open_for()
    with log.phase("working", 10, "rows"):
        print("from a library")
        sys.stderr.write("and its complaint\n")
        log.warn("mind the gap")
        time.sleep(0.3)
    log.say("afterwards")
    wait_for("afterwards", screen)
    assert screen.screen() == [
        "from a library", "and its complaint", "hf_finetune: warning: mind the gap", "afterwards"
    ]  # fmt: skip


def test_no_color_is_respected(live: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch) -> None:
    screen = live()
    monkeypatch.setenv("NO_COLOR", "1")
    log.open_for()
    with log.phase("working", 10) as it:
        it.done = 5
        log.warn("no colour")
        time.sleep(0.3)
    wait_for(BAR, screen)
    assert re.findall(r"\x1b\[[\d;]*3\d[\d;]*m", screen.output) == []


@pytest.mark.parametrize(("name", "value"), [("CI", "true"), ("TERM", "dumb")])
def test_without_a_capable_terminal_lines_are_plain(
    name: str, value: str, live: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = live()
    monkeypatch.setenv(name, value)
    log.open_for()
    with log.phase("working", 10):
        log.say("a line")
    wait_for("a line", screen)
    assert screen.output == "a line\r\n"


def test_a_terminal_that_goes_away_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    monkeypatch.setattr(sys, "stdout", os.fdopen(theirs, "w"))
    log.open_for()
    with log.phase("working", 10):
        os.close(ours)
        log.say("into the void")
        time.sleep(0.6)
    log.say("and on")
    log.close()


def test_a_step_costs_next_to_nothing(live: Callable[[], Terminal]) -> None:
    live()
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from hf_finetune.tracking.tracker import Console

    log.open_for()
    console, state, control = Console(("loss",)), TrainerState(max_steps=10_000), TrainerControl()
    arguments: Any = TrainingArguments
    console.on_train_begin(arguments, state, control)
    started = time.perf_counter()
    for state.global_step in range(10_000):
        console.on_step_begin(arguments, state, control)
        console.on_step_end(arguments, state, control)
    assert (time.perf_counter() - started) / 10_000 < 1e-4


# ---- JSON lines ----


def test_every_line_of_a_run_is_one_object(recipe: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main("--log-format", "json", recipe, "data.max_length=6", "data.checks.leakage=off") == 0
    out, err = capfd.readouterr()
    lines = objects(out)
    assert {"note", "phase", "train", "eval", "summary", "warning"} <= {line["event"] for line in lines}
    train = [line for line in lines if line["event"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4]
    assert all(line["loss"] > 0 and line["message"].startswith(f"step {line['step']}/4") for line in train)
    assert (
        lines[-1]["validation_accuracy"]
        == next(line for line in reversed(lines) if line["event"] == "eval")["accuracy"]
    )
    warned = [line for line in lines if line["event"] == "warning"]
    assert {line["level"] for line in warned} == {"warning"}
    assert any("cut" in line["message"] for line in warned)
    assert objects(err) == []


def test_mistakes_are_objects_with_key_file_and_line(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(recipe).write_text(Path(recipe).read_text().replace("r: 4", "ranks: 4"))
    assert main("train", recipe, "--log-format=json", "training.epochs=-1") == 2
    lines = objects(capsys.readouterr().err)
    assert [(line["level"], line["event"], line["code"]) for line in lines] == [("error", "error", 2)] * 2
    assert {(line["key"], line["file"], line["line"]) for line in lines} == {
        ("adapter.ranks", recipe, 4), ("training.epochs", "command line", None)
    }  # fmt: skip


def test_a_check_in_json_lines(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main("check", recipe, "--log-format", "json", "--explain", "--show", "1") == 0
    lines = objects(capsys.readouterr().out)
    assert {"plan", "verdict", "origin", "row"} <= {line["event"] for line in lines}
    assert next(line for line in lines if line["event"] == "verdict")["exit_code"] == 0


def test_usage_errors_crashes_warnings_and_prints_are_objects(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main("trian", "--log-format", "json") == 2

    def crash(words: Any, *, debug: bool) -> None:
        print("one\n\ntwo", end="")
        warnings.warn("odd", RuntimeWarning, stacklevel=1)
        raise KeyError("x")

    monkeypatch.setattr(cli_main, "_run", crash)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main("train", "--log-format", "json") == 1
    out, err = capsys.readouterr()
    assert [line["message"] for line in objects(out)] == ["one", "two"]
    usage, warned, crashed = objects(err)
    assert (usage["code"], usage["event"]) == (2, "error")
    assert (warned["event"], warned["category"], warned["message"]) == ("warning", "RuntimeWarning", "odd")
    assert (crashed["event"], crashed["message"]) == ("crash", "KeyError: 'x'")
    assert "in crash" in crashed["traceback"]


def test_numbers_that_json_lacks_and_any_text_make_one_object() -> None:
    fields = {"loss": float("nan"), "time": "mine", "f1.\n\ud800": [float("inf")], "path": Path("x")}
    line = Message("two\nlines \x1b[2J \u2028", fields=fields).as_json()
    told = json.loads(line)
    assert (line.isascii(), len(line.splitlines())) == (True, 1)
    assert (told["loss"], told["f1.\n\ud800"], told["path"]) == ("nan", ["inf"], "x")
    assert told["time"].endswith("Z")


# ---- plain lines ----


def test_plain_lines_are_what_they_were(recipe: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(recipe, "training.epochs=1") == 0
    out, err = capfd.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert lines[0].startswith("run folder ")
    number = r"[\d.e+-]+"
    values = rf"loss {number}  grad norm {number}  lr {number}  {number} samples/s  \d+ tokens/s"
    step = rf"step 1/2  epoch 0\.50  {values}  \d:\d\d left"
    assert [bool(re.fullmatch(step, line)) for line in lines if line.startswith("step 1")] == [True]
    assert any(re.fullmatch(rf"eval at step 2  loss {number}  accuracy {number} .*", line) for line in lines)
    assert lines[-1].endswith(f"  hf-finetune tensorboard {Path(recipe).parent / 'run'}")
    assert not [line for line in lines if line.startswith(("chosen here", "fast paths"))]


def test_a_quiet_run_says_nothing_and_a_quiet_check_what_is_wrong(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(recipe, "--quiet", "training.epochs=1") == 0
    assert capsys.readouterr() == ("", "")
    assert main("--quiet", "check", recipe, "--restart", "data.max_length=6", "data.checks.leakage=off") == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert all(line.startswith("hf_finetune: warning: ") for line in err.splitlines())
    assert "cut" in err


@pytest.mark.usefixtures("closed")
def test_long_phases_are_told_and_short_ones_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_lines, "LONG_S", 0.1)
    log.open_for()
    with log.phase("short", 10, "rows"):
        pass
    with log.phase("tokenising train", 12_000, "rows") as it:
        it.done = 3_000
        time.sleep(0.4)
    assert capsys.readouterr().out == "tokenising train: 3,000/12,000 rows ...\ntokenising train: 12,000 rows in 0 s\n"
    with log.phase("loading libraries"):
        time.sleep(0.4)
    assert capsys.readouterr().out == "loading libraries ...\nloading libraries took 0 s\n"
    assert [log_lines.duration(seconds) for seconds in (35.2, 59.7, 75)] == ["35 s", "1:00", "1:15"]


@pytest.mark.usefixtures("closed")
def test_other_ranks_say_errors_alone(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    log.open_for()
    log.say("hello")
    log.warn("mind")
    log.report([Problem("is full", key="output")], 5)
    assert capsys.readouterr() == ("", "hf_finetune: error: rank 3: output: is full\n")


@pytest.mark.parametrize("options", [[], ["--log-format", "json"]])
def test_nobody_reads_and_a_full_disk(options: list[str]) -> None:
    code = (
        "import sys; from hf_finetune import log; from hf_finetune.cli.main import open_terminal\n"
        "open_terminal(sys.argv[1:])\n"
        "for n in range(3000): log.say(f'line {n}')\n"
        "log.warn('w'); log.close()"
    )
    command = [sys.executable, "-c", code, *options]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (0, 1)
    reader = subprocess.Popen(["head", "-1"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    done = subprocess.run(command, cwd=ROOT, stdout=reader.stdin, stderr=subprocess.PIPE, text=True, check=False)
    reader.communicate()
    assert (done.returncode, len(done.stderr.splitlines())) == (0, 1)


def test_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log.say("label \x1b]0;title\x07 \u202eevil\ttab")
    assert capsys.readouterr().out == "label \\x1b]0;title\\x07 \\u202eevil\ttab\n"


def test_a_terminal_without_a_letter_shows_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "out").open("w", encoding="latin-1") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        log.say("żółw")
        log.say("next")
    assert (tmp_path / "out").read_text() == "\\u017c\\xf3\\u0142w\nnext\n"


# ---- phases ----


def test_the_time_left_counts_from_where_a_run_goes_on() -> None:
    it = Phase("training", total=100, first=50, done=60)
    it.started -= 10
    assert it.left() == pytest.approx(40, rel=0.01)
    assert Phase("training", total=100).left() is None


def test_rows_are_counted_though_other_processes_encode_them(
    tmp_path: Path, tiny_bert: str, reviews: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_finetune import device
    from hf_finetune.data import encoding, prepare
    from hf_finetune.models import pretrained
    from hf_finetune.recipe import Recipe

    seen: dict[str, Phase] = {}

    @contextmanager
    def phase(name: str, total: int | None = None, unit: str = "") -> Iterator[Phase]:
        seen[name] = it = Phase(name, total, unit)
        yield it
        it.now()  # before the file that counts is gone

    monkeypatch.setattr(encoding, "phase", phase)
    monkeypatch.setattr(encoding, "FEW_ROWS", 100)
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE.format(model=tiny_bert, data=reviews(400), output=tmp_path / "run"))
    made = Recipe.load(str(file), ["data.workers=2", f"data.cache={tmp_path / 'cache'}"])
    prepare.prepare(made, pretrained.load_tokenizer(made.model), device.alone(made))
    assert {name: (it.done, it.total) for name, it in seen.items() if it.total} == {
        "tokenising train": (300, 300), "tokenising validation": (100, 100)
    }  # fmt: skip


def test_check_prints_one_json_document_however_long_it_takes(
    recipe: str, closed: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(log_lines, "LONG_S", 0.0)
    assert main("check", recipe, "--format", "json") == 0
    assert json.loads(capsys.readouterr().out)["exit_code"] == 0
