"""The queue: starts jobs where there is room, and decides by the exit codes of their workers what comes next.

One server of a root looks after the queue at a time: the one that holds the lock on `ROOT/supervisor.lock`. The kernel
frees a killed server's lock, and another one takes over within a quarter of a second. The lock is a file, because the
files of ROOT are what all servers share: it also holds while a database is away.
"""

from __future__ import annotations

import fcntl
import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_finetune.errors import INTERRUPTED, PREEMPTED, OutOfMemoryError, PeerError, PushError, StorageError
from hf_finetune.run.files import discard
from hf_finetune.service import batch_worker, history, views, worker
from hf_finetune.service.delivery import Deliveries
from hf_finetune.service.executors.base import ALIVE, KILLED, Executor, Work, exit_code
from hf_finetune.service.settings import Settings
from hf_finetune.service.store import Store, now

SECONDS = 0.25
"""Between two looks at the jobs."""
PAUSE = 2.0
"""After a look that failed: what is away must not fill the log."""
RETRIES = 3
"""Times that a job is queued again after its worker was lost, or could not write."""
STARTING = "starting"
"""Handle of a worker whose own one is not known: the service was killed while it started it."""
SHARE = 0.9
"""Of a device's memory, for jobs that share it: their need is an estimate."""
WITH_SERVER_S = 30.0
"""Seconds after the start of a server in which the loss of an earlier worker is that of the machine, not of the job."""
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """A GPU, a part of the CPU, or a place in the queue of a scheduler."""

    environment: dict[str, str]
    """Variables of the workers that train there."""
    memory: int | None = None
    """Bytes; None where a scheduler knows."""


class Supervisor:
    """Watches all jobs of a root.

    Args:
        store: The jobs.
        executor: Runs them.
        places: Where they train.
        settings: How the queue works.
    """

    def __init__(
        self, store: Store, executor: Executor, places: Sequence[Place], settings: Settings | None = None
    ) -> None:
        self.store, self.executor, self.places = store, executor, places
        self.settings = settings or Settings()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="supervisor", daemon=True)
        self._began = 0.0
        self._earlier = set[str]()
        """Jobs whose workers an earlier server has started."""

    def start(self) -> None:
        """Watch from now on, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; the workers go on, and are found again, unless the settings say that they stop, too."""
        self._stop.set()
        self._thread.join()
        if not self.settings.stop_jobs or not self._began:
            return  # another server looks after them
        told = {job["id"] for job in self.store.active() if job.get("stopped_at")}
        end = time.monotonic() + self.settings.stop_seconds
        while time.monotonic() < end:
            working = {job["id"]: job["handle"] for job in self.store.active() if job["handle"] is not None}
            folders = {job: self.store.folder_of_job(job) for job in working}
            alive = [job for job in working if self.executor.poll(folders[job], working[job]) == ALIVE]
            # A second signal would end a worker without its checkpoint.
            told |= {job for job in alive if job not in told and self.executor.stop(folders[job], working[job])}
            if not alive:
                return
            time.sleep(SECONDS)

    @property
    def is_alive(self) -> bool:
        """Tell whether the queue moves."""
        return self._thread.is_alive()

    def _loop(self) -> None:
        with (self.store.root / "supervisor.lock").open("a") as lock:
            while not self._stop.wait(SECONDS):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # another server of this root does it
                with Deliveries(self.store):
                    self._lead()

    def _lead(self) -> None:
        """Look after the queue until the server ends."""
        swept = 0.0
        while not self._stop.wait(SECONDS if swept else 0):
            try:
                if not self._began:
                    self._earlier = {job["id"] for job in self.store.active() if job["handle"] is not None}
                    self._began = time.monotonic()
                self.look()
                if not swept or time.monotonic() - swept > 60:
                    swept = time.monotonic()
                    self.store.sweep()
            except Exception as error:
                # A full disk, or a database that is away for a while: the next look may find them well.
                _logger.exception("the queue could not be looked after: %s", str(error).partition("\n")[0])
                swept = swept or time.monotonic()
                self._stop.wait(PAUSE)

    def look(self) -> None:
        """Look at every job once: take in those that ended, hand on what is wanted, start what there is room for."""
        for job in self.store.active():
            if job["handle"] is not None:
                with _alone(job):
                    self._watch(job)
        jobs = self.store.active()
        for job in jobs:
            if job["handle"] is None and job["wanted"] != "run":
                with _alone(job):
                    self._settle(job)
        taken: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for job in jobs:
            for place in job["places"] if job["handle"] is not None else ():
                taken[place].append(job)
        self._fill(
            [
                job
                for job in jobs
                if job["handle"] is None and job["wanted"] == "run" and job.get("not_before", 0) <= time.time()
            ],
            taken,
            is_checking=any(job["handle"] is not None and not job["places"] for job in jobs),
        )

    def _fill(
        self, waiting: Sequence[dict[str, Any]], taken: dict[int, list[dict[str, Any]]], *, is_checking: bool
    ) -> None:
        """Start jobs in their order. None overtakes: small ones would keep one out that needs several devices."""
        coming = sum(any(job.get("stopped_at") for job in jobs) for jobs in taken.values())
        is_full = False
        for job in waiting:
            wanted = job.get("devices", 1)
            is_larger = wanted > self.devices  # than this server, though not than an earlier one
            places = () if is_full or is_larger else self._room(job, taken)
            if places:
                for place in places:
                    taken[place].append(job)
                with _alone(job):
                    self._start(job, places)
                continue
            if not is_full and not is_larger:  # what is free already is kept for the first one that waits
                is_full, coming = True, coming + len(self._free(taken))
            if job["state"] == "validating_files":
                # None is stopped for a job that may be refused; a place made free meanwhile would go to another one.
                if not is_checking:
                    is_checking = True
                    with _alone(job):
                        self._start(job, ())
                continue
            if is_larger:
                said = f"The job waits for {wanted} devices, and there are {self.devices}"
                note(self.store.folder_of_job(job["id"]), said, "warn")
                continue
            lacking = wanted - coming
            coming = max(0, -lacking)
            if lacking > 0 and self.settings.preempt:
                self._preempt(job, lacking, taken)

    @property
    def devices(self) -> int:
        """Most devices of one job; those of a scheduler's jobs are the scheduler's own business."""
        return max(1, len(self.places)) if self.settings.executor == "local" else 1

    def _free(self, taken: Mapping[int, Sequence[Any]]) -> list[int]:
        return [index for index in range(len(self.places)) if not taken.get(index)]

    def _room(self, job: dict[str, Any], taken: dict[int, list[dict[str, Any]]]) -> Sequence[int]:
        """Find places: free ones, else one that the job may share, as far as the estimates of `check` go."""
        found, wanted = self._free(taken), job.get("devices", 1)
        need = job["numbers"].get("memory_bytes")
        if len(found) >= wanted:
            return found[:wanted]
        if wanted > 1 or need is None or self.settings.jobs_per_device == 1:
            return ()
        for index, place in sorted(enumerate(self.places), key=lambda entry: len(taken[entry[0]])):
            others = [other["numbers"].get("memory_bytes") for other in taken[index]]
            is_known = None not in others and len(others) < self.settings.jobs_per_device
            is_alone = any(len(other["places"]) > 1 for other in taken[index])
            if is_known and not is_alone and place.memory is not None and sum(others, need) <= SHARE * place.memory:
                return [index]
        return ()

    def _preempt(self, job: dict[str, Any], lacking: int, taken: Mapping[int, Sequence[dict[str, Any]]]) -> None:
        """Stop the jobs of so many places, if all of them are of lower priority: the lowest, and of these the youngest.

        Where that would not be enough, none is stopped for nothing.
        """
        below = {
            tuple(other["id"] for other in jobs): jobs
            for jobs in taken.values()
            if jobs and all(other["priority"] < job["priority"] and not other.get("stopped_at") for other in jobs)
        }
        youngest = sorted(below.values(), key=lambda jobs: max(other["id"] for other in jobs), reverse=True)
        chosen: list[dict[str, Any]] = []
        for jobs in sorted(youngest, key=lambda jobs: max(one["priority"] for one in jobs)):
            if lacking > 0:
                chosen += jobs
                lacking -= len(jobs[0]["places"])
        for other in chosen if lacking <= 0 else ():
            folder = self.store.folder_of_job(other["id"])
            if other["handle"] != STARTING and self.executor.stop(folder, other["handle"]):
                note(folder, "The job is stopped with a checkpoint, for one of higher priority")
                other["stopped_at"] = now()
                self.store.change(other["id"], [other["state"]], stopped_at=other["stopped_at"])

    def _start(self, job: dict[str, Any], places: Sequence[int]) -> None:
        """Start the worker of a job: to train in these places, or to check it while it waits for them."""
        folder = self.store.folder_of_job(job["id"])
        # The end of an earlier worker goes first, and that one is starting is kept before it lives: should the service
        # die in between, the executor finds out whether it does.
        discard(folder / worker.EXIT)
        seen = {"handle": None, "wanted": "run"}
        if self.store.change(job["id"], [job["state"]], seen, handle=STARTING, places=places) is None:
            return
        job["places"] = places
        # A check sees a device, too: what fits depends on it.
        used = [self.places[place].environment for place in places or [0]]
        environment = {
            name: ",".join(filter(None, (one[name] for one in used)))
            for name in used[0]
            if places or name != worker.CORES  # which are those of a job that trains
        }
        if len(used) > 1:
            environment["PET_NPROC_PER_NODE"] = str(len(used))
        work = Work(folder, not places, environment, job["priority"])
        try:
            handle = self.executor.start(work)
        except OSError as error:
            later = time.time() + self.settings.retry_seconds
            self.store.change(job["id"], [job["state"]], handle=None, places=[], not_before=later)
            raise OSError(f"{job['id']} could not be started: {error}") from error
        self.store.change(job["id"], [job["state"]], handle=handle)

    def _watch(self, job: dict[str, Any]) -> None:
        folder, handle = self.store.folder_of_job(job["id"]), job["handle"]
        if handle == STARTING:
            handle = self.executor.adopt(folder)
            if handle is None and not (folder / worker.EXIT).exists():
                self.store.change(job["id"], [job["state"]], handle=None, places=[])
                return
            if handle is not None:
                self.store.change(job["id"], [job["state"]], handle=handle)
        code = exit_code(folder) if handle is None else self.executor.poll(folder, handle)
        if code != ALIVE:
            self._ended(job, folder, code)
            return
        begins = job["state"] != "running" and job["places"] and (folder / worker.CHECKED).exists()
        if begins and handle is not None:
            note(folder, "Fine-tuning job started")
            job = self.store.change(job["id"], [job["state"]], state="running", **_checked(folder)) or job
        told = job.get("stopped_at")
        if told and now() - told > self.settings.stop_seconds:
            self.executor.stop(folder, handle, at_once=True)
        elif job["wanted"] != "run" and not told and self.executor.stop(folder, handle):
            self.store.change(job["id"], [job["state"]], stopped_at=now())

    def _ended(self, job: dict[str, Any], folder: Path, code: int) -> None:
        """Decide what comes after the end of a worker."""
        free: dict[str, Any] = {"handle": None, "places": [], "stopped_at": None}
        if (folder / worker.CHECKED).exists():
            free |= _checked(folder)
        is_asked = job.get("stopped_at") or job["wanted"] != "run"
        is_stopped = code in (PREEMPTED, INTERRUPTED) or (code == KILLED and is_asked)
        share = free.get("chosen", {}).get("batch_size", 0) // job.get("devices", 1)
        micro = min(free.get("numbers", {}).get("micro_batch_rows", 1), share) // 2
        if code in (0, PushError.exit_code) and job["places"]:
            if code:
                note(folder, "The model was trained, but not uploaded", level="warn")
            if job.get("kind") == batch_worker.KIND:
                made = batch_worker.collect(self.store, job, folder)
            else:
                made = {"fine_tuned_model": history.model_of(job), "result_files": self._results(job, folder)}
                made["epochs"] = history.epochs(folder)
            self._finish(job, folder, "succeeded", **made, **free)
        elif code == 0:
            note(folder, "Files validated, moving job to queued state")
            self.store.change(job["id"], [job["state"]], state="queued", **free)
        elif job["wanted"] == "cancel" or (job["wanted"] == "pause" and is_stopped):
            self._settle(job, **free)
        elif is_stopped:
            if not job.get("stopped_at"):  # by somebody else, who may do it again
                free["not_before"] = time.time() + self.settings.retry_seconds
            self._again(job, folder, "The job was stopped, and goes on from its checkpoint when there is room", **free)
        elif code == KILLED and self._went_with_server(job):
            self._again(
                job, folder, "The trainer was lost with the server; the job goes on from its checkpoint", **free
            )
        elif code in (PeerError.exit_code, StorageError.exit_code, KILLED) and job["attempts"] < RETRIES:
            wait = self.settings.retry_seconds * 2 ** job["attempts"]
            free |= {"attempts": job["attempts"] + 1, "not_before": time.time() + wait}
            why = "The trainer could not write" if code == StorageError.exit_code else "The trainer was lost"
            said = f"{why}; the job goes on from its last checkpoint in {wait:g} s, try {free['attempts']} of {RETRIES}"
            self._again(job, folder, said, "warn", **free)
        elif code == OutOfMemoryError.exit_code and micro and not _is_halved(job):
            free["overrides"] = [*job["overrides"], f"training.micro_batch={micro}"]
            self._again(job, folder, f"Out of memory; the job goes on with micro-batches of {micro}", "warn", **free)
        else:
            self._finish(job, folder, "failed", error=_error(folder, job, code), **free)

    def _went_with_server(self, job: dict[str, Any]) -> bool:
        """Tell whether a worker was lost because the machine was; that is no fault of the job."""
        return job["id"] in self._earlier and time.monotonic() - self._began < WITH_SERVER_S

    def _again(self, job: dict[str, Any], folder: Path, why: str, level: str = "info", **fields: Any) -> None:
        """Queue a job again."""
        note(folder, why, level)
        state = "queued" if (folder / worker.CHECKED).exists() else "validating_files"
        self.store.change(job["id"], [job["state"]], state=state, **fields)

    def _results(self, job: dict[str, Any], folder: Path) -> list[str]:
        """Keep the metrics of each step as a file of the project."""
        # Its id follows from the job's: should the service be killed before the job is told, there is one still.
        made = f"file-{job['id'].removeprefix('ftjob-')}"
        content = history.results(folder).encode()
        self.store.add_made_file(job["project"], made, "step_metrics.csv", views.RESULTS, content)
        return [made]

    def _settle(self, job: dict[str, Any], **fields: Any) -> None:
        """Do what is wanted of a job that does not run."""
        folder = self.store.folder_of_job(job["id"])
        free = {"handle": None, "places": [], "stopped_at": None, **fields}
        if job["wanted"] == "cancel":
            self._finish(job, folder, "cancelled", **free)
            return
        note(folder, "Fine-tuning job paused")
        seen = {"wanted": "pause"}  # it may have been cancelled since
        self.store.change(job["id"], [job["state"]], seen, state="paused", wanted="run", not_before=0, **free)

    def _finish(self, job: dict[str, Any], folder: Path, state: str, **fields: Any) -> None:
        said = {"succeeded": "The job has successfully completed", "failed": "The job failed"}
        why = (fields.get("error") or {}).get("message")
        message = said.get(state, f"The job was {state}") + (f": {why}" if why else "")
        note(folder, message, level="error" if state == "failed" else "info")
        self.store.change(job["id"], [job["state"]], state=state, wanted="run", finished_at=now(), **fields)


def note(folder: Path, message: str, level: str = "info") -> None:
    """Add an event to a job; one that was the last already is not said again.

    Events are written before the job changes: should the service be killed in between, it does the same once more.
    """
    file = folder / history.EVENTS
    last = next(history.backwards(file), None)
    if last is None or json.loads(last[1])["message"] != message:
        with file.open("a", encoding="utf-8") as stream:
            line = {"created_at": now(), "time": time.time(), "level": level, "message": message}
            stream.write(json.dumps(line) + "\n")


@contextmanager
def _alone(job: dict[str, Any]) -> Iterator[None]:
    """Let a job that a scheduler refuses, or whose files are damaged, keep no other waiting."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        _logger.warning("%s could not be looked after: %r", job["id"], error)


def _checked(folder: Path) -> dict[str, Any]:
    """Give what the check has chosen for a job."""
    found = json.loads((folder / worker.CHECKED).read_bytes())
    return {"chosen": found["chosen"], "numbers": found["numbers"], "shape": found.get("shape")}


def _is_halved(job: dict[str, Any]) -> bool:
    """Tell whether a job goes on with smaller micro-batches already."""
    return any(given.startswith("training.micro_batch=") for given in job["overrides"])


def _error(folder: Path, job: dict[str, Any], code: int) -> dict[str, Any]:
    """Write the error of a job that failed: all its problems, and the field that the first one is about."""
    kinds = {2: "invalid_recipe", 3: "invalid_training_file", 4: "invalid_model", 5: "storage_error"}
    kinds |= {6: "diverged", 7: "out_of_memory", 9: "invalid_checkpoint", 10: "worker_lost", KILLED: "worker_lost"}
    problems = worker.problems_of(folder)
    if not problems:
        return {
            "code": kinds.get(code, "internal_error"),
            "message": f"the trainer ended with code {code}",
            "param": None,
        }
    lines = []
    for problem in problems:
        file = job.get("names", {}).get(problem["file"], problem["file"])
        place = file if problem["line"] is None else f"{file}:{problem['line']}"
        if file == worker.RECIPE:  # made by the service, and the key says more than its line
            place = ""
        lines.append(": ".join(part for part in (place, problem["key"], problem["message"]) if part))
    fields = {f"{worker.DATA}/{split}": field for field, split in worker.SPLITS.items()}
    first = problems[0]
    param = next((field for file, field in fields.items() if first["file"].startswith(file)), first["key"] or None)
    # The operator's names of models, and where they lie, are their own business.
    message = views.unplaced("\n".join(lines), folder.parent.parent, [job])
    return {"code": kinds.get(code, "internal_error"), "message": message, "param": param}
