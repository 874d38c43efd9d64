"""The queue of the service: exit codes, priorities, shared devices, and servers that are killed at any moment."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS
from faults.lab import rows
from test_service import Service, kill, wait

from hf_finetune import train

pytestmark = pytest.mark.slow
PREEMPTED = "The job is stopped with a checkpoint, for one of higher priority"
openai = pytest.importorskip("openai")


class Queue(Service):
    """A server whose jobs are looked at from outside."""

    def create(self, file: str, priority: int = 0, **recipe: Any) -> str:
        """Make a job; returns its id."""
        more = {"recipe": recipe, "priority": priority}
        job: str = self.client.fine_tuning.jobs.create(model="tiny", training_file=file, seed=3, extra_body=more).id
        return job

    def upload(self, text: str, name: str = "train.csv") -> str:
        """Upload rows; returns the id of the file."""
        file: str = self.client.files.create(file=(name, text.encode()), purpose="fine-tune").id
        return file

    def job(self, job: str) -> dict[str, Any]:
        """What the service keeps of a job."""
        found: dict[str, Any] = json.loads((self.root / "runs" / job / "job.json").read_text())
        return found

    def pid(self, job: str) -> int:
        """The worker that trains a job."""
        return int((self.root / "runs" / job / "worker.lock").read_text())

    def steps(self, job: str) -> int:
        """Steps that are logged."""
        file = self.root / "runs" / job / "run" / "metrics.jsonl"
        return file.read_text().count('"phase": "train"') if file.exists() else 0

    def adapter(self, job: str) -> bytes:
        """What a job has trained."""
        return (self.root / "runs" / job / "run/adapter/adapter_model.safetensors").read_bytes()

    def said(self, job: str) -> list[str]:
        """Events, oldest first, without those of steps."""
        lines = (self.root / "runs" / job / "events.jsonl").read_text().splitlines()
        return [json.loads(line)["message"] for line in lines]


@pytest.fixture(scope="module")
def queue(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, tiny_llama: str) -> Iterator[Queue]:
    root = tmp_path_factory.mktemp("queue") / "root"
    made = Queue(root, tiny_bert, tiny_llama, service={"slots": 2, "retry_seconds": 0.2})
    yield made
    made.close()


@pytest.fixture(scope="module")
def sentences() -> str:
    return rows(101, 1, [word for word in WORDS if word.isalpha()])


def training(steps: int, **more: Any) -> dict[str, Any]:
    """A block of so many steps."""
    return {"training": {"steps": steps, "batch_size": 8, **more}}


def test_exit_codes_decide_what_comes_next(queue: Queue, sentences: str) -> None:
    good, bad = queue.upload(sentences), queue.upload('{"text": "a", "label": "b"}\n' * 8 + '{"text"', "bad.jsonl")
    final = {
        "invalid_recipe": queue.create(good, training={"learning_rate": "much"}),
        "invalid_training_file": queue.create(bad),
        "invalid_model": queue.create(good, adapter={"kind": "lora", "target_modules": ["nothing"]}),
    }
    lost = queue.create(good, **training(30))
    for code, job in final.items():
        failed = queue.until(job, "failed", "succeeded")
        assert failed.error, code
        assert failed.error.code == code, failed.error
        assert queue.job(job)["attempts"] == 0
    # A worker that is killed, by the kernel for all that is known, goes on. Codes without a cause at hand (6, 7, 10)
    # are in tests/test_service_supervisor.py.
    wait(lambda: queue.steps(lost) > 2)
    os.kill(queue.pid(lost), signal.SIGKILL)
    assert queue.until(lost, "succeeded", "failed").status == "succeeded", queue.said(lost)
    assert queue.job(lost)["attempts"] == 1
    assert any("try 1 of 3" in said for said in queue.said(lost))


def test_a_job_of_higher_priority_takes_the_place_of_a_lower_one(queue: Queue, sentences: str) -> None:
    file = queue.upload(sentences)
    # It has been checked when it comes back: how long that takes on a busy machine is no matter of this test.
    urgent = queue.create(file, 7, **training(40))
    wait(lambda: queue.steps(urgent) > 2)
    queue.client.fine_tuning.jobs.pause(urgent)
    assert queue.until(urgent, "paused", "succeeded").status == "paused"
    low, lower = (queue.create(file, priority, **training(400)) for priority in (-2, -5))
    wait(lambda: all(queue.steps(job) > 2 for job in (low, lower)))
    queue.client.fine_tuning.jobs.resume(urgent)
    assert queue.until(urgent, "succeeded", "failed").status == "succeeded"
    assert queue.job(lower)["state"] != "succeeded", "too fast to be preempted"
    assert queue.said(lower).count(PREEMPTED) == 1
    assert PREEMPTED not in queue.said(low)
    # A pause of one that is being stopped, or ends, or is checked, is kept; and it costs no try.
    early = queue.create(file, **training(4))
    queue.client.fine_tuning.jobs.pause(early)
    assert queue.until(early, "paused", "succeeded").status == "paused"
    queue.client.fine_tuning.jobs.resume(early)
    same = queue.create(file, **training(400))
    for job in (low, lower, early, same):
        assert queue.until(job, "succeeded", "failed").status == "succeeded", queue.said(job)
        assert queue.job(job)["attempts"] == 0
    assert queue.adapter(lower) == queue.adapter(same), "it went on bit for bit"


def test_a_job_on_two_devices_is_paused_and_lost_and_goes_on(queue: Queue, sentences: str) -> None:
    file = queue.upload(sentences)
    create = queue.client.fine_tuning.jobs.create
    with pytest.raises(openai.BadRequestError, match="3 devices: a job gets 2 here at most"):
        create(model="tiny", training_file=file, extra_body={"devices": 3})
    more = {"recipe": training(300, batch_size=8), "devices": 2}
    job = create(model="tiny", training_file=file, seed=3, extra_body=more).id
    wait(lambda: queue.steps(job) > 2)
    assert queue.job(job)["places"] == [0, 1]
    behind = queue.create(file, **training(4))
    queue.client.fine_tuning.jobs.pause(job)
    assert queue.until(job, "paused", "succeeded", "failed").status == "paused"
    assert queue.until(behind, "succeeded", "failed").status == "succeeded"
    queue.client.fine_tuning.jobs.resume(job)
    reached = queue.steps(job)
    wait(lambda: queue.steps(job) > reached)
    os.kill(queue.pid(job), signal.SIGKILL)  # its two processes end by themselves, and hold the job until then
    assert queue.until(job, "succeeded", "failed").status == "succeeded", queue.said(job)
    assert queue.job(job)["attempts"] == 1
    run = queue.root / "runs" / job / "run"
    last = run / "checkpoints" / "checkpoint-300"
    assert json.loads((last / "MANIFEST.json").read_text())["world_size"] == 2
    # What goes wrong in one of them is told as in a single one.
    few = create(model="tiny", training_file=file, extra_body={"recipe": training(4, batch_size=1), "devices": 2}).id
    failed = queue.until(few, "succeeded", "failed")
    assert (failed.error.code, failed.error.param) == ("invalid_recipe", "training.batch_size")
    assert "1 rows are fewer than the 2 ranks" in failed.error.message


def test_a_preview_estimates_the_time_by_the_latest_job_alike(queue: Queue, sentences: str) -> None:
    def preview(**fields: Any) -> Any:
        body = {"model": "tiny", "training_file": file, **fields}
        return queue.client.post("/fine_tuning/preview", body=body, cast_to=object)

    file = queue.upload(sentences)
    recipe = training(60, learning_rate=1e-3, precision="fp32", optimizer="sgd")
    assert preview(recipe=recipe)["estimated_seconds"] is None, "no job trained like this"
    job = queue.create(file, **recipe)
    assert queue.until(job, "succeeded", "failed").status == "succeeded"
    lines = [json.loads(line) for line in (queue.root / "runs" / job / "run/metrics.jsonl").read_text().splitlines()]
    told = preview(recipe=training(120, learning_rate=1e-2, precision="fp32", optimizer="sgd"))
    assert told["estimated_from"] == job
    # Its steps, without evaluations and what comes before and after; another seed has other rows in its last epoch.
    taken = sum(8 / line["samples_per_second"] for line in lines if line["phase"] == "train")
    assert told["estimated_seconds"] == pytest.approx(2 * taken, rel=0.2)
    assert preview(recipe=recipe, devices=2)["estimated_from"] is None
    assert preview(recipe=training(60, optimizer="sgd", batch_size=4))["estimated_from"] is None


@pytest.mark.parametrize("victims", ["server", "server and workers"])
def test_a_server_killed_at_any_moment_loses_and_doubles_nothing(
    tmp_path: Path, tiny_bert: str, tiny_llama: str, *, sentences: str, victims: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = int(os.environ.get("KILL_SEED", time.time_ns() % 100_000))
    print(f"KILL_SEED={seed}")
    draw = random.Random(seed)
    queue = Queue(tmp_path / "root", tiny_bert, tiny_llama, service={"slots": 2})
    file = queue.upload(sentences)
    moments = [draw.uniform(0, 3) for _ in range(20)]
    if victims != "server":
        moments = [draw.uniform(0, 20) for _ in range(6)]
    jobs: dict[int, str] = {}
    for number, moment in enumerate(moments):
        if number < 6:
            killer = threading.Timer(draw.uniform(0, 0.5) if victims == "server" else 60, queue.process.kill)
            killer.start()
            with contextlib.suppress(openai.APIError):
                jobs[number] = keyed(queue, file, number)
            killer.cancel()
        if queue.process.poll() is None:
            time.sleep(moment)
        queue.kill()
        if victims != "server":
            for folder in (queue.root / "runs").iterdir():
                kill(folder / "worker.lock")
        queue.start()
    for number in range(6):
        made = keyed(queue, file, number)
        assert jobs.setdefault(number, made) == made, f"KILL_SEED={seed}"
    for number, job in jobs.items():
        # Beside another job, and alone: each slot has its own core, so that the bits are the same.
        assert queue.until(job, "succeeded", "failed").status == "succeeded", (seed, queue.said(job))
        assert queue.adapter(job) == undisturbed(queue, jobs[number % 2], monkeypatch), f"KILL_SEED={seed}"
        assert queue.said(job).count("The job has successfully completed") == 1
        assert queue.job(job)["attempts"] == 0
    told = everything(queue)
    whole = [model for model in told["models"] if ":ckpt-step-" not in model["id"]]
    assert [len(told["jobs"]), len(told["files"]), len(whole)] == [6, 7, 8]
    # The database is an index.
    queue.kill()
    for path in queue.root.glob("service.db*"):
        path.unlink()
    queue.start("--rebuild")
    assert everything(queue) == told
    assert [keyed(queue, file, number) for number in range(6)] == [jobs[number] for number in range(6)]
    queue.close()


def undisturbed(queue: Queue, job: str, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Train the recipe of a job from beginning to end, in this process; returns the adapter."""
    folder = queue.root.parent / f"calm-{job}"
    if not folder.exists():
        shutil.copytree(queue.root / "runs" / job / "data", folder / "data")
        shutil.copy(queue.root / "runs" / job / "recipe.yaml", folder)
        with monkeypatch.context() as here:
            here.chdir(folder)
            train("recipe.yaml")
    return (folder / "run/adapter/adapter_model.safetensors").read_bytes()


def keyed(queue: Queue, file: str, number: int) -> str:
    """Make one of six jobs, or find the one that was made already."""
    more = {"recipe": training(12, seed=number % 2)}
    key = {"idempotency_key": str(number)}
    client = queue.client.with_options(max_retries=0)
    job: str = client.fine_tuning.jobs.create(
        model="tiny", training_file=file, seed=3, metadata=key, extra_body=more
    ).id
    return job


def everything(queue: Queue) -> dict[str, Any]:
    """All that the API lists."""
    client = queue.client
    return {
        "jobs": [job.model_dump() for job in client.fine_tuning.jobs.list()],
        "files": [file.model_dump() for file in client.files.list()],
        "models": [model.model_dump() for model in client.models.list()],
    }
