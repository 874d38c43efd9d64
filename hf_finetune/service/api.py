"""The HTTP API: OpenAI's fine-tuning API, field by field, for any client that speaks it."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections import Counter
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, Header, Query, Request
from fastapi.responses import JSONResponse

from hf_finetune.config.suggestions import suggestion
from hf_finetune.run.files import discard
from hf_finetune.service import history, preview, uploads, views, vllm, webhooks, worker
from hf_finetune.service.calls import Called, Caller, Refusal, guard
from hf_finetune.service.engine import Engine
from hf_finetune.service.requests import PAIRS, JobRequest
from hf_finetune.service.sessions import Sessions
from hf_finetune.service.store import FINAL, Page, Store, new_id, now
from hf_finetune.service.supervisor import Supervisor, note

FORWARDED = 2048
"""Requests that may wait for another server, which answers many at the same time."""
LATEST = 100
"""Jobs among which a preview looks for one that trained at the same speed."""
AGAIN = 60
"""Seconds in which an equal request that a client sends again makes no second job."""


def make(store: Store, supervisor: Supervisor) -> FastAPI:
    """Make the application; the queue moves while it runs."""

    @asynccontextmanager
    async def life(app: FastAPI) -> Any:
        supervisor.start()
        yield
        supervisor.stop()
        for close in app.state.closing:
            close()

    # Forms are spooled by Starlette where Python keeps temporary files: on the disk that is watched, and the root's.
    tempfile.tempdir = str(store.root / "spool")
    app = FastAPI(title="hf_finetune", lifespan=life, docs_url=None, redoc_url=None)
    settings = supervisor.settings
    app.state.store, app.state.supervisor, app.state.engine = store, supervisor, Engine(settings.memory)
    app.state.sessions, app.state.closing = Sessions(store), [app.state.engine.close]
    app.state.forwarding = None
    if settings.engine_url is not None:
        app.state.forwarding = Engine(most=FORWARDED, url=settings.engine_url)
        app.state.closing.append(app.state.forwarding.close)
    app.state.receiving = Counter[str]()
    for routes in (uploads.routes, webhooks.routes, _routes):
        app.include_router(routes)
    guard(app)
    return app


_routes = APIRouter()

# ---- jobs ----


@_routes.post("/v1/fine_tuning/jobs")
def create(
    caller: Called,
    request: Request,
    body: JobRequest,
    idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
    x_stainless_retry_count: Annotated[int, Header()] = 0,
) -> dict[str, Any]:
    """Make a job; it is checked first, and trained where there is room."""
    store = caller.store
    document, files = admit(caller, body, request.app.state.supervisor)
    key = idempotency_key or (body.metadata or {}).get("idempotency_key")
    if key is None and x_stainless_retry_count:
        # The client did not hear the answer; the job of its first try is the latest one with an equal body.
        latest, _ = store.jobs(caller.project, {}, Page(20))
        for job in latest:
            if job["digest"] == document["digest"] and now() - job["created_at"] <= AGAIN:
                return views.job(job)
    request_key = None if key is None else f"{caller.project}:{key}"
    if request_key is not None and (earlier := store.requested(request_key)) is not None:
        job = caller.job(earlier)
        if job["digest"] != document["digest"]:
            raise Refusal(400, "the idempotency key was given with another request", code="idempotency_key_reused")
        return views.job(job)
    made, folder = document["id"], store.folder_of_job(document["id"])
    worker.link(files, folder)
    note(folder, f"Created fine-tuning job: {made}")
    note(folder, f"Validating training file: {body.training_file}")
    return views.job(caller.job(store.add_job({**document, "request_key": request_key})))


def admit(caller: Caller, body: JobRequest, queue: Supervisor) -> tuple[dict[str, Any], list[tuple[str, Path, str]]]:
    """Make the document of a job, of which nothing is kept yet, and list its files: split, file, ending of the name.

    Raises:
        Refusal: It asks for something that there is not, or that is not the caller's to say.
    """
    models = caller.store.base_models()
    if body.model not in models:
        known = suggestion(body.model, list(models)) or f"; known: {', '.join(models) or 'none: see models.yaml'}"
        raise Refusal(400, f"there is no base model {body.model!r}{known}", param="model", code="model_not_found")
    if refusals := list(body.refusals()):
        said = "; ".join(f"{key} {why}" for key, why in refusals)
        raise Refusal(400, said, param=refusals[0][0], code="unsupported_value")
    devices = body.devices or models[body.model].get("devices", 1)
    if devices > queue.devices:
        most = f"a job gets {queue.devices} here at most"
        said = most if queue.settings.executor == "local" else "the operator's template decides"
        raise Refusal(400, f"{devices} devices: {said}", param="devices", code="unsupported_value")
    said_all = body.model_dump(mode="json")
    files, names = [], {}
    for field, split in worker.SPLITS.items():
        if said_all[field] is not None:
            found = caller.file(said_all[field], field)
            suffix = worker.suffix_of(found["filename"]) or ".jsonl"
            files.append((split, caller.store.folder_of_file(found["id"]) / "data", suffix))
            names[f"{worker.DATA}/{split}{suffix}"] = found["filename"]
    recipe = dict(body.recipe or {})
    for target in body.classifier_targets or ():
        task = recipe.get("task")
        recipe["task"] = (task if isinstance(task, dict) else {}) | target.task()
    document = {
        **{name: said_all[name] for name in ("model", "training_file", "validation_file", "suffix", "metadata")},
        **{name: said_all[name] for name in ("job_type", "classifier_targets", "priority")},
        **{"id": new_id("ftjob-"), "project": caller.project, "created_at": now(), "finished_at": None},
        **{"digest": hashlib.sha256(json.dumps(said_all, sort_keys=True).encode()).hexdigest(), "recipe": recipe},
        **{"state": "validating_files", "wanted": "run", "told": False, "handle": None, "places": []},
        **{"attempts": 0, "overrides": [], "hyperparameters": body.asked.model_dump(), "error": None},
        **{"method": None if body.method is None else body.method.type},
        **{"seed": 42 if body.seed is None else body.seed, "base": models[body.model], "chosen": {}, "numbers": {}},
        **{"fine_tuned_model": None, "devices": devices, "names": names},
    }
    return document, files


@_routes.post("/v1/fine_tuning/preview")
def show_plan(caller: Called, request: Request, body: JobRequest) -> dict[str, Any]:
    """Tell what a job would be: its plan, what is wrong with it, and its first rows as the model sees them."""
    document, files = admit(caller, body, request.app.state.supervisor)
    try:
        found = preview.make(caller.store, document, files)
    except preview.Busy:
        message = f"{preview.AT_ONCE} previews are being made; try again in a moment"
        raise Refusal(429, message, code="too_many_previews", headers={"retry-after": "5"}) from None
    except preview.TooLong:
        message = (
            f"the data could not be looked at within {preview.LIMIT:g} seconds; create the job, which is checked too"
        )
        raise Refusal(400, message, param="training_file", code="preview_too_long") from None
    store, alike = caller.store, ("model", "devices", "shape")
    latest, _ = store.jobs(caller.project, {}, Page(LATEST))
    wanted = {"state": "succeeded", **{name: {**document, **found}[name] for name in alike}}
    jobs = (job for job in latest if all(job.get(name) == value for name, value in wanted.items()))
    rate = history.rate((job, store.folder_of_job(job["id"])) for job in jobs)
    return views.preview(document, found, store.root, rate)


@_routes.get("/v1/fine_tuning/jobs")
def list_jobs(
    caller: Called, request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 20
) -> dict[str, Any]:
    """List jobs, newest first."""
    asked = request.query_params
    pairs = ((re.fullmatch(r"metadata\[(.+)\]", name), value) for name, value in asked.items())
    metadata = {found[1]: value for found, value in pairs if found}
    if len(metadata) > PAIRS:
        raise Refusal(400, f"a job has at most {PAIRS} pairs of metadata; ask for fewer", param="metadata")
    # Literally `metadata=null`: the jobs without any.
    wanted = None if asked.get("metadata") == "null" else metadata
    found, more = caller.store.jobs(caller.project, wanted, Page(limit, after))
    shown = [views.job(document, caller.store.folder_of_job(document["id"])) for document in found]
    return views.listed(shown, more=more)


@_routes.get("/v1/fine_tuning/jobs/{job}")
def retrieve(caller: Called, job: str) -> dict[str, Any]:
    """Describe a job."""
    found = caller.job(job)
    return views.job(found, caller.store.folder_of_job(job))


def _want(caller: Caller, job: str, wanted: str, reached: str, states: tuple[str, ...]) -> dict[str, Any]:
    before = caller.job(job)
    if before["state"] == reached:  # the answer to an earlier request may have been lost
        return views.job(before)
    changed = caller.store.change(job, states, wanted=wanted)
    if changed is None:
        raise Refusal(400, f"the job is {before['state']}: it can't be changed by {wanted}", code="invalid_state")
    return views.job(changed)


@_routes.post("/v1/fine_tuning/jobs/{job}/cancel")
def cancel(caller: Called, job: str) -> dict[str, Any]:
    """Cancel a job: it is `cancelled` once its worker is gone; its checkpoints stay."""
    return _want(caller, job, "cancel", "cancelled", ("validating_files", "queued", "running", "paused"))


@_routes.post("/v1/fine_tuning/jobs/{job}/pause")
def pause(caller: Called, job: str) -> dict[str, Any]:
    """Pause a job: it is `paused` once its checkpoint is written."""
    return _want(caller, job, "pause", "paused", ("validating_files", "queued", "running"))


@_routes.post("/v1/fine_tuning/jobs/{job}/resume")
def resume(caller: Called, job: str) -> dict[str, Any]:
    """Queue a paused job; it goes on bit for bit."""
    before = caller.job(job)
    is_checked = (caller.store.folder_of_job(job) / worker.CHECKED).exists()
    state = "queued" if is_checked else "validating_files"
    changed = caller.store.change(job, ["paused"], state=state, wanted="run")
    if changed is None:
        raise Refusal(400, f"the job is {before['state']}: only a paused one resumes", code="invalid_state")
    return views.job(changed)


@_routes.get("/v1/fine_tuning/jobs/{job}/events")
def events(
    caller: Called, job: str, after: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 20
) -> dict[str, Any]:
    """List what happened, newest first."""
    caller.job(job)
    found, more = history.events(job, caller.store.folder_of_job(job), after, limit)
    return views.listed(found, more=more)


@_routes.get("/v1/fine_tuning/jobs/{job}/checkpoints")
def checkpoints(
    caller: Called, job: str, after: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 10
) -> dict[str, Any]:
    """List the checkpoints that are whole, newest first."""
    found = caller.job(job)
    data, more = history.checkpoints(found, caller.store.folder_of_job(job), after, limit)
    ids = [one["id"] for one in data]
    return {**views.listed(data, more=more), "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}


# ---- models ----


@_routes.get("/v1/models")
def list_models(caller: Called) -> dict[str, Any]:
    """List base models and models of finished jobs."""
    return {"object": "list", "data": list(caller.models().values())}


@_routes.get("/v1/models/{model:path}")
def retrieve_model(caller: Called, model: str) -> dict[str, Any]:
    """Describe a model."""
    found = caller.models()
    if model not in found:
        raise Refusal(404, f"there is no model {model!r}{suggestion(model, list(found))}", code="model_not_found")
    return found[model]


@_routes.delete("/v1/models/{model:path}")
def delete_model(caller: Called, request: Request, model: str) -> dict[str, Any]:
    """Delete what a job has trained; the job itself stays."""
    job = caller.store.job_of_model(caller.project, model)
    if job is None:
        raise Refusal(404, f"there is no model {model!r} that was trained here", code="model_not_found")
    caller.store.change(job["id"], FINAL, fine_tuned_model=None)
    run = caller.store.folder_of_job(job["id"]) / worker.RUN
    if (url := request.app.state.supervisor.settings.engine_url) is not None:
        vllm.unregister(url, run)
    for folder in ("adapter", "checkpoints"):
        discard(run / folder)
    return {"id": model, "object": "model", "deleted": True}


@_routes.get("/healthz")
def health() -> dict[str, str]:
    """Tell that the server answers."""
    return {"status": "ok"}


@_routes.get("/readyz")
def ready(request: Request) -> JSONResponse:
    """Tell whether the queue moves."""
    return JSONResponse(
        {"queue": request.app.state.supervisor.is_alive}, 200 if request.app.state.supervisor.is_alive else 503
    )
