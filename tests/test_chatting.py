from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked import Server

from hf_finetune.errors import DataError, RecipeError
from hf_finetune.inference import chat
from hf_finetune.inference.chat import LanguageModel, Lines
from hf_finetune.inference.load import Finished, open_run
from hf_finetune.inference.predict import Labels
from hf_finetune.tasks._generation import generate

ROOT = Path(__file__).parent.parent
ASKED = "what is one plus two ?"


@pytest.fixture(scope="module")
def chatting(chatter: Path) -> Finished:
    return open_run(str(chatter))


@pytest.fixture
def writer(chatting: Finished) -> LanguageModel:
    return LanguageModel(chatting, chatting.serve(chatting.model()), 6)


def test_an_answer_in_pieces_is_the_answer_of_evaluation(chatting: Finished, writer: LanguageModel) -> None:
    task: Any = chatting.recipe.task
    prompts = task.ask({"question": [ASKED]}, chatting.tokenizer)
    whole = generate(chatting.model(), chatting.tokenizer, prompts, max_new_tokens=6, batch_size=1)[0]
    assert "".join(writer.answer(ASKED)).strip() == whole.text.strip()


def test_the_chat_is_remembered_until_reset_and_the_system_turn_stays(writer: LanguageModel) -> None:
    first = list(writer.answer(ASKED))
    assert writer.turns == [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "".join(first)}]
    alone = writer.prompt("no .")
    writer.instruct("the film")
    assert writer.turns == []
    assert len(writer.prompt("no .")) < len(alone)
    assert "the film" in writer.tokenizer.decode(writer.prompt("no ."))
    list(writer.answer(ASKED))
    writer.reset()
    assert "the film" in writer.tokenizer.decode(writer.prompt("no ."))
    assert ASKED not in writer.tokenizer.decode(writer.prompt("no ."))


def test_an_answer_that_nobody_wants_any_more_is_stopped_and_kept_as_far_as_it_came(writer: LanguageModel) -> None:
    writer.max_new_tokens = 100
    pieces: Any = writer.answer(ASKED)
    first = next(pieces)
    began = time.monotonic()
    pieces.close()
    assert time.monotonic() - began < 5
    assert writer.turns[1]["content"].startswith(first)


def test_a_chat_that_is_too_long_says_so(writer: LanguageModel) -> None:
    with pytest.raises(DataError, match=r"tokens, and the model has room for 128; write less"):
        list(writer.answer("the film " * 100))


def test_temperature_draws(writer: LanguageModel) -> None:
    writer.max_new_tokens, writer.temperature = 20, 5.0
    assert len({"".join(writer.stream(writer.prompt(ASKED))) for _ in range(5)}) > 1


def test_a_classifier_has_no_language_models_options(classifier: Path) -> None:
    with pytest.raises(RecipeError, match="--temperature is for language models"):
        chat.run(str(classifier), temperature=1.0)


def test_a_pipe_gets_labels_and_nothing_else_also_for_lines_that_would_be_commands(
    server: Server, classifier: Path
) -> None:
    told = "the film is good .\n\nthe plot is bad .\n/nothing\n/exit\nis read\n"
    done = server.run("chat", str(classifier), read=told)
    lines = done.stdout.splitlines()
    assert (done.returncode, len(lines), done.stderr) == (0, 5, "")
    run = open_run(str(classifier))
    labels = Labels(run, run.serve(run.model()))
    assert lines[0] == "".join(Lines(labels).answer("the film is good ."))
    assert lines[0].startswith(("positive  (positive 0.", "negative  (negative 0."))


def test_machines_get_an_object_an_answer(server: Server, chatter: Path) -> None:
    words = ("--max-new-tokens", "4", "--log-format", "json", "--quiet")
    done = server.run("chat", str(chatter), *words, read=ASKED)
    assert (done.returncode, done.stderr) == (0, "")
    (told,) = [json.loads(line) for line in done.stdout.splitlines()]
    assert (told["event"], told["prompt"], told["stopped"]) == ("answer", ASKED, False)
    assert told["answer"] == told["message"]


def test_on_a_terminal_ctrl_c_stops_the_answer_and_ctrl_d_ends(chatter: Path) -> None:
    ours, theirs = pty.openpty()
    line = [sys.executable, "-m", "hf_finetune", "chat", str(chatter), "--max-new-tokens", "90"]
    streams: dict[str, Any] = {"stdin": theirs, "stdout": theirs, "stderr": subprocess.PIPE}
    process = subprocess.Popen(line, cwd=ROOT, start_new_session=True, **streams)
    os.close(theirs)
    assert b"Ctrl-D ends" in until(ours, b"> ")
    os.write(ours, b"/system the film\n")
    until(ours, b"> ")
    os.write(ours, ASKED.encode() + b"\n")
    until(ours, ASKED.encode())
    os.kill(process.pid, signal.SIGINT)
    until(ours, b"> ")
    assert process.poll() is None
    os.write(ours, b"\x04")
    code = process.wait(timeout=300)
    os.close(ours)
    assert process.stderr is not None
    with process.stderr as errors:
        assert (code, errors.read()) == (0, b"")


def until(terminal: int, wanted: bytes) -> bytes:
    """What a terminal shows until it shows this."""
    seen = b""
    while wanted not in seen:
        seen += os.read(terminal, 4096)
    return seen
