"""Webhooks: OpenAI's own client manages endpoints and verifies what a receiver on the loopback gets."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv4Network
from pathlib import Path
from socket import AF_INET, SOCK_STREAM
from typing import Any

import pytest

openai = pytest.importorskip("openai")
httpx2 = pytest.importorskip("httpx2")

from test_service import wait  # noqa: E402
from test_service_api import Service  # noqa: E402
from test_service_web import Logged  # noqa: E402

from hf_finetune.service import egress, outbox  # noqa: E402
from hf_finetune.service.store import Store, new_id, now  # noqa: E402

ENDED = ("fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled")
PUBLIC = "https://93.184.215.14/hook"
"""Nothing is sent there."""


class Receiver:
    """A server that keeps what it is sent, and answers as its script says; then with 200."""

    def __init__(self, *script: Callable[[BaseHTTPRequestHandler], None]) -> None:
        self.script, self.seen = list(script), list[tuple[str, dict[str, str], bytes]]()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                """Keep, then answer."""
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.seen.append((self.path, {k.lower(): v for k, v in self.headers.items()}, body))
                (receiver.script.pop(0) if receiver.script else status(200))(self)

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/hook?token=of-the-caller"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def events(self, client: Any, secret: str) -> list[Any]:
        """Verify everything that came, and parse it."""
        return [client.webhooks.unwrap(body, headers, secret=secret) for _, headers, body in self.seen]

    def close(self) -> None:
        """End it."""
        self.server.shutdown()
        self.server.server_close()


def status(code: int, **headers: str) -> Callable[[BaseHTTPRequestHandler], None]:
    """Answer with a status."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in {"content-length": "0", **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()

    return answer


def endless(handler: BaseHTTPRequestHandler) -> None:
    """Answer 200, and never end."""
    status(200, **{"content-length": str(1 << 40)})(handler)
    for _ in range(10_000):
        handler.wfile.write(b"x" * 10_000)


def dripping(handler: BaseHTTPRequestHandler) -> None:
    """Answer a byte every tenth of a second."""
    for byte in b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.1)


def garbage(handler: BaseHTTPRequestHandler) -> None:
    """Answer in no HTTP."""
    handler.wfile.write(b"220 mail.example ESMTP\r\n")


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("webhooks") / "root"
    made = Service(root)
    allow(root)
    yield made
    made.close()


def allow(root: Path) -> None:
    """Let webhooks reach the loopback."""
    (root / "limits.yaml").write_text("webhooks: {networks: [127.0.0.1/32]}\n")


def end(service: Service, state: str, **fields: Any) -> str:
    """End a job as the queue does."""
    job = service.job("running", finished_at=None, **fields)
    assert service.store.change(job, ["running"], state=state, finished_at=now())
    return job


def client_of(service: Service, project: str) -> Any:
    """Make the client of another project."""
    return service.client_of(service.store.create_key(project, "test"))


def test_an_event_is_repeated_until_it_is_acknowledged(
    service: Service, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "BACKOFF", (0, 0, 0))
    client = client_of(service, "repeated")
    made = client.webhooks.create(event_types=list(ENDED[:1]), name="ours", url=receiver.url)
    receiver.script = [status(500), status(302, location="/elsewhere"), endless]
    job = end(service, "succeeded", project="repeated")
    end(service, "failed", project="repeated")
    end(service, "succeeded")
    file = service.root / "webhooks" / made.id / "settled.txt"
    wait(file.exists, 20)
    events = receiver.events(client, made.signing_secret)
    assert [(one.type, one.object, one.data.id) for one in events] == [("fine_tuning.job.succeeded", "event", job)] * 3
    assert {one.id for one in events} == {headers["webhook-id"] for _, headers, _ in receiver.seen}
    assert len({body for _, _, body in receiver.seen}) == 1
    assert {path for path, _, _ in receiver.seen} == {"/hook?token=of-the-caller"}, "no redirect is followed"
    assert {headers["host"] for _, headers, _ in receiver.seen} == {f"127.0.0.1:{receiver.port}"}
    _, headers, body = receiver.seen[0]
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.replace(b"succeeded", b"cancelled"), headers, secret=made.signing_secret)
    time.sleep(1.5)
    assert len(receiver.seen) == 3, "neither again, nor what another project did, nor what nobody asked for"


def test_a_delivery_is_given_up_and_holds_up_no_other(
    service: Service, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "BACKOFF", (0,))
    client = client_of(service, "given-up")
    gone = Receiver()
    gone.close()
    hanging = threading.Event()
    slow = Receiver(lambda _: assert_true(hanging.wait(30)))
    made = [
        client.webhooks.create(event_types=["batch.completed"], name="x", url=one.url) for one in (slow, gone, receiver)
    ]
    batch = end(service, "succeeded", id=new_id("batch_"), kind="batch", project="given-up")
    files = [service.root / "webhooks" / one.id / "settled.txt" for one in made]
    wait(lambda: files[1].exists() and files[2].exists(), 20)
    event = receiver.events(client, made[2].signing_secret)[0]
    assert (event.type, event.data.id) == ("batch.completed", batch)
    assert len(slow.seen) == 1
    assert not files[0].exists(), "it has not answered yet"
    hanging.set()
    slow.close()


def assert_true(value: bool) -> None:
    """Fail where it is not."""
    assert value


def test_endpoints_are_managed_by_openais_client(service: Service, receiver: Receiver) -> None:
    client = client_of(service, "managed")
    types = client.webhooks.event_types.list()
    assert set(ENDED) < set(types.data)
    first = client.webhooks.create(event_types=list(ENDED), name="first", url=receiver.url)
    second = client.webhooks.create(event_types=list(ENDED[:1]), name="second", url=PUBLIC)
    assert first.signing_secret != second.signing_secret
    found = list(client.webhooks.list(limit=1))
    assert [one.id for one in found] == [second.id, first.id], "newest first, over two pages"
    assert "signing_secret" not in found[0].model_dump()
    assert first.signing_secret.endswith(found[1].signing_secret_hint.removeprefix("whsec_..."))
    one = client.webhooks.update(second.id, name="renamed", event_types=list(ENDED[1:]))
    assert (one.name, one.event_types, one.url) == ("renamed", list(ENDED[1:]), PUBLIC)
    assert client.webhooks.retrieve(second.id) == one
    tried = client.webhooks.test(first.id, event_type=ENDED[1])
    assert (tried.status_code, tried.event_type, tried.webhook_endpoint_id) == (200, ENDED[1], first.id)
    receiver.script = [status(503)]
    assert client.webhooks.test(first.id, event_type=ENDED[1]).status_code == 503
    new = client.webhooks.rotate_secret(first.id, keep_old_secret_active_for_24_hours=True)
    again = client.webhooks.rotate_secret(first.id, extra_headers={"x-stainless-retry-count": "1"})
    assert again.signing_secret == new.signing_secret
    client.webhooks.test(first.id, event_type=ENDED[0])
    receiver.seen = receiver.seen[-1:]
    for secret in (new.signing_secret, first.signing_secret):
        assert receiver.events(client, secret)[0].type == ENDED[0]
    newest = client.webhooks.rotate_secret(first.id)
    client.webhooks.test(first.id, event_type=ENDED[0])
    receiver.seen = receiver.seen[-1:]
    assert receiver.events(client, newest.signing_secret)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        receiver.events(client, new.signing_secret)
    assert client.webhooks.delete(first.id).deleted
    assert [one.id for one in client.webhooks.list()] == [second.id]
    receiver.seen.clear()
    end(service, "succeeded", project="managed")
    time.sleep(1.5)
    assert receiver.seen == []
    with pytest.raises(openai.BadRequestError, match=r"fine_tuning\.job\.succeeded"):
        client.webhooks.create(event_types=["response.completed"], name="x", url=PUBLIC)


def test_a_request_that_is_sent_again_makes_one_endpoint_and_their_number_is_bounded(service: Service) -> None:
    client = client_of(service, "bounded")
    body = {"event_types": list(ENDED), "name": "x", "url": PUBLIC}
    first = client.webhooks.create(**body)
    again = client.webhooks.create(**body, extra_headers={"x-stainless-retry-count": "1"})
    assert (again.id, again.signing_secret) == (first.id, first.signing_secret)
    for number in range(9):
        client.webhooks.create(**body | {"name": str(number)})
    with pytest.raises(openai.PermissionDeniedError, match="10 webhooks"):
        client.webhooks.create(**body)
    assert len(list(client.webhooks.list())) == 10
    assert len(list((service.root / "webhooks").glob("*/endpoint.json"))) >= 10


def test_other_projects_see_no_endpoint(service: Service) -> None:
    made = client_of(service, "theirs").webhooks.create(event_types=list(ENDED), name="x", url=PUBLIC).id
    other = client_of(service, "spying")
    tries: list[Callable[[], Any]] = [
        lambda: other.webhooks.retrieve(made),
        lambda: other.webhooks.update(made, name="y"),
        lambda: other.post(f"/webhook_endpoints/{made}", body={}, cast_to=object),
        lambda: other.webhooks.rotate_secret(made),
        lambda: other.post(f"/webhook_endpoints/{made}/rotate_secret", cast_to=object),
        lambda: other.webhooks.test(made, event_type=ENDED[0]),
        lambda: other.webhooks.delete(made),
    ]
    for ask in tries:
        with pytest.raises(openai.NotFoundError):
            ask()
    assert list(other.webhooks.list()) == []


def test_only_public_addresses_are_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = ["127.0.0.1", "localhost", "2130706433", "0x7f.1", "10.0.0.1", "192.168.1.1", "169.254.169.254"]
    hosts += ["100.64.0.1", "0.0.0.0", "224.0.0.1", "[::1]", "[::ffff:10.0.0.1]", "[::127.0.0.1]", "[64:ff9b::a00:1]"]
    hosts += ["[2002:a00:1::]", "[fe80::1]", "[fc00::1]", "[fec0::1]", "[ff0e::1]", "a b", f"{'a' * 70}.example"]
    odd = ["ftp://8.8.8.8/", "http://8.8.8.8/", "https://a:b@8.8.8.8/", "https:///", "https://8.8.8.8:99999/", "x"]
    for url in [*(f"https://{host}/x" for host in hosts), *odd]:
        with pytest.raises(egress.Unreachable):
            egress.check(url, [])
    for url in ("https://8.8.8.8/", "https://[2606:4700::1111]:8443/", "https://[64:ff9b::808:808]/"):
        egress.check(url, [])
    service = Service(tmp_path / "root")
    try:
        client = service.client
        with pytest.raises(openai.BadRequestError, match="public address") as found:
            client.webhooks.create(event_types=list(ENDED), name="x", url="https://localhost/")
        assert found.value.param == "url"
        # A name that was public when it was checked leads to the loopback later.
        answers = [["8.8.8.8"], ["8.8.8.8", "127.0.0.1"]]
        names(monkeypatch, lambda: answers.pop(0))
        made = client.webhooks.create(event_types=list(ENDED), name="x", url="https://hook.example/")
        connected = list[Any]()

        def refuse(*given: Any, **_: Any) -> None:
            connected.append(given)
            raise OSError(given)

        monkeypatch.setattr("socket.create_connection", refuse)
        with pytest.raises(openai.BadRequestError, match="public address"):
            client.webhooks.test(made.id, event_type=ENDED[0])
        assert (answers, connected) == ([], [])
    finally:
        service.close()


def names(monkeypatch: pytest.MonkeyPatch, addresses: Callable[[], list[str]]) -> None:
    """Stand in for the name server."""
    found = lambda _, port, type: [(AF_INET, SOCK_STREAM, 6, "", (one, port)) for one in addresses()]  # noqa: A006, E731
    monkeypatch.setattr(egress, "getaddrinfo", found)


def test_the_certificate_must_be_that_of_the_name(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    openssl = shutil.which("openssl") or pytest.skip("needs openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    kind = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    name = ["-subj", "/CN=hook.example", "-addext", "subjectAltName=DNS:hook.example"]
    made = [openssl, *kind, *name, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(made, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    asked = list[Any]()
    context.sni_callback = lambda _, name, __: asked.append(name)
    receiver.server.socket = context.wrap_socket(receiver.server.socket, server_side=True)
    names(monkeypatch, lambda: ["127.0.0.1"])
    allowed = [IPv4Network("127.0.0.1/32")]
    with pytest.raises(egress.Unreachable, match="certificate"):
        egress.post(f"https://hook.example:{receiver.port}/", {}, b"{}", allowed)
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(egress, "_context", lambda: trusting)
    assert egress.post(f"https://hook.example:{receiver.port}/", {}, b"{}", allowed) == 200
    assert asked[-1] == "hook.example"
    assert receiver.seen[0][1]["host"] == f"hook.example:{receiver.port}"
    with pytest.raises(egress.Unreachable, match="certificate"):
        egress.post(f"https://other.example:{receiver.port}/", {}, b"{}", allowed)


def test_slow_and_strange_receivers_are_left(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(egress, "LIMIT", 0.6)
    allowed = [IPv4Network("127.0.0.1/32")]
    receiver.script = [dripping, lambda _: time.sleep(3), garbage]
    for reason in ("0.6 seconds", "0.6 seconds", "HTTP"):
        begin = time.monotonic()
        with pytest.raises(egress.Unreachable, match=reason):
            egress.post(receiver.url, {}, b"{}", allowed)
        assert time.monotonic() - begin < 2


def test_a_lost_key_is_not_replaced_in_silence(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    client = client_of(service, "lost")
    client.webhooks.create(event_types=list(ENDED), name="x", url=PUBLIC)
    file = service.root / "webhooks.key"
    assert file.stat().st_mode & 0o777 == 0o600
    moved = file.rename(file.with_name("moved"))
    try:
        for ask in (
            client.webhooks.list,
            lambda: client.webhooks.create(event_types=list(ENDED), name="y", url=PUBLIC),
        ):
            with pytest.raises(openai.InternalServerError, match="not set up"):
                ask()
        assert "rotate the secrets" in caplog.text
        assert not file.exists()
    finally:
        moved.rename(file)


@pytest.mark.slow
def test_a_server_that_is_killed_between_end_and_delivery_delivers_later(
    tmp_path: Path, tiny_bert: str, tiny_llama: str, receiver: Receiver
) -> None:
    service = Logged(tmp_path / "root", tiny_bert, tiny_llama)
    allow(service.root)
    made = service.client.webhooks.create(event_types=list(ENDED), name="ours", url=receiver.url)
    killed = threading.Event()
    receiver.script = [lambda _: assert_true(killed.wait(60))]  # it has the request, and the server no answer
    file = service.client.files.create(file=("train.csv", b"text,label\na,b\n"), purpose="fine-tune").id
    job = service.client.fine_tuning.jobs.create(model="tiny", training_file=file).id
    service.client.fine_tuning.jobs.cancel(job)
    wait(lambda: receiver.seen, 60)
    service.kill()
    killed.set()
    service.start()
    settled = service.root / "webhooks" / made.id / "settled.txt"
    wait(settled.exists, 30)
    events = receiver.events(service.client, made.signing_secret)
    assert [(one.type, one.data.id) for one in events] == [("fine_tuning.job.cancelled", job)] * 2
    assert events[0].id == events[1].id
    # Neither a restart nor a database that is made again repeats it; one whose acknowledgement is unknown is repeated.
    service.kill()
    service.start("--rebuild")
    assert [one.id for one in service.client.webhooks.list()] == [made.id]
    time.sleep(2)
    assert len(receiver.seen) == 2
    service.kill()
    settled.unlink()
    service.start("--rebuild")
    wait(settled.exists, 30)
    assert receiver.events(service.client, made.signing_secret)[2] == events[0]
    service.close()
    secret = made.signing_secret.removeprefix("whsec_").encode()
    key = service.root / "webhooks.key"
    files = [file for file in tmp_path.rglob("*") if file.is_file() and file != key]
    assert service.log in files
    assert service.root / "service.db" in files
    for file in files:
        content = file.read_bytes()
        assert secret not in content, file
        assert key.read_bytes() not in content, file
    assert b"of-the-caller" not in service.log.read_bytes(), "what callers write into URLs is their own"
    assert json.loads((service.root / "webhooks" / made.id / "endpoint.json").read_bytes())["url"] == receiver.url
    assert Store(service.root).job(job)
