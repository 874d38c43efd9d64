"""The API of the service without training: OpenAI's own client against a real server in this process."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
httpx2 = pytest.importorskip("httpx2")

from hf_finetune.config import paths  # noqa: E402
from hf_finetune.config.problems import keys, options  # noqa: E402
from hf_finetune.config.section import Section  # noqa: E402
from hf_finetune.errors import DataError  # noqa: E402
from hf_finetune.recipe import Recipe  # noqa: E402
from hf_finetune.service import server  # noqa: E402
from hf_finetune.service.executors.local import Local  # noqa: E402
from hf_finetune.service.requests import may_set, refused  # noqa: E402
from hf_finetune.service.store import Store, new_id  # noqa: E402
from hf_finetune.service.supervisor import Supervisor  # noqa: E402
from hf_finetune.tasks import _image  # noqa: E402


class Service:
    """A server in a thread, with no place where a job could train."""

    def __init__(self, root: Path) -> None:
        self.root, self.store = root, Store(root)
        (root / "models.yaml").write_text(json.dumps({"tiny": {"name": str(root / "tiny")}}))
        self.app = server.make(self.store, Supervisor(self.store, Local(), []))
        self.socket = socket.create_server(("127.0.0.1", 0))
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
            **{"slot": None, "attempts": 0, "overrides": [], "hyperparameters": {"n_epochs": "auto"}, "error": None},
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


def test_names_of_files_are_no_paths(service: Service) -> None:
    before = {path for path in service.root.parent.rglob("*") if "files" not in path.parts}
    for name in ("../../evil.jsonl", "/etc/passwd", "..\\..\\evil", "a\x00\r\nb", "." * 3, "x" * 3000):
        file = service.client.files.create(file=(name, b"{}"), purpose="fine-tune")
        assert not {"/", "\\", "\x00", "\n"} & set(file.filename)
        assert len(file.filename) <= 200
        assert service.client.files.content(file.id).read() == b"{}"
    after = {path for path in service.root.parent.rglob("*") if "files" not in path.parts}
    assert {path.name for path in after - before} <= {"service.db-wal", "service.db-shm"}
    # torch, which only this test's own process loads, keeps a folder where temporary files go.
    assert not [path for path in (service.root / "spool").iterdir() if not path.name.startswith("torch")]


def _raw(service: Service, path: str, head: bytes, pieces: Iterator[bytes], *, key: str | None = None) -> Any:
    """Send a request as no client would, until it is answered."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as connection:
        authorization = f"authorization: Bearer {key or service.key}\r\n".encode()
        connection.sendall(f"POST {path} HTTP/1.1\r\nhost: x\r\n".encode() + authorization + head + b"\r\n")
        sent = 0
        try:
            for piece in pieces:
                connection.sendall(piece)
                sent += len(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, json.loads(answer.read()), sent


def _chunks(piece: bytes, limit: int) -> Iterator[bytes]:
    head = b'--b\r\ncontent-disposition: form-data; name="data"; filename="x"\r\n\r\n'
    for data in (head, *([piece] * (limit // len(piece)))):
        yield f"{len(data):x}\r\n".encode() + data + b"\r\n"


def test_endless_and_oversized_requests_are_cut_off(service: Service) -> None:
    upload = service.client.uploads.create(bytes=10, filename="a", mime_type="", purpose="fine-tune").id
    parts, most = f"/v1/uploads/{upload}/parts", 64 << 20
    form = b"content-type: multipart/form-data; boundary=b\r\n"
    status, answer, _ = _raw(service, parts, form + b"content-length: 999999999\r\n", iter([]))
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    chunked = form + b"transfer-encoding: chunked\r\n"
    status, answer, sent = _raw(service, parts, chunked, _chunks(b"x" * (1 << 20), 10 * most))
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    assert sent < 2 * most, "it is cut off while it is sent"
    plain = b"content-type: application/json\r\ntransfer-encoding: chunked\r\n"
    status, answer, _ = _raw(service, "/v1/fine_tuning/jobs", plain, _chunks(b"x" * (1 << 20), 1 << 30))
    assert status == 413
    # Nobody makes the disk busy without a key: not a byte of the form is read.
    status, _, sent = _raw(service, "/v1/files", chunked, _chunks(b"x" * (1 << 20), 1 << 30), key="hf-wrong")
    assert (status, sent < most) == (401, True)
    # torch, which only this test's own process loads, keeps a folder where temporary files go.
    assert not [path for path in (service.root / "spool").iterdir() if not path.name.startswith("torch")]


# ---- pages, and what other projects see ----


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


def test_every_route_hides_what_other_projects_have(service: Service) -> None:
    mine = service.client
    upload = mine.uploads.create(bytes=1, filename="a", mime_type="", purpose="fine-tune").id
    name = "ft:tiny:default::secret"
    ids = {
        "file": mine.files.create(file=("a.jsonl", b"{}"), purpose="fine-tune").id,
        "upload": upload,
        "job": service.job(fine_tuned_model=name),
        "batch": service.job(id=new_id("batch_"), kind="batch"),
        "model": name,
        "endpoint": mine.webhooks.create(event_types=["batch.failed"], name="a", url="https://93.184.215.14/").id,
    }
    form = {"files": {"data": ("x", b"x")}}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/uploads/{upload}/complete": {"json": {"part_ids": []}},
        "/v1/uploads/{upload}/parts": form,
        "/v1/webhook_endpoints/{endpoint}": {"json": {}},
        "/v1/webhook_endpoints/{endpoint}/test": {"json": {"event_type": "batch.failed"}},
    }
    other = httpx2.Client(
        base_url=f"http://127.0.0.1:{service.port}",
        headers={"authorization": f"Bearer {service.store.create_key('other', 'test')}"},
    )
    asked = 0
    for path, methods in service.app.openapi()["paths"].items():
        names = set(re.findall(r"{(\w+)}", path))
        if not path.startswith("/v1/") or not names:
            continue
        unknown = names - ids.keys()
        assert not unknown, f"{path}: give this test an id of another project for {unknown}"
        for method in methods:
            url = path.format(**ids)
            answer = other.request(method.upper(), url, **bodies.get(path, {}))
            assert answer.status_code == 404, (method, path, answer.text)
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
            asked += 1
    assert asked >= 16
    assert mine.files.retrieve(ids["file"]).id == ids["file"], "nothing was changed"


def test_recipes_of_callers_name_no_path_account_code_or_machine(service: Service) -> None:
    open_keys = {key for key in _keys(Recipe) if may_set(key)}
    closed = set(_keys(Recipe)) - open_keys
    assert closed >= {"model.name", "data.train", "data.cache", "data.workers", "adapter.from", "output", "hub.private"}
    assert closed >= {"tracking.folder", "tracking.also", "data.mix", "model.revision", "hub", "require_pinned"}
    assert open_keys >= {"training.epochs", "task.label", "adapter.r", "checkpoints.every", "model.quantization"}

    class Newer(Section):
        place: str | None = None
        places: list[str] | None = None
        size: int = 1

    assert [key for key, _ in refused([Newer], {"place": "x", "places": ["x"], "size": 2})] == ["place", "places"]
    file = service.client.files.create(file=("a.jsonl", b"{}"), purpose="fine-tune").id
    for recipe in ({"output": "/etc"}, {"extends": "/x"}, {"adapter": {"continue_from": "/x"}}, {"training": 5}):
        with pytest.raises(openai.BadRequestError, match="recipe"):
            service.client.fine_tuning.jobs.create(model="tiny", training_file=file, extra_body={"recipe": recipe})
    for wrong, said in (
        ({"method": {"type": "dpo"}}, "dpo is not offered"),
        ({"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]}, "integrations"),
        (
            {"extra_body": {"classifier_targets": [{"name": "a"}, {"name": "b"}], "job_type": "classifier"}},
            "must be one",
        ),
    ):
        with pytest.raises(openai.BadRequestError, match=said):
            service.client.fine_tuning.jobs.create(model="tiny", training_file=file, **wrong)


def _keys(block: Any, before: str = "") -> Iterator[str]:
    for name, info in keys(block).items():
        yield before + name
        for option in options(info):
            if option.block is not None:
                yield from _keys(option.block, f"{before}{name}.")


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


def test_rows_of_callers_name_no_file_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, own = tmp_path / "secret.png", tmp_path / "job" / "own.png"
    own.parent.mkdir()
    for file in (secret, own):
        file.write_bytes(b"x")
    monkeypatch.setenv(paths.ROWS, str(own.parent))
    assert _image.content(str(own)) == b"x"
    for name in (str(secret), f"{own.parent}/../secret.png", str(tmp_path / "missing.png")):
        with pytest.raises(DataError, match="outside of the data"):
            _image.content(name)
