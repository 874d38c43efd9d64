"""The API of the service without training: OpenAI's own client against a real server in this process."""

from __future__ import annotations

import hashlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

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
    assert not list((service.root / "spool").iterdir())


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
    assert not list((service.root / "spool").iterdir())
