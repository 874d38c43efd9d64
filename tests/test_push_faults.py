"""F32, F33, F35: a Hub that refuses, limits, hangs, breaks off; each ends in time, the adapter stays here."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hubserver import Fault, Hub, Repo, refused
from pushing import REPO, TOKEN, advised, command, environment, start

from hf_finetune.config import credentials


@pytest.fixture
def run(classifier: Path, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(classifier, tmp_path / "run"))


QUICK = ("503_twice", "409_at_the_commit", "reset_after_the_commit", "503", "hangs")
"""Of those below, for `make test`."""
PASSING = {
    "503_twice": [Fault("POST /api/repos/create", times=2)],
    "429_with_retry_after": [Fault("GET /api/models/me/reviews$", status=429, headers={"Retry-After": "1"})],
    "409_at_the_commit": [Fault("POST .*/commit/", status=409)],
    "reset_in_the_middle_of_the_weights": [Fault("PUT /lfs", "reset")],
    "reset_after_the_commit": [Fault("POST .*/commit/", "reset", after=True)],
    "hangs_once": [Fault("POST .*/preupload/", "hang")],
}


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in PASSING]
)
def test_f33_what_passes_is_tried_again_and_makes_one_commit(case: str, hub: Hub, run: Path) -> None:
    hub.faults = [replace(fault) for fault in PASSING[case]]
    assert command("push", str(run), "--repo", REPO, "--timeout", "30" if "hangs" not in case else "12") == 0
    assert all(fault.times == 0 for fault in hub.faults)
    assert len(hub.repos[REPO].log) == 2
    assert len(hub.repos[REPO].tags) == 1
    assert "adapter_model.safetensors" in hub.files(REPO)


def test_f33_the_wait_that_the_hub_asks_for_is_kept(hub: Hub, run: Path) -> None:
    hub.faults = [Fault("POST /api/repos/create", status=429, headers={"Retry-After": "3"})]
    assert command("push", str(run), "--repo", REPO) == 0
    first, second = (at for at, asked in zip(hub.times, hub.requests, strict=True) if "repos/create" in asked)
    assert 3.0 <= second - first < 20.0


REFUSALS = {
    401: "the Hub answered 401 Unauthorized: as the test wants it; the token is missing, or not valid any more",
    403: "the token may not write to me/reviews; use one that may, or give --as-pr for a pull request",
}


@pytest.mark.parametrize("status", REFUSALS)
def test_f33_a_refusal_is_told_at_once_with_what_to_do(
    status: int, hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults = [Fault("POST .*/commit/", status=status, times=99)]
    assert command("push", str(run), "--repo", REPO) == 8
    (line,) = capsys.readouterr().err.splitlines()
    assert REFUSALS[status] in line
    assert len(hub.asked("/commit/")) == 1
    assert len(hub.repos[REPO].log) == 1


def test_f33_a_token_that_is_not_valid(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.token = "hf_another"
    assert command("push", str(run), "--repo", REPO) == 8
    errors = capsys.readouterr().err
    assert "not valid any more; set HF_TOKEN, or run hf auth login" in errors
    assert not any(form in errors for form in credentials.forms(TOKEN))


LASTING = {
    "503": Fault(".", times=999),
    "hangs": Fault(".", "hang", times=999),
    "slow": Fault(".", "slow", times=999),
}


@pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in LASTING]
)
def test_f33_what_does_not_pass_ends_at_the_deadline_with_8(
    case: str, hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.faults = [replace(LASTING[case])]
    before = (run / "adapter" / "adapter_model.safetensors").read_bytes()
    began = time.monotonic()
    assert command("push", str(run), "--repo", REPO, "--timeout", "4") == 8
    assert time.monotonic() - began < 4 + 15
    line = capsys.readouterr().err.splitlines()[-1]
    assert "adapter is finished and whole, but was not uploaded to me/reviews: " in line
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == before
    assert len(hub.repos.get(REPO, Repo(True)).log) <= 1


def test_f33_an_hour_is_not_waited_for(hub: Hub, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.faults = [Fault("PUT /lfs", status=429, times=99, headers={"Retry-After": "3600"})]
    began = time.monotonic()
    assert command("push", str(run), "--repo", REPO, "--timeout", "100") == 8
    assert time.monotonic() - began < 50
    assert "429 Too Many Requests; trying again is due in 3601 s, after the deadline" in capsys.readouterr().err


def test_f32_f35_nobody_answers_and_the_command_that_is_told_works_later(
    hub: Hub, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for endpoint in (refused(), "http://no-such-host.invalid"):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        began = time.monotonic()
        assert command("push", str(run), "--repo", REPO, "--public", "--timeout", "600") == 8
        assert time.monotonic() - began < 60, "without a network, ten minutes of trying are of no use"
        said = capsys.readouterr().err
        assert f"{endpoint} can't be reached" in said
    words = advised(said)
    assert words == ["push", str(run), "--repo", REPO, "--public", "--timeout", "600"]
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    assert command(*words[:-1], "60") == 0
    assert command(*words[:-1], "60") == 0
    assert len(hub.repos[REPO].log) == 2


def children(pid: int) -> list[int]:
    """Processes that a process started."""
    file = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(word) for word in file.read_text().split()] if file.exists() else []


def until(is_true: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_no_upload_outlives_the_command(number: signal.Signals, hub: Hub, run: Path, tmp_path: Path) -> None:
    hub.faults = [Fault(".", "hang", times=99)]
    process = start(environment(hub.url, tmp_path / "home"), "push", str(run), "--repo", REPO, preexec_fn=listen)
    until(lambda: hub.requests)
    (child,) = children(process.pid)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL)
    assert "Traceback" not in output + errors
    until(lambda: not is_alive(child))


def listen() -> None:
    """Hear of Ctrl-C, also where the tests were started in the background, and so ignore it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
