"""The queue: starts jobs where there is room, and decides by the exit codes of their workers what comes next."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_finetune.errors import INTERRUPTED, PREEMPTED, OutOfMemoryError, PeerError, PushError
from hf_finetune.run.files import discard
from hf_finetune.service import views, worker
from hf_finetune.service.executors.base import ALIVE, KILLED, STARTING, Executor
from hf_finetune.service.store import Store, new_id, now

SECONDS = 0.25
"""Between two looks at the jobs."""
RETRIES = 3
"""Times that a job is queued again after its worker was lost."""
_logger = logging.getLogger(__name__)


class Supervisor:
    """Watches the jobs of one machine.

    Args:
        store: The jobs.
        executor: Runs them.
        slots: Environment of each place where one job trains, e.g. the GPU that it sees.
    """

    def __init__(self, store: Store, executor: Executor, slots: Sequence[dict[str, str]]) -> None:
        self.store, self.executor, self.slots = store, executor, slots
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="supervisor", daemon=True)

    def start(self) -> None:
        """Watch from now on, in a thread."""
        self._thread.start()

    def stop(self) -> None:
        """Stop watching; the workers go on, and are found again."""
        self._stop.set()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        """Tell whether the queue moves."""
        return self._thread.is_alive()

    def _loop(self) -> None:
        swept = 0.0
        while not self._stop.wait(SECONDS):
            try:
                self.look()
                if time.monotonic() - swept > 60:
                    swept = time.monotonic()
                    for file in self.store.expired_files():
                        self.store.delete_file(file)
            except Exception:
                # A full disk, or a database that is away for a while: the next look may find them well.
                _logger.exception("the queue could not be looked after")

    def look(self) -> None:
        """Look at every job once: take in those that ended, hand on what is wanted, start what there is room for."""
        jobs = self.store.active()
        for job in jobs:
            if job["handle"] is not None:
                self._watch(job)
        jobs = self.store.active()
        for job in jobs:
            if job["handle"] is None and job["wanted"] != "run":
                self._settle(job)
        taken = {job["slot"] for job in jobs if job["handle"] is not None}
        free = [slot for slot in range(len(self.slots)) if slot not in taken]
        waiting = [job for job in jobs if job["handle"] is None and job["wanted"] == "run" and job["state"] != "paused"]
        for job, slot in zip(waiting, free, strict=False):
            self._start(job, slot)
        is_checking = any(job["handle"] is not None and job["slot"] is None for job in jobs)
        unchecked = [job for job in waiting[len(free) :] if job["state"] == "validating_files"]
        if unchecked and not is_checking:
            self._start(unchecked[0], None)

    def _start(self, job: dict[str, Any], slot: int | None) -> None:
        """Start the worker of a job: to train in a slot, or without one to check it while it waits."""
        folder = self.store.folder_of_job(job["id"])
        environment = {"CUDA_VISIBLE_DEVICES": ""} if slot is None else self.slots[slot]
        # The end of an earlier worker goes first, and the handle is kept before the worker lives: should the service
        # die in between, the worker's own lock tells what is true.
        discard(folder / worker.EXIT)
        if self.store.change(job["id"], [job["state"]], handle=STARTING, slot=slot) is None:
            return
        try:
            handle = self.executor.start(folder, only_check=slot is None, environment=environment)
        except OSError as error:
            self.store.change(job["id"], [job["state"]], handle=None, slot=None)
            raise OSError(f"{job['id']} could not be started: {error}") from error
        self.store.change(job["id"], [job["state"]], handle=handle)

    def _watch(self, job: dict[str, Any]) -> None:
        folder = self.store.folder_of_job(job["id"])
        code = self.executor.poll(folder, job["handle"])
        if code != ALIVE:
            self._ended(job, folder, code)
            return
        begins = job["state"] != "running" and job["slot"] is not None and (folder / worker.CHECKED).exists()
        if begins and self.store.change(job["id"], [job["state"]], state="running", **_checked(folder)):
            note(folder, "Fine-tuning job started")
        if job["wanted"] != "run" and not job["told"]:
            # A worker that only checks has nothing to keep.
            told = self.executor.stop(folder, job["handle"], at_once=job["state"] == "validating_files")
            self.store.change(job["id"], [job["state"]], told=told)

    def _ended(self, job: dict[str, Any], folder: Path, code: int) -> None:
        """Decide what comes after the end of a worker."""
        free: dict[str, Any] = {"handle": None, "slot": None, "told": False}
        if (folder / worker.CHECKED).exists():
            free |= _checked(folder)
        if code in (0, PushError.exit_code) and job["slot"] is not None:
            if code:
                note(folder, "The model was trained, but not uploaded", level="warn")
            results = self._results(job, folder)
            self._finish(job, folder, "succeeded", fine_tuned_model=_name(job), result_files=results, **free)
        elif job["wanted"] != "run":
            self._settle(job, **free)
        elif code == 0:
            self.store.change(job["id"], [job["state"]], state="queued", **free)
            note(folder, "Files validated, moving job to queued state")
        elif code in (PREEMPTED, INTERRUPTED):
            self.store.change(job["id"], [job["state"]], state="queued", **free)
            note(folder, "The job was stopped with a checkpoint, and goes on when there is room")
        elif code in (PeerError.exit_code, KILLED) and job["attempts"] < RETRIES:
            note(folder, "The trainer was lost; the job goes on from its last checkpoint", level="warn")
            state = "queued" if (folder / worker.CHECKED).exists() else "validating_files"
            self.store.change(job["id"], [job["state"]], state=state, attempts=job["attempts"] + 1, **free)
        elif code == OutOfMemoryError.exit_code and not any("micro_batch" in given for given in job["overrides"]):
            micro = max(1, job["numbers"].get("micro_batch_rows", 2) // 2)
            note(folder, f"Out of memory; the job goes on with micro-batches of {micro}", level="warn")
            overrides = [*job["overrides"], f"training.micro_batch={micro}"]
            self.store.change(job["id"], [job["state"]], state="queued", overrides=overrides, **free)
        else:
            self._finish(job, folder, "failed", error=_error(folder, job, code), **free)

    def _results(self, job: dict[str, Any], folder: Path) -> list[str]:
        """Keep the metrics of each step as a file of the project."""
        made = new_id("file-")
        content = views.results(folder).encode()
        place = self.store.folder_of_file(made)
        place.mkdir()
        (place / "data").write_bytes(content)
        document = {"id": made, "filename": "step_metrics.csv", "bytes": len(content), "created_at": now()}
        self.store.add_file(job["project"], {**document, "purpose": views.RESULTS})
        return [made]

    def _settle(self, job: dict[str, Any], **fields: Any) -> None:
        """Do what is wanted of a job that does not run."""
        folder = self.store.folder_of_job(job["id"])
        free = {"handle": None, "slot": None, "told": False, **fields}
        if job["wanted"] == "cancel":
            self._finish(job, folder, "cancelled", **free)
        elif self.store.change(job["id"], [job["state"]], state="paused", wanted="run", **free):
            note(folder, "Fine-tuning job paused")

    def _finish(self, job: dict[str, Any], folder: Path, state: str, **fields: Any) -> None:
        done = self.store.change(job["id"], [job["state"]], state=state, wanted="run", finished_at=now(), **fields)
        if done is not None:
            said = {"succeeded": "The job has successfully completed", "failed": "The job failed"}
            level = "error" if state == "failed" else "info"
            note(folder, said.get(state, f"The job was {state}"), level=level)


def note(folder: Path, message: str, level: str = "info") -> None:
    """Add an event to a job."""
    line = json.dumps({"created_at": now(), "level": level, "message": message})
    with (folder / "events.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def _checked(folder: Path) -> dict[str, Any]:
    """Give what the check has chosen for a job."""
    found = json.loads((folder / worker.CHECKED).read_bytes())
    return {"chosen": found["chosen"], "numbers": found["numbers"]}


def _name(job: dict[str, Any]) -> str:
    """Name the model of a job as OpenAI does: `ft:BASE:ORG:SUFFIX:ID`."""
    return f"ft:{job['model']}:{job['project']}:{job['suffix'] or ''}:{job['id'].removeprefix('ftjob-')}"


def _error(folder: Path, job: dict[str, Any], code: int) -> dict[str, Any]:
    """Write the error of a job that failed: all its problems, and the field that the first one is about."""
    kinds = {2: "invalid_recipe", 3: "invalid_training_file", 4: "invalid_model", 5: "storage_error"}
    kinds |= {6: "diverged", 7: "out_of_memory", 9: "invalid_checkpoint", 10: "worker_lost", KILLED: "worker_lost"}
    try:
        problems = json.loads((folder / worker.EXIT).read_bytes())["problems"]
    except (OSError, ValueError, KeyError):
        problems = []
    if not problems:
        return {
            "code": kinds.get(code, "internal_error"),
            "message": f"the trainer ended with code {code}",
            "param": None,
        }
    lines = []
    for problem in problems:
        place = problem["file"] if problem["line"] is None else f"{problem['file']}:{problem['line']}"
        # The operator's names of models are their own business.
        message = problem["message"].replace(job["base"]["name"], job["model"])
        lines.append(": ".join(part for part in (place, problem["key"], message) if part))
    fields = {f"{worker.DATA}/{split}": field for field, split in worker.SPLITS.items()}
    first = problems[0]
    param = next((field for file, field in fields.items() if first["file"].startswith(file)), first["key"] or None)
    return {"code": kinds.get(code, "internal_error"), "message": "\n".join(lines), "param": param}
