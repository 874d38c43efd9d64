"""Every answer of the service against the types of OpenAI's client, strictly: the client itself takes anything."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
httpx2 = pytest.importorskip("httpx2")

from openai import types  # noqa: E402
from openai.types import fine_tuning as tuning  # noqa: E402
from openai.types import webhooks as hooks  # noqa: E402
from openai.types.fine_tuning.jobs import FineTuningJobCheckpoint  # noqa: E402
from openai.types.shared import ErrorObject  # noqa: E402
from openai.types.uploads import UploadPart  # noqa: E402
from test_service_api import Service  # noqa: E402

from hf_finetune.run.store import MANIFEST  # noqa: E402
from hf_finetune.service.store import new_id  # noqa: E402
from hf_finetune.service.supervisor import note  # noqa: E402

JOB = ("progress", "user_provided_suffix")
"""Fields of a job that are ours."""
MODEL = "ft:tiny:typed::x"


class Asker:
    """Asks as one project, and checks what comes."""

    def __init__(self, service: Service) -> None:
        self.service, self.store = service, service.store
        key = {"authorization": f"Bearer {service.store.create_key('typed', 'test')}"}
        self.client = httpx2.Client(base_url=f"http://127.0.0.1:{service.port}/v1", headers=key)

    def ask(self, method: str, path: str, status: int = 200, **given: Any) -> Any:
        """Ask, and read the answer."""
        answer = self.client.request(method, path, **given)
        assert answer.status_code == status, answer.text
        return answer.json()

    def typed(self, kind: Any, method: str, path: str, *extra: str, **given: Any) -> Any:
        """Ask for one object."""
        return fits(kind, self.ask(method, path, **given), *extra)

    def pages(self, path: str, kind: Any, *extra: str, named: bool = False) -> list[Any]:
        """Walk through a list one by one, as the client's pages do; `named` ones tell their first and last id, too."""
        found, after = list[Any](), dict[str, str]()
        while True:
            page = self.ask("GET", path, params={"limit": 1, **after})
            assert page.keys() == {"object", "data", "has_more"} | ({"first_id", "last_id"} if named else set())
            assert (page["object"], type(page["has_more"])) == ("list", bool)
            found += [fits(kind, one, *extra) for one in page["data"]]
            if named:
                assert page["first_id"] == page["last_id"] == (found[-1].id if page["data"] else None)
            if not page["has_more"]:
                assert len(found) == len({one.id for one in found}) > 1, path
                return found
            after = {"after": found[-1].id}

    def job(self, state: str = "succeeded", **fields: Any) -> str:
        """Keep a job."""
        asked = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": 0.5}
        chosen = {"epochs": 2.5, "batch_size": 4, "learning_rate": 0.1}
        numbers = {"total_steps": 9, "splits": {"train": {"all_tokens": 90}}}
        more = {"project": "typed", "hyperparameters": asked, "chosen": chosen, "numbers": numbers}
        return self.service.job(state, **{**more, "metadata": {"a": "b"}, **fields})


@pytest.fixture(scope="module")
def asker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    made = Service(tmp_path_factory.mktemp("typed") / "root")
    yield Asker(made)
    made.close()


def fits(kind: Any, found: Any, *extra: str) -> Any:
    """Hold an answer against a type of OpenAI's client, strictly; fields that it does not know must be in `extra`."""
    made = kind.model_validate(found, strict=True)

    def unknown(model: Any, place: str) -> Iterator[str]:
        for name, value in model:
            if name in (model.model_extra or {}):
                yield place + name
            for one in value if isinstance(value, list) else [value]:
                if hasattr(one, "model_extra"):
                    yield from unknown(one, f"{place}{name}.")

    assert set(unknown(made, "")) <= set(extra), kind.__name__
    return made


def test_files_and_uploads(asker: Asker) -> None:
    for purpose, more in (
        ("fine-tune", {}),
        ("batch", {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}),
    ):
        given = {"files": {"file": ("a.jsonl", b"{}")}, "data": {"purpose": purpose, **more}}
        file = asker.typed(types.FileObject, "POST", "/files", **given)
        assert file.expires_at == (file.created_at + 3600 if more else None)
    asker.typed(types.FileObject, "GET", f"/files/{file.id}")
    asker.pages("/files", types.FileObject)
    asker.typed(types.FileDeleted, "DELETE", f"/files/{file.id}")
    begun = {"json": {"bytes": 2, "filename": "a", "purpose": "fine-tune", "mime_type": ""}}
    upload = asker.typed(types.Upload, "POST", "/uploads", **begun)
    part = asker.typed(UploadPart, "POST", f"/uploads/{upload.id}/parts", files={"data": ("a", b"{}")})
    ended = asker.typed(types.Upload, "POST", f"/uploads/{upload.id}/complete", json={"part_ids": [part.id]})
    assert (ended.status, ended.file.bytes) == ("completed", 2)
    upload = asker.typed(types.Upload, "POST", "/uploads", **begun)
    assert asker.typed(types.Upload, "POST", f"/uploads/{upload.id}/cancel").status == "cancelled"


def test_jobs_events_and_checkpoints(asker: Asker) -> None:
    file = asker.ask("POST", "/files", files={"file": ("a.jsonl", b"{}")}, data={"purpose": "fine-tune"})["id"]
    body: dict[str, Any] = {"model": "tiny", "training_file": file, "suffix": "x", "seed": 3, "metadata": {"a": "b"}}
    body["method"] = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}
    made = asker.typed(tuning.FineTuningJob, "POST", "/fine_tuning/jobs", *JOB, json=body)
    asker.typed(tuning.FineTuningJob, "POST", f"/fine_tuning/jobs/{made.id}/cancel", *JOB)
    asker.job("failed", error={"code": "invalid_recipe", "message": "no", "param": None})
    asker.job("cancelled", metadata=None)
    for job in (asker.job(fine_tuned_model=MODEL, result_files=["file-x"]), asker.job("running")):
        run = asker.store.folder_of_job(job) / "run"
        for step in (3, 6):
            (run / "checkpoints" / f"checkpoint-{step}").mkdir(parents=True)
            (run / "checkpoints" / f"checkpoint-{step}" / MANIFEST).write_text("{}")
        lines = [
            {"step": step, "epoch": 0.1, "time": 1.5 + step, "phase": phase, "loss": 1, "accuracy": 0.5}
            for step in (3, 6)
            for phase in ("train", "eval")
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        note(run.parent, "Created")
        asker.typed(tuning.FineTuningJob, "GET", f"/fine_tuning/jobs/{job}", *JOB)
        events = asker.pages(f"/fine_tuning/jobs/{job}/events", tuning.FineTuningJobEvent)
        assert {event.type for event in events} == {"message", "metrics"}
        path = f"/fine_tuning/jobs/{job}/checkpoints"
        asker.pages(path, FineTuningJobCheckpoint, "metrics.valid_accuracy", named=True)
        for after in ("x", "ftckpt_x_²", "ftckpt_x_" + "9" * 5000, f"ftckpt_{job[6:]}_-1"):
            assert asker.ask("GET", path, params={"after": after})["data"] == []
    found = asker.pages("/fine_tuning/jobs", tuning.FineTuningJob, *JOB)
    assert {job.status for job in found} >= {"succeeded", "failed", "cancelled", "running"}
    # OpenAI's API has this state, and the type of its client does not.
    assert asker.ask("GET", f"/fine_tuning/jobs/{asker.job('paused', project='typed')}")["status"] == "paused"


def test_models_and_batches(asker: Asker) -> None:
    name = f"{MODEL}-2"
    asker.job(fine_tuned_model=name)
    listed = asker.ask("GET", "/models")
    assert listed.keys() == {"object", "data"}
    assert {"tiny", name} <= {fits(types.Model, one).id for one in listed["data"]}
    asker.typed(types.Model, "GET", f"/models/{name}")
    asker.typed(types.ModelDeleted, "DELETE", f"/models/{name}")
    made = {"kind": "batch", "endpoint": "/v1/completions", "input_file_id": "file-x"}
    ended = {"counts": {"outputs": 1, "errors": 1}, "output_file_id": "file-a", "error_file_id": "file-b"}
    failed = {"error": {"code": "x", "message": "y", "param": None}}
    for state, fields in (("succeeded", ended), ("failed", failed), ("running", {})):
        batch = asker.job(state, **made, **fields, id=new_id("batch_"))
        asker.typed(types.Batch, "GET", f"/batches/{batch}")
    asker.pages("/batches", types.Batch, named=True)
    assert asker.typed(types.Batch, "POST", f"/batches/{batch}/cancel").status == "cancelling"


def test_webhooks(asker: Asker) -> None:
    endpoint = {"event_types": ["batch.failed"], "name": "a", "url": "https://93.184.215.14/"}
    secret, plain = hooks.WebhookEndpointWithSecret, hooks.WebhookEndpoint
    kept = [asker.typed(secret, "POST", "/webhook_endpoints", json=endpoint).id for _ in range(2)]
    asker.pages("/webhook_endpoints", plain, named=True)
    path = f"/webhook_endpoints/{kept[0]}"
    asker.typed(plain, "GET", path)
    assert asker.typed(plain, "POST", path, json={"name": "b"}).name == "b"
    asker.typed(secret, "POST", f"{path}/rotate_secret")
    asker.typed(hooks.WebhookEventTypeList, "GET", "/webhook_event_types")
    for one in kept:
        asker.typed(hooks.DeletedWebhookEndpoint, "DELETE", f"/webhook_endpoints/{one}")


HALF = "\ud800"
DEEP = "[" * 300 + "]" * 300


def test_what_is_wrong_is_an_error_of_openais_form_and_never_a_failure_of_the_server(asker: Asker) -> None:
    file = asker.ask("POST", "/files", files={"file": ("a.jsonl", b"{}")}, data={"purpose": "fine-tune"})["id"]
    job, jobs = asker.job(), "/fine_tuning/jobs"
    head = {"model": "tiny", "training_file": file}
    odd = [json.dumps({**head, "recipe": {HALF: 1}}), json.dumps({**head, "recipe": {"task": {"text": HALF}}})]
    odd += [json.dumps({**head, "metadata": {HALF: "a"}}), json.dumps({**head, "training_file": HALF}), "[" * 200_000]
    odd += [json.dumps(head)[:-1] + f', "recipe": {{"task": {{"text": {text}}}}}}}' for text in (DEEP, "9" * 5000)]
    odd += [json.dumps({**head, "hyperparameters": {"learning_rate_multiplier": float("nan")}}), "", "null", "\x00"]
    asked: list[tuple[str, str, dict[str, Any]]] = [("POST", jobs, {"content": body}) for body in odd]
    chat = {"model": "x", "messages": [{"role": "user", "content": HALF}]}
    asked.append(("POST", "/chat/completions", {"content": json.dumps(chat)}))
    asked.append(("POST", "/classifications", {"content": json.dumps({"model": "x", "input": [5] * 4000})}))
    for first in ('"x"', '{"body": [1]}', "[" * 100_000, f'{{"body": {{"model": {"9" * 5000}}}}}', "\n" * 5000):
        given: dict[str, Any] = {"files": {"file": ("a", first.encode())}, "data": {"purpose": "batch"}}
        batch = {"input_file_id": asker.ask("POST", "/files", **given)["id"], "endpoint": "/v1/completions"}
        asked.append(("POST", "/batches", {"json": batch}))
    asked += [("POST", "/files", {"files": {"file": ("a", b"")}, "data": data}) for data in ({}, {"purpose": "x"})]
    asked += [("POST", "/files", {"data": {"purpose": "fine-tune"}}), ("POST", "/files", {"content": b"x"})]
    asked += [("GET", jobs, {"params": {f"metadata[{n}]": "x" for n in range(1500)}})]
    asked += [("GET", path, {}) for path in ("/files/none", "/files/%00", "/nothing", "/models/none", "/files?limit=0")]
    asked += [("PUT", jobs, {}), ("GET", f"{jobs}/{job}/metrics?points=0", {}), ("POST", f"{jobs}/{job}/pause", {})]
    for method, path, given in asked:
        headers = {"content-type": "application/json"} if "content" in given else {}
        answer = asker.client.request(method, path, headers=headers, **given)
        told = (method, path, str(given)[:200], answer.text[:200])
        assert 400 <= answer.status_code < 500, told
        assert answer.json().keys() == {"error"}, told
        assert answer.json()["error"].keys() == {"message", "type", "param", "code"}, told
        fits(ErrorObject, answer.json()["error"])
        assert len(answer.text) < 10_000, told
