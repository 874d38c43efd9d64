"""The API of the service without training: OpenAI's own client against a real server in this process."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
httpx2 = pytest.importorskip("httpx2")

from hf_finetune.service import server  # noqa: E402
from hf_finetune.service.executors.local import Local  # noqa: E402
from hf_finetune.service.store import Store, new_id  # noqa: E402
from hf_finetune.service.supervisor import Supervisor  # noqa: E402


class Service:
    """A server in a thread, with no place where a job could train."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, Store(root)
        (root / "models.yaml").write_text(json.dumps({"tiny": {"name": str(root / "tiny")}}))
        self.app = server.make(self.store, Supervisor(self.store, Local(), []))
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        self.socket.bind(("127.0.0.1", 0))
        self.socket.listen()
        self.port = self.socket.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})
        self.thread.start()
        self.key = self.store.create_key("default", "test")
        self.client = self.client_of(self.key)

    def client_of(self, key: str) -> Any:
        """Make a client with a key."""
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0)

    def job(self, state: str = "succeeded", **fields: Any) -> str:
        """Keep a job that has ended, as the queue leaves it."""
        made = new_id("ftjob-")
        document = {
            **{"id": made, "project": "default", "created_at": 1, "finished_at": 2, "digest": "", "model": "tiny"},
            **{"training_file": "file-1", "validation_file": None, "suffix": None, "metadata": None, "recipe": {}},
            **{"job_type": None, "priority": 0, "state": state, "wanted": "run", "told": False, "handle": None},
            **{"places": [], "attempts": 0, "overrides": [], "hyperparameters": {"n_epochs": "auto"}, "error": None},
            **{"fine_tuned_model": None, "seed": 1, "base": {"name": "x"}, "chosen": {}, "numbers": {}},
        }
        return self.store.add_job(document | fields)

    def close(self) -> None:
        """End it."""
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("service") / "root")
    yield made
    made.close()


# ---- files and uploads ----


def test_a_file_in_parts_is_the_file(service: Service, tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    file = tmp_path / "rows.jsonl"
    file.write_bytes(content)
    uploads = service.client.uploads
    done = uploads.upload_file_chunked(
        file=file,
        mime_type="application/jsonl",
        purpose="fine-tune",
        part_size=300_000,
        md5=hashlib.md5(content).hexdigest(),
    )
    assert done.status == "completed"
    assert (done.file.filename, done.file.bytes) == ("rows.jsonl", len(content))
    assert service.client.files.content(done.file.id).read() == content
    assert not list(service.store.folder_of_upload(done.id).glob("part_*"))


def test_an_upload_that_is_wrong_makes_no_file_and_can_be_mended(service: Service) -> None:
    uploads, before = service.client.uploads, len(list(service.client.files.list()))
    made = uploads.create(bytes=6, filename="a.jsonl", mime_type="text", purpose="fine-tune")
    first, second = (uploads.parts.create(made.id, data=data).id for data in (b"abc", b"def"))
    for wrong, said in (
        ({"part_ids": [first]}, "3 bytes"),
        ({"part_ids": [first, first]}, "each once"),
        ({"part_ids": [first, "../../service.db"]}, "each once"),
        ({"part_ids": [first, second], "md5": "0" * 32}, "md5"),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            uploads.complete(made.id, **wrong)
    assert len(list(service.client.files.list())) == before
    done = uploads.complete(made.id, part_ids=[second, first])
    assert service.client.files.content(done.file.id).read() == b"defabc"
    again = uploads.complete(made.id, part_ids=[second, first])  # as a client does that did not hear the answer
    assert again.file.id == done.file.id
    with pytest.raises(openai.BadRequestError, match="completed"):
        uploads.parts.create(made.id, data=b"x")
    other = uploads.create(bytes=6, filename="a.jsonl", mime_type="text", purpose="fine-tune")
    uploads.parts.create(other.id, data=b"abc")
    assert uploads.cancel(other.id).status == "cancelled"
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        uploads.complete(other.id, part_ids=[])


# ---- pages ----


def test_events_are_paged_from_the_ends_of_their_files(service: Service) -> None:
    job = service.job()
    run = service.store.folder_of_job(job) / "run"
    run.mkdir()
    lines = [
        json.dumps(
            {"step": step, "epoch": 0.1, "time": 1000.0 + step, "phase": "train", "loss": 1.0 if step % 7 else "nan"}
        )
        for step in range(1, 251)
    ]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 251, "half of a li']))
    said = [{"created_at": 1000 + at, "time": 1000.5 + at, "level": "info", "message": str(at)} for at in (0, 100, 400)]
    (run.parent / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in said))
    events = service.client.fine_tuning.jobs.list_events
    for limit in (7, 1000):
        found = list(events(job, limit=limit))
        assert len({event.id for event in found}) == len(found) == 253
        times = [event.data["step"] + 0.0 if event.data else float(event.message) + 0.5 for event in found]
        assert times == sorted(times, reverse=True)
    before = [event.id for event in events(job, limit=1000)]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('ne"}\n' + json.dumps({"step": 252, "epoch": 1, "time": 2000.0, "phase": "train", "loss": 1}) + "\n")
    assert [event.id for event in events(job, limit=1000)][1:] == before, "ids stay while lines are added"


def test_pages_of_jobs_and_filters_of_metadata(service: Service) -> None:
    store, key = service.store, service.store.create_key("pages", "test")
    jobs = [
        service.job(project="pages", metadata={"team": "a" if n % 2 else "b", "n": str(n)} if n % 10 else None)
        for n in range(120)
    ]
    listed = service.client_of(key).fine_tuning.jobs.list
    assert [job.id for job in listed(limit=50)] == jobs[::-1]
    assert len(list(listed(metadata={"team": "a"}, limit=7))) == 60
    assert [job.id for job in listed(metadata={"team": "a", "n": "3"})] == [jobs[3]]
    none = list(listed(extra_query={"metadata": "null"}, limit=5))
    assert {job.id for job in none} == set(jobs[::10])
    assert store.job(jobs[0], "default") is None


def test_quotas(service: Service) -> None:
    limits = service.root / "limits.yaml"
    limits.write_text("projects: {small: {stored_bytes: 10, files: 2}}\n")
    client = service.client_of(service.store.create_key("small", "test"))
    client.files.create(file=("a.jsonl", b"x" * 8), purpose="fine-tune")
    with pytest.raises(openai.PermissionDeniedError, match="stored bytes"):
        client.files.create(file=("b.jsonl", b"x" * 8), purpose="fine-tune")
    with pytest.raises(openai.PermissionDeniedError, match="stored bytes"):
        client.uploads.create(bytes=8, filename="b", mime_type="", purpose="fine-tune")
    assert len(list(client.files.list())) == 1
    limits.unlink()


# ---- preview ----


def test_a_preview_shows_plan_and_loss_mask_and_makes_no_job(service: Service, tiny_llama: str) -> None:
    (service.root / "models.yaml").write_text(json.dumps({"tiny": {"name": tiny_llama}}))
    turns = [{"role": "user", "content": "one plus one"}, {"role": "assistant", "content": "two ."}]
    lines = "".join(json.dumps({"messages": turns}) + "\n" for _ in range(4)).encode()
    file = service.client.files.create(file=("chats.jsonl", lines), purpose="fine-tune").id
    body = {"model": "tiny", "training_file": file, "hyperparameters": {"n_epochs": 2, "batch_size": 2}}
    jobs = len(list(service.client.fine_tuning.jobs.list()))
    found = service.client.post("/fine_tuning/preview", body=body, cast_to=object)
    assert found["valid"], found["findings"]
    assert found["total_steps"] == 4
    tokens = found["rows"][0]["tokens"]
    trained = "".join(token["text"] for token in tokens if token["trained"])
    assert "two" in trained
    assert "plus" not in trained
    assert "plus" in "".join(token["text"] for token in tokens)
    bad = service.client.files.create(file=("bad.jsonl", lines + b'{"messages": "x"}\n'), purpose="fine-tune").id
    found = service.client.post("/fine_tuning/preview", body={**body, "training_file": bad}, cast_to=object)
    assert (found["valid"], found["rows"]) == (False, [])
    assert ("data/train.jsonl", 5) in [(one["file"], one["line"]) for one in found["findings"]]
    assert str(service.root) not in json.dumps(found)
    assert tiny_llama not in json.dumps(found)
    assert len(list(service.client.fine_tuning.jobs.list())) == jobs
    # torch, which only this test's own process loads, keeps a folder where temporary files go.
    assert not [path for path in (service.root / "spool").iterdir() if not path.name.startswith("torch")]
