"""Rules of the queue, with small scripts as workers: exit codes, and a server that dies between any two writes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_finetune.service import supervisor as module
from hf_finetune.service.executors.base import Work
from hf_finetune.service.executors.local import Local
from hf_finetune.service.settings import Settings
from hf_finetune.service.store import Page, Store
from hf_finetune.service.supervisor import Place, Supervisor

SCRIPT = 'echo $$ > worker.lock; echo run >> starts; sleep 0.02; [ "$0" = 137 ] || echo "{\\"code\\": $0}" > exit.json'
CHECKED = {"chosen": {"epochs": 1, "batch_size": 8}, "numbers": {"micro_batch_rows": 4}}


class Scripts(Local):
    """Workers that end with the codes of a job, one a start; the last one for ever."""

    def command(self, work: Work, lock: int) -> list[str]:
        """Give a shell's."""
        codes = json.loads((work.folder / "codes.json").read_text())
        file = work.folder / "starts"
        number = len(file.read_text().splitlines()) if file.exists() else 0
        return ["sh", "-c", SCRIPT, str(codes[min(number, len(codes) - 1)])]


def queued(store: Store, number: int, codes: list[int], **more: Any) -> str:
    """Make a job that has been checked; returns its id."""
    job = f"ftjob-{number:04}"
    head: dict[str, Any] = {
        "project": "default",
        "model": "m",
        "suffix": None,
        "base": {"name": "m"},
        "error": None,
        "overrides": [],
    }
    now: dict[str, Any] = {
        "state": "queued",
        "wanted": "run",
        "handle": None,
        "places": [],
        "priority": 0,
        "attempts": 0,
        "numbers": {},
    }
    store.add_job({**head, **now, "id": job, "fine_tuned_model": None, **more})
    folder = store.folder_of_job(job)
    (folder / "codes.json").write_text(json.dumps(codes))
    (folder / "checked.json").write_text(json.dumps(CHECKED))
    return job


def until_over(store: Store, look: Callable[[], Any]) -> None:
    """Look until no job is left."""
    end = time.monotonic() + 60
    while store.active():
        look()
        assert time.monotonic() < end, store.active()
        time.sleep(0.01)


def test_each_exit_code_has_its_consequence(tmp_path: Path) -> None:
    store = Store(tmp_path)
    table: dict[tuple[int, ...], tuple[str, str | None, int, int]] = {
        # codes of the starts: state, error, tries that it cost, starts
        (0,): ("succeeded", None, 0, 1),
        (8,): ("succeeded", None, 0, 1),
        (1,): ("failed", "internal_error", 0, 1),
        (2,): ("failed", "invalid_recipe", 0, 1),
        (3,): ("failed", "invalid_training_file", 0, 1),
        (4,): ("failed", "invalid_model", 0, 1),
        (6,): ("failed", "diverged", 0, 1),
        (9,): ("failed", "invalid_checkpoint", 0, 1),
        (143, 130, 143, 143, 143, 0): ("succeeded", None, 0, 6),
        (10, 10, 10, 0): ("succeeded", None, 3, 4),
        (10, 137, 10, 10): ("failed", "worker_lost", 3, 4),
        (5, 0): ("succeeded", None, 1, 2),
        (5,): ("failed", "storage_error", 3, 4),
        (7, 0): ("succeeded", None, 0, 2),
        (7,): ("failed", "out_of_memory", 0, 2),
    }
    jobs = {queued(store, number, list(codes)): codes for number, codes in enumerate(table)}
    queue = Supervisor(store, Scripts(), [Place({})] * 4, Settings(retry_seconds=0.01))
    until_over(store, queue.look)
    for job, codes in jobs.items():
        found, folder = store.job(job) or {}, store.folder_of_job(job)
        error = found["error"] and found["error"]["code"]
        starts = len((folder / "starts").read_text().splitlines())
        assert (found["state"], error, found["attempts"], starts) == table[codes], codes
        assert bool(found["fine_tuned_model"]) == (found["state"] == "succeeded")
        assert found["overrides"] == (["training.micro_batch=2"] if codes[0] == 7 else [])
    said = (store.folder_of_job("ftjob-0001") / "events.jsonl").read_text()
    assert "warn" in said, "not uploaded"


def test_lost_jobs_back_off(tmp_path: Path) -> None:
    store = Store(tmp_path)
    job = queued(store, 0, [137])
    queue = Supervisor(store, Scripts(), [Place({})], Settings(retry_seconds=100))
    end = time.monotonic() + 30
    while not (found := store.job(job) or {})["attempts"]:
        queue.look()
        assert time.monotonic() < end
    assert found["not_before"] - time.time() == pytest.approx(100, abs=20)
    for _ in range(20):
        queue.look()
    assert (store.folder_of_job(job) / "starts").read_text() == "run\n", "it waits"


def test_a_job_whose_files_are_damaged_keeps_no_other_waiting(tmp_path: Path) -> None:
    store = Store(tmp_path)
    damaged, lost, sound = (queued(store, number, [0], priority=-number) for number in range(3))
    (store.folder_of_job(damaged) / "checked.json").write_text('{"chosen": ')
    (store.folder_of_job(damaged) / "events.jsonl").write_text("\0\0\0\n\0\n")
    shutil.rmtree(store.folder_of_job(lost))  # an older backup of the folders
    queue = Supervisor(store, Scripts(), [Place({})] * 3, Settings(retry_seconds=0.01))
    end = time.monotonic() + 30
    while (store.job(sound) or {})["state"] != "succeeded":
        queue.look()
        assert time.monotonic() < end, store.active()
        time.sleep(0.01)


class Died(BaseException):
    """The server was killed here."""


def test_a_server_that_dies_between_any_two_writes_loses_and_doubles_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run dies once at its n-th write, before or after it, and a new server goes on; until no write is left."""
    state = {"left": 0}

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any, **named: Any) -> Any:
            for done in (False, True):
                state["left"] -= 1
                if state["left"] == 0:
                    raise Died
                if not done:
                    answer = function(*words, **named)
            return answer

        return call

    monkeypatch.setattr(Store, "change", deadly(Store.change))
    monkeypatch.setattr(Store, "add_file", deadly(Store.add_file))
    monkeypatch.setattr(Local, "start", deadly(Local.start))
    monkeypatch.setattr(module, "note", deadly(module.note))
    died, moment = True, 0
    while died:
        died, moment = False, moment + 1
        store = Store(tmp_path / str(moment))
        jobs = {
            queued(store, 0, [143, 0]): ("succeeded", 2),
            queued(store, 1, [3]): ("failed", 1),
            queued(store, 2, [0], wanted="pause"): ("paused", 0),
            queued(store, 3, [10, 0]): ("succeeded", 2),
            queued(store, 4, [0], state="validating_files", wanted="cancel"): ("cancelled", 0),
        }
        state["left"] = moment
        queue = Supervisor(store, Scripts(), [Place({})] * 2, Settings(retry_seconds=0))
        try:
            until_over(store, queue.look)
        except Died:
            died = True
            queue = Supervisor(store, Scripts(), [Place({})] * 2, Settings(retry_seconds=0))
            until_over(store, queue.look)
        for job, (expected, starts) in jobs.items():
            found, folder = store.job(job) or {}, store.folder_of_job(job)
            assert found["state"] == expected, (moment, found)
            assert found == json.loads((folder / "job.json").read_text()), moment
            ran = (folder / "starts").read_text().split() if (folder / "starts").exists() else []
            assert len(ran) == starts, f"moment {moment}: {job} was started {len(ran)} times"
            said = [json.loads(line)["message"] for line in (folder / "events.jsonl").read_text().splitlines()]
            assert said[-1].startswith(
                {
                    "succeeded": "The job has successfully completed",
                    "failed": "The job failed: ",
                    "paused": "Fine-tuning job paused",
                    "cancelled": "The job was cancelled",
                }[expected]
            )
            assert said.count(said[-1]) == 1, (moment, said)
        results, _ = store.files("default", None, Page(20))
        assert len(results) == 2, moment
    assert moment > 20


class Recorder(Local):
    """Starts nothing: only the order is looked at."""

    def __init__(self) -> None:
        self.started: list[tuple[str, bool, str | None]] = []
        """Job, whether it is only checked, and its devices."""
        self.stopped: list[str] = []

    def start(self, work: Work) -> str:
        """Note it."""
        self.started.append((work.folder.name, work.only_check, work.environment.get("CUDA_VISIBLE_DEVICES")))
        return "1"

    def poll(self, folder: Path, handle: str) -> Any:
        """Say that it works, or was stopped."""
        return 143 if folder.name in self.stopped else "alive"

    def stop(self, folder: Path, handle: str, *, at_once: bool = False) -> bool:
        """Note it."""
        self.stopped.append(folder.name)
        return True


def waiting(store: Store, *needs: tuple[str, int, int], first: int = 0) -> None:
    """Keep jobs that wait: state, bytes of memory, priority."""
    head: dict[str, Any] = {
        "project": "default",
        "wanted": "run",
        "handle": None,
        "places": [],
        "attempts": 0,
        "overrides": [],
    }
    for number, (state, need, priority) in enumerate(needs, first):
        numbers = {"memory_bytes": need}
        store.add_job({**head, "id": f"ftjob-{number}", "state": state, "priority": priority, "numbers": numbers})


def test_small_jobs_share_a_device_where_the_estimates_fit(tmp_path: Path) -> None:
    store, recorder = Store(tmp_path), Recorder()
    waiting(store, *[("queued", 40, 0)] * 3, ("queued", 5, -1))
    Supervisor(store, recorder, [Place({}, 100)], Settings(jobs_per_device=3, preempt=False)).look()
    started = [job for job, *_ in recorder.started]
    assert started == ["ftjob-0", "ftjob-1"], "a third does not fit, and none overtakes it"


def test_none_is_stopped_for_a_job_that_may_be_refused(tmp_path: Path) -> None:
    store, recorder = Store(tmp_path), Recorder()
    waiting(store, ("queued", 1, 0))
    supervisor = Supervisor(store, recorder, [Place({})])
    supervisor.look()
    waiting(store, ("validating_files", 1, 5), first=1)
    supervisor.look()
    assert recorder.started[-1] == ("ftjob-1", True, None)
    assert recorder.stopped == []
    store.change("ftjob-1", ["validating_files"], state="queued", handle=None)
    supervisor.look()
    assert recorder.stopped == ["ftjob-0"]


def test_a_job_on_several_devices_gets_them_at_once_and_is_not_overtaken(tmp_path: Path) -> None:
    store, recorder = Store(tmp_path), Recorder()
    places = [Place({"CUDA_VISIBLE_DEVICES": str(index)}) for index in range(4)]
    supervisor = Supervisor(store, recorder, places, Settings(retry_seconds=0))
    queued(store, 0, [])
    queued(store, 1, [], devices=2)
    large, small = queued(store, 2, [], devices=2), queued(store, 3, [])
    supervisor.look()
    assert recorder.started == [("ftjob-0000", False, "0"), ("ftjob-0001", False, "1,2")], "one place is not two"
    recorder.stopped.append("ftjob-0000")  # by somebody else; it is queued again, as the oldest
    store.change("ftjob-0000", ["queued", "running"], wanted="cancel")
    supervisor.look()
    supervisor.look()
    assert [job for job, *_ in recorder.started[2:]] == [large]
    assert (store.job(large) or {})["places"] == [0, 3]
    # One of higher priority takes as many places as it lacks: those of the lowest, and of these of the youngest.
    urgent = queued(store, 4, [], devices=2, priority=5)
    supervisor.look()
    assert recorder.stopped[1:] == [large]
    queued(store, 5, [], devices=4, priority=1)
    for _ in range(3):
        supervisor.look()
    assert recorder.started[3:4] == [(urgent, False, "0,3")]
    assert recorder.stopped[1:] == [large], "to stop one more would not suffice"
    assert (store.job(small) or {})["handle"] is None
    beyond = queued(store, 6, [], devices=9, priority=9)
    supervisor.look()
    events = (store.folder_of_job(beyond) / "events.jsonl").read_text()
    assert "The job waits for 9 devices, and there are 4" in events
