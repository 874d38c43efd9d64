"""The service against whoever means harm: other projects, other sites, strangers, and senders of what never ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import PIL.Image
import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
httpx2 = pytest.importorskip("httpx2")

from test_service import wait  # noqa: E402
from test_service_api import Service  # noqa: E402
from test_service_web import Logged, sentences  # noqa: E402

from hf_finetune.config import paths, yamlfile  # noqa: E402
from hf_finetune.config.problems import keys, options  # noqa: E402
from hf_finetune.config.section import Section  # noqa: E402
from hf_finetune.errors import DataError, RecipeError  # noqa: E402
from hf_finetune.recipe import Recipe  # noqa: E402
from hf_finetune.service import calls, uploads  # noqa: E402
from hf_finetune.service.requests import may_set, refused  # noqa: E402
from hf_finetune.service.sessions import CSRF, csrf_of  # noqa: E402
from hf_finetune.service.store import Store, new_id  # noqa: E402
from hf_finetune.tasks import _media  # noqa: E402

OPEN = {"/login", "/tensorboard", "/healthz", "/readyz", "/metrics", "/openapi.json", "/static/{name}"}
"""Routes that need no key; `/metrics` does where others reach the service."""
MODEL = "ft:tiny:default::secret"


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    made = Service(tmp_path_factory.mktemp("attacked") / "root")
    yield made
    made.close()


@pytest.fixture(scope="module")
def ids(service: Service) -> dict[str, str]:
    """One thing of each kind that the project `default` has, by the name that routes give it."""
    mine = service.client
    endpoint = mine.webhooks.create(event_types=["batch.failed"], name="a", url="https://93.184.215.14/")
    return {
        "file": mine.files.create(file=("a.jsonl", b"{}"), purpose="fine-tune").id,
        "upload": mine.uploads.create(bytes=1, filename="a", mime_type="", purpose="fine-tune").id,
        "job": service.job(fine_tuned_model=MODEL),
        "batch": service.job(id=new_id("batch_"), kind="batch"),
        "model": MODEL,
        "endpoint": endpoint.id,
    }


def page_of(service: Service, project: str) -> Any:
    """Make a client that is logged in at the page, as a browser is; pages, too, answer it."""
    cookie = service.app.state.sessions.open(service.store.create_key(project, "test"))
    return httpx2.Client(
        base_url=f"http://127.0.0.1:{service.port}",
        headers={"cookie": f"hf_finetune_session={cookie}", CSRF: csrf_of(cookie)},
        timeout=30,
    )


def routes(service: Service) -> Iterator[tuple[str, str]]:
    """List method and path of every route, those that are in no schema included."""

    def walk(found: Any) -> Iterator[Any]:
        for route in found:
            inner = getattr(route, "original_router", None)
            yield from [route] if inner is None else walk(inner.routes)

    for route in walk(service.app.routes):
        for method in sorted(route.methods - {"HEAD"}):
            yield method, route.path


def bodies(ids: dict[str, str]) -> dict[str, dict[str, Any]]:
    """A request that fits for every route that takes a body."""
    form = {"files": {"data": ("x", b"x"), "file": ("x", b"x")}, "data": {"purpose": "fine-tune"}}
    job = {"model": "tiny", "training_file": ids["file"]}
    messages = [{"role": "user", "content": "hi"}]
    batch = {"input_file_id": ids["file"], "endpoint": "/v1/completions"}
    endpoint = {"event_types": ["batch.failed"], "name": "b", "url": "https://93.184.215.14/"}
    upload = {"bytes": 1, "filename": "b", "purpose": "fine-tune"}
    return {
        "/v1/files": form,
        "/v1/uploads": {"json": upload},
        "/v1/uploads/{upload}/parts": {"files": {"data": ("x", b"x")}},
        "/v1/uploads/{upload}/complete": {"json": {"part_ids": []}},
        "/v1/webhook_endpoints": {"json": endpoint},
        "/v1/webhook_endpoints/{endpoint}": {"json": {}},
        "/v1/webhook_endpoints/{endpoint}/test": {"json": {"event_type": "batch.failed"}},
        "/v1/fine_tuning/jobs": {"json": job},
        "/v1/fine_tuning/preview": {"json": job},
        "/v1/batches": {"json": batch},
        "/v1/chat/completions": {"json": {"model": ids["model"], "messages": messages}},
        "/v1/completions": {"json": {"model": ids["model"], "prompt": "hi"}},
        "/v1/classifications": {"json": {"model": ids["model"], "input": "hi"}},
        "/v1/chat/classifications": {"json": {"model": ids["model"], "input": {"messages": messages}}},
        "/login": {"data": {"key": "hf-wrong"}},
    }


# ---- other projects, other sites, strangers ----


def test_other_projects_see_nothing_on_any_route(service: Service, ids: dict[str, str]) -> None:
    other = page_of(service, "other")
    nothing = {name: value[:-4] + "0000" if name != "model" else MODEL[:-2] for name, value in ids.items()}
    found, guessed = bodies(ids), bodies(nothing)
    asked = 0
    for method, path in routes(service):
        names = set(re.findall(r"{(\w+)(?::path)?}", path)) - {"name", "path"}
        assert names <= ids.keys(), f"{path}: give this test a thing of another project for {names - ids.keys()}"
        if method == "GET" and not names and not path.startswith("/tensorboard"):
            text = other.get(path).text
            assert [value for value in ids.values() if value in text] == [], path
        body = json.dumps(found.get(path, {}), default=str)
        referring = method == "POST" and any(value in body for value in ids.values())
        if not names and not referring:
            continue
        answers = []
        for things, given in ((ids, found), (nothing, guessed)):
            url = path.replace(":path", "").format(**things)
            answer = other.request(method, url, **given.get(path, {}))
            text = answer.text
            for value in things.values():
                text = text.replace(value, "")
            answers.append((answer.status_code, text))
        assert answers[0] == answers[1], f"{method} {path} tells what is another project's from what is not there"
        # A body that names a file which is not there is wrong; what an address names is missing.
        by_file = not names and ids["file"] in body
        assert answers[0][0] == (400 if by_file else 404), (method, path, answers[0])
        asked += 1
    assert asked >= 28
    assert service.client.files.retrieve(ids["file"]).id == ids["file"], "nothing was changed"
    assert service.client.models.retrieve(MODEL).id == MODEL
    assert service.client.webhooks.retrieve(ids["endpoint"]).name == "a"


def test_nothing_is_answered_without_a_key_and_nothing_changed_without_the_token_of_the_page(
    service: Service, ids: dict[str, str]
) -> None:
    stranger = httpx2.Client(base_url=f"http://127.0.0.1:{service.port}")
    mine = page_of(service, "default")
    del mine.headers[CSRF]
    changing = 0
    for method, path in routes(service):
        things = {**ids, "name": "api.js", "path": "x"}
        url, given = path.replace(":path", "").format(**things), bodies(ids).get(path, {})
        if path not in OPEN:
            status = stranger.request(method, url, **given).status_code
            assert status == (401 if path.startswith("/v1/") else 303 if path != "/logout" else 403), (method, path)
        if method not in ("GET", "OPTIONS"):
            for token in ({}, {CSRF: "0" * 64}):
                headers = {**token, "sec-fetch-site": "cross-site"}
                assert mine.request(method, url, headers=headers, **given).status_code == 403, (method, path)
            changing += 1
    assert changing >= 25
    mine.cookies.clear()
    assert service.client.files.retrieve(ids["file"]).id == ids["file"]


def test_a_thousand_wrong_keys_are_answered_alike_and_leave_nothing(service: Service) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", service.port)

    def ask(key: str, **more: str) -> tuple[int, bytes, float]:
        began = time.perf_counter()
        connection.request("GET", "/v1/files?limit=1", headers={"authorization": f"Bearer {key}", **more})
        answer = connection.getresponse()
        return answer.status, answer.read(), time.perf_counter() - began

    before = [ask(service.key)[2] for _ in range(50)]
    pool: Any = service.store.engine.pool
    rows = pool.checkedout(), len(service.store.list_keys())
    size = sum(file.stat().st_size for file in service.root.rglob("*") if file.is_file())
    # Near misses of the key that is right, among them the shapes that a careless comparison would take.
    wrong = ["", service.key[:-1], service.key + "x", service.key.upper(), f"{service.key},", "%00", "'--", "é"]
    wrong += [f"hf-{number:043d}" for number in range(1000 - len(wrong))]
    answers = {ask(key.encode("latin-1").decode("latin-1"))[:2] for key in wrong}
    assert len(answers) == 1
    assert answers.pop()[0] == 401
    after = [ask(service.key) for _ in range(50)]
    assert {status for status, *_ in after} == {200}, "no key is locked out by the guesses of others"
    assert statistics.median(took for *_, took in after) < 5 * statistics.median(before) + 0.01
    assert rows == (pool.checkedout(), len(service.store.list_keys()))
    assert size == sum(file.stat().st_size for file in service.root.rglob("*") if file.is_file())


# ---- names and paths ----


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
        ({"method": {"type": "reinforcement"}}, "reinforcement is not offered"),
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


def test_rows_of_callers_name_no_file_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret, own = tmp_path / "secret.png", tmp_path / "job" / "own.png"
    own.parent.mkdir()
    for file in (secret, own):
        file.write_bytes(b"x")
    monkeypatch.setenv(paths.ROWS, str(own.parent))
    assert _media.content(str(own), "image") == b"x"
    for name in (str(secret), f"{own.parent}/../secret.png", str(tmp_path / "missing.png")):
        with pytest.raises(DataError, match="outside of the data"):
            _media.content(name, "image")


# ---- what never ends ----


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


def test_of_strangers_no_long_body_is_read(service: Service) -> None:
    most = 16 << 20
    for path, status in (("/v1/fine_tuning/jobs", 401), ("/v1/chat/completions", 401), ("/login", 413)):
        kind = b"content-type: application/x-www-form-urlencoded\r\n" if path == "/login" else b""
        for head in (f"content-length: {most}\r\n".encode(), b"transfer-encoding: chunked\r\n"):
            got, answer, sent = _raw(service, path, kind + head, _chunks(b"x" * (1 << 16), most), key="hf-wrong")
            assert (got, sent < most) == (status, True), (path, head, answer)


def test_a_body_that_drips_is_cut_off(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "IDLE", 1.0)

    def drips() -> Iterator[bytes]:
        for _ in range(100):
            yield from _chunks(b"x", 1)
            time.sleep(0.2)

    began = time.monotonic()
    head = b"content-type: multipart/form-data; boundary=b\r\ntransfer-encoding: chunked\r\n"
    status, answer, _ = _raw(service, "/v1/files", head, drips())
    assert (status, answer["error"]["type"]) == (408, "invalid_request_error")
    assert time.monotonic() - began < 5, "though something came all the time"


def test_slow_uploads_of_one_project_leave_room_for_others(service: Service) -> None:
    head = b"content-type: multipart/form-data; boundary=b\r\ncontent-length: 1000\r\n\r\n"
    key = service.store.create_key("slow", "test")
    request = f"POST /v1/files HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n".encode() + head
    held = [socket.create_connection(("127.0.0.1", service.port)) for _ in range(uploads.OF_PROJECT)]
    try:
        for connection in held:
            connection.sendall(request)
        wait(lambda: service.app.state.receiving["slow"] == uploads.OF_PROJECT, 10)
        with pytest.raises(openai.RateLimitError, match="of this project"):
            service.client_of(key).files.create(file=("a.jsonl", b"{}"), purpose="fine-tune")
        assert service.client.files.create(file=("a.jsonl", b"{}"), purpose="fine-tune").id
    finally:
        for connection in held:
            connection.close()
    wait(lambda: service.app.state.receiving["slow"] == 0, 10)


# ---- what an operator edits and restores ----


def test_files_of_an_operator_are_read_again_once_they_change_and_a_mistake_tells_callers_nothing(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, read = service.root / "models.yaml", Counter[str]()
    before, parse = file.read_text(), yamlfile.parse

    def counted(text: str, name: str) -> Any:
        read[Path(name).name] += 1
        return parse(text, name)

    monkeypatch.setattr(yamlfile, "parse", counted)
    try:
        for names in (["tiny", "../../etc/passwd"], ["a/b", "a b"]):
            file.write_text(json.dumps(dict.fromkeys(names, str(service.root / "tiny"))))
            for _ in range(3):
                assert {model.id for model in service.client.models.list()} >= set(names)
                assert service.client.models.retrieve(names[1]).owned_by == "operator"
            assert read == {"models.yaml": 1}, "and not for each request"
            read.clear()
        file.write_text("tiny: {place: /secret}\n")
        with pytest.raises(openai.InternalServerError) as caught:
            service.client.models.list()
        assert not {str(service.root), "/secret", "models.yaml"} & set(re.split(r"[ ':]", caught.value.response.text))
    finally:
        file.write_text(before)


def test_a_damaged_backup_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "ftjob-1"
    Store(tmp_path)
    folder.mkdir()
    (folder / "job.json").write_text('{"id": "ftjob-1", "pro')
    with pytest.raises(RecipeError, match=r"runs/ftjob-1/job.json: is damaged; restore it"):
        Store(tmp_path, anew=True)


def test_names_of_projects_are_no_part_of_anything_else(service: Service) -> None:
    for name in ("", "a:b", "a/b", "../x", "a\n", "x" * 65):
        with pytest.raises(RecipeError, match="a project has"):
            service.store.create_key(name, "test")


# ---- a server with its workers ----


@pytest.mark.slow
def test_secrets_and_paths_of_the_host_are_in_no_file_log_or_answer(
    tmp_path: Path, tiny_bert: str, tiny_vit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = {"HF_TOKEN": "hf_" + "Tk9" * 12, "VLLM_API_KEY": "vk-" + "Zq7" * 12, "WANDB_API_KEY": "ab12" * 10}
    for name, value in hidden.items():
        monkeypatch.setenv(name, value)
    server = Logged(tmp_path / "root", tiny_bert, tiny_vit)
    try:
        client = server.client
        form = httpx2.Client(base_url=server.address).post("/login", data={"key": server.key})
        cookie = form.headers["set-cookie"].partition(";")[0]
        endpoint = client.webhooks.create(event_types=["batch.failed"], name="a", url="https://93.184.215.14/")
        for value in (server.key, endpoint.signing_secret, hidden["HF_TOKEN"]):  # somebody puts them into addresses
            httpx2.get(f"{server.address}/v1/files/{quote(value, safe='')}?key={value}")
        secrets = {*hidden.values(), server.key, cookie.partition("=")[2], endpoint.signing_secret}
        train = client.files.create(file=("train.csv", sentences().encode()), purpose="fine-tune").id
        recipe = {"training": {"steps": 3, "batch_size": 4}, "tracking": {"images": False}}
        job = client.fine_tuning.jobs.create(model="tiny", training_file=train, extra_body={"recipe": recipe}).id
        # A file of the host, which rows of a caller name.
        PIL.Image.new("RGB", (32, 32), "red").save(tmp_path / "host.png")
        images = [f"{tmp_path}/host.png,{'ab'[n % 2]}" for n in range(24)]
        rows = client.files.create(
            file=("images.csv", "\n".join(["image,label", *images]).encode()), purpose="fine-tune"
        )
        thief = client.fine_tuning.jobs.create(model="llama", training_file=rows.id).id
        assert server.until(job, "succeeded", "failed").status == "succeeded"
        failed = server.until(thief, "succeeded", "failed")
        assert failed.error.code == "invalid_training_file"
        assert "outside of the data" in failed.error.message
        page = httpx2.Client(base_url=server.address, headers={"cookie": cookie}, timeout=120)
        answers = {}
        for path in (
            *(
                "/",
                "/new",
                "/playground",
                "/metrics",
                "/openapi.json",
                "/v1/models",
                "/v1/files",
                "/v1/webhook_endpoints",
            ),
            *("/v1/fine_tuning/jobs", "/v1/fine_tuning/recipe_schema", "/v1/fine_tuning/answering_models"),
            *(f"/jobs/{one}{end}" for one in (job, thief) for end in ("", "/report", "/data")),
            *(f"/v1/fine_tuning/jobs/{job}{end}" for end in ("", "/events?limit=100", "/checkpoints", "/metrics")),
            f"/v1/files/{client.fine_tuning.jobs.retrieve(job).result_files[0]}/content",
        ):
            answers[path] = page.get(path).text
        preview = {"model": "tiny", "training_file": train, "recipe": {"training": {"batch_size": 0}}}
        answers["preview"] = str(client.post("/fine_tuning/preview", body=preview, cast_to=object))
        assert page.get(f"/jobs/{job}/data").status_code == 200
        assert page.get(f"/jobs/{thief}/data").status_code == 404, "the check with a report reads no more than the job"
        places = {str(server.root), tiny_bert, tiny_vit, str(Path.home()), os.environ["HF_FINETUNE_CACHE"]}
        for path, text in answers.items():
            told = {one for one in secrets | places if one in text.replace(str(tmp_path / "host.png"), "")}
            assert told == set(), path
        files = [file for file in server.root.rglob("*") if file.is_file() and file.name != "webhooks.key"]
        for file in [*files, server.log]:
            content = file.read_bytes()
            assert {one for one in secrets if one.encode() in content} == set(), file
        assert len(files) > 20
    finally:
        server.close()
