"""The HTTP API: OpenAI's fine-tuning API, field by field, for any client that speaks it.

Every error has OpenAI's form. A conflict with the state of a job is 400 and never 409: OpenAI's client sends a request
again at 408, 409, 429 and 5xx.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Form, Header, Query, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from hf_finetune.config.problems import suggestion
from hf_finetune.errors import RecipeError
from hf_finetune.run.files import discard
from hf_finetune.service import views, worker
from hf_finetune.service.engine import Engine
from hf_finetune.service.sessions import COOKIE, Sessions, is_own
from hf_finetune.service.store import FINAL, Page, Store, new_id, now
from hf_finetune.service.supervisor import Supervisor, note

_logger = logging.getLogger(__name__)
LARGEST = 8 << 30
"""Bytes of the largest request."""
AGAIN = 60
"""Seconds in which an equal request that a client sends again makes no second job."""
FORBIDDEN = re.compile(
    r"(output|hub|extends|version|require_pinned|model\.(name|revision)|tracking|adapter\.from|adapter\.continue_from"
    r"|data\.(train|validation|test|source|subset|revision|mix|cache|workers))(\.|$)"
)
"""Keys of a recipe that are the operator's: they name paths, accounts and machines."""


class Refusal(Exception):  # noqa: N818 - it is an answer
    """A request that is answered with an error of OpenAI's form."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Hyperparameters(_Body):
    """`auto` leaves the choice to the recipe's defaults."""

    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0, le=1000)] = "auto"


class Supervised(_Body):
    """Settings of the method."""

    hyperparameters: Hyperparameters = Hyperparameters()


class Method(_Body):
    """OpenAI's `method`."""

    type: Literal["supervised"]
    supervised: Supervised = Supervised()


Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]


class JobRequest(_Body):
    """A new job; `recipe`, `job_type` and `priority` are ours (`extra_body` of OpenAI's client)."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    training_file: str
    validation_file: str | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_. -]+$")] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None
    integrations: None = None
    recipe: dict[str, Any] | None = None
    job_type: Literal["completion", "classifier"] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0


def make(store: Store, supervisor: Supervisor) -> FastAPI:
    """Make the application; the queue moves while it runs."""

    @asynccontextmanager
    async def life(app: FastAPI) -> Any:
        supervisor.start()
        yield
        supervisor.stop()
        for close in app.state.closing:
            close()

    app = FastAPI(title="hf_finetune", lifespan=life, docs_url=None, redoc_url=None)
    app.state.store, app.state.supervisor, app.state.engine = store, supervisor, Engine()
    app.state.sessions, app.state.closing = Sessions(store), [app.state.engine.close]
    app.include_router(_routes)
    app.middleware("http")(_limited)
    for kind, answer in ((Refusal, _refused), (RequestValidationError, _invalid), (HTTPException, _unknown)):
        app.add_exception_handler(kind, answer)
    app.add_exception_handler(RecipeError, _not_set_up)
    return app


class Caller:
    """Whoever calls: what of the store is their project's."""

    def __init__(self, store: Store, project: str) -> None:
        self.store, self.project = store, project

    def file(self, file: str, param: str | None = None) -> dict[str, Any]:
        """Find an upload; `param` is the field of a body that names it, which then is a mistake of the caller."""
        found = self.store.file(self.project, file)
        if found is None:
            raise Refusal(404 if param is None else 400, f"there is no file {file!r}", param=param, code="not_found")
        return found

    def job(self, job: str) -> dict[str, Any]:
        """Find a job."""
        found = self.store.job(job, self.project)
        if found is None:
            raise Refusal(404, f"there is no fine-tuning job {job!r}", code="not_found")
        return found

    def models(self) -> dict[str, dict[str, Any]]:
        """List the models that may be used, by name."""
        bases = {name: views.model(name, 0, "operator") for name in self.store.base_models()}
        made = [(job["fine_tuned_model"], job["finished_at"]) for job in self.store.models(self.project)]
        return bases | {name: views.model(name, when, self.project) for name, when in made}


def _caller(request: Request, authorization: Annotated[str, Header()] = "") -> Caller:
    scheme, _, token = authorization.partition(" ")
    store: Store = request.app.state.store
    found = store.project_of(token.strip()) if scheme.lower() == "bearer" else None
    if not authorization and (cookie := request.cookies.get(COOKIE)):  # the web page
        found = request.app.state.sessions.project_of(cookie)
        if found is not None and request.method not in ("GET", "HEAD") and not is_own(request):
            raise Refusal(403, "the CSRF token is missing or wrong; reload the page", code="csrf")
    if found is None:
        raise Refusal(401, "the API key is missing, unknown or revoked", code="invalid_api_key")
    return Caller(store, found)


Called = Annotated[Caller, Depends(_caller)]
_routes = APIRouter()

# ---- files ----


@_routes.post("/v1/files")
def upload(
    caller: Called,
    file: UploadFile,
    purpose: Annotated[str, Form()],
    seconds: Annotated[int | None, Form(alias="expires_after[seconds]", ge=3600, le=2592000)] = None,
    anchor: Annotated[Literal["created_at"] | None, Form(alias="expires_after[anchor]")] = None,
) -> dict[str, Any]:
    """Keep an upload."""
    if purpose not in ("fine-tune", "batch", "evals", "user_data", "assistants", "vision"):
        raise Refusal(400, f"unknown purpose {purpose!r}; give fine-tune", param="purpose")
    made, name = new_id("file-"), (file.filename or "file")[:200]
    folder = caller.store.folder_of_file(made)
    folder.mkdir()
    size = 0
    with (folder / "data").open("wb") as out:
        while piece := file.file.read(1 << 20):
            size += out.write(piece)
    document: dict[str, Any] = {"id": made, "filename": name, "bytes": size, "created_at": now(), "purpose": purpose}
    if seconds is not None:
        document["expires_at"] = document["created_at"] + seconds
    caller.store.add_file(caller.project, document)
    return views.file(document)


@_routes.get("/v1/files")
def list_files(
    caller: Called,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """List uploads."""
    found, more = caller.store.files(caller.project, purpose, Page(limit, after, newest_first=order == "desc"))
    return views.listed([views.file(document) for document in found], more=more)


@_routes.get("/v1/files/{file}")
def retrieve_file(caller: Called, file: str) -> dict[str, Any]:
    """Describe an upload."""
    return views.file(caller.file(file))


@_routes.get("/v1/files/{file}/content")
def content(caller: Called, file: str) -> FileResponse:
    """Send the bytes of an upload."""
    found = caller.file(file)
    kind = "text/csv" if found["purpose"] == views.RESULTS else "application/octet-stream"
    return FileResponse(caller.store.folder_of_file(file) / "data", media_type=kind)


@_routes.delete("/v1/files/{file}")
def delete_file(caller: Called, file: str) -> dict[str, Any]:
    """Delete an upload; jobs that read it are not touched."""
    caller.file(file)
    caller.store.delete_file(file)
    return {"id": file, "object": "file", "deleted": True}


# ---- jobs ----


@_routes.post("/v1/fine_tuning/jobs")
def create(
    caller: Called,
    body: JobRequest,
    idempotency_key: Annotated[str | None, Header(max_length=200)] = None,
    x_stainless_retry_count: Annotated[int, Header()] = 0,
) -> dict[str, Any]:
    """Make a job; it is checked first, and trained where there is room."""
    models = caller.store.base_models()
    if body.model not in models:
        known = suggestion(body.model, list(models)) or f"; known: {', '.join(models) or 'none: see models.yaml'}"
        raise Refusal(400, f"there is no base model {body.model!r}{known}", param="model", code="model_not_found")
    for key in _keys(body.recipe or {}):
        if FORBIDDEN.match(key):
            raise Refusal(400, f"recipe.{key} is set by this service", param=f"recipe.{key}")
    said = body.model_dump(mode="json")
    asked_by = idempotency_key or (body.metadata or {}).get("idempotency_key")
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    if asked_by is None and x_stainless_retry_count:
        # The client did not hear the answer; the job of its first try is the latest one with an equal body.
        latest, _ = caller.store.jobs(caller.project, {}, Page(20))
        same = [job for job in latest if job["digest"] == digest and now() - job["created_at"] <= AGAIN]
        if same:
            return views.job(same[0])
    request_key = None if asked_by is None else f"{caller.project}:{asked_by}"
    if request_key is not None and (earlier := caller.store.requested(request_key)) is not None:
        return views.job(caller.job(earlier))
    files = []
    for field, split in worker.SPLITS.items():
        if said[field] is not None:
            found = caller.file(said[field], field)
            suffix = worker.suffix_of(found["filename"]) or ".jsonl"
            files.append((split, caller.store.folder_of_file(found["id"]) / "data", suffix))
    made = new_id("ftjob-")
    method = body.method.supervised.hyperparameters if body.method else None
    asked = (body.hyperparameters or method or Hyperparameters()).model_dump()
    document = {
        **{name: said[name] for name in ("model", "training_file", "validation_file", "suffix", "metadata")},
        **{name: said[name] for name in ("recipe", "job_type", "priority")},
        **{"id": made, "project": caller.project, "created_at": now(), "finished_at": None, "digest": digest},
        **{"state": "validating_files", "wanted": "run", "told": False, "handle": None, "slot": None},
        **{"attempts": 0, "overrides": [], "hyperparameters": asked, "error": None, "fine_tuned_model": None},
        **{"seed": 42 if body.seed is None else body.seed, "base": models[body.model], "chosen": {}, "numbers": {}},
    }
    worker.link(files, caller.store.folder_of_job(made))
    note(caller.store.folder_of_job(made), f"Created fine-tuning job: {made}")
    note(caller.store.folder_of_job(made), f"Validating training file: {body.training_file}")
    return views.job(caller.job(caller.store.add_job(document, request_key)))


@_routes.get("/v1/fine_tuning/jobs")
def list_jobs(
    caller: Called, request: Request, after: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 20
) -> dict[str, Any]:
    """List jobs, newest first."""
    pairs = ((re.fullmatch(r"metadata\[(.+)\]", name), value) for name, value in request.query_params.items())
    metadata: dict[str, str | None] = {found[1]: value for found, value in pairs if found}
    found, more = caller.store.jobs(caller.project, metadata, Page(limit, after))
    shown = [views.job(document, caller.store.folder_of_job(document["id"])) for document in found]
    return views.listed(shown, more=more)


@_routes.get("/v1/fine_tuning/jobs/{job}")
def retrieve(caller: Called, job: str) -> dict[str, Any]:
    """Describe a job."""
    found = caller.job(job)
    return views.job(found, caller.store.folder_of_job(job))


def _want(caller: Caller, job: str, wanted: str, states: tuple[str, ...]) -> dict[str, Any]:
    before = caller.job(job)
    changed = caller.store.change(job, states, wanted=wanted)
    if changed is None:
        raise Refusal(400, f"the job is {before['state']}: it can't be changed by {wanted}", code="invalid_state")
    return views.job(changed)


@_routes.post("/v1/fine_tuning/jobs/{job}/cancel")
def cancel(caller: Called, job: str) -> dict[str, Any]:
    """Cancel a job: it is `cancelled` once its worker is gone; its checkpoints stay."""
    return _want(caller, job, "cancel", ("validating_files", "queued", "running", "paused"))


@_routes.post("/v1/fine_tuning/jobs/{job}/pause")
def pause(caller: Called, job: str) -> dict[str, Any]:
    """Pause a job: it is `paused` once its checkpoint is written."""
    return _want(caller, job, "pause", ("validating_files", "queued", "running"))


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
    return views.paged(views.events(job, caller.store.folder_of_job(job)), after, limit)


@_routes.get("/v1/fine_tuning/jobs/{job}/checkpoints")
def checkpoints(
    caller: Called, job: str, after: str | None = None, limit: Annotated[int, Query(ge=1, le=1000)] = 10
) -> dict[str, Any]:
    """List the checkpoints that are whole, newest first."""
    found = caller.job(job)
    listed = views.paged(views.checkpoints(found, caller.store.folder_of_job(job)), after, limit)
    ids = [one["id"] for one in listed["data"]]
    return {**listed, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}


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
def delete_model(caller: Called, model: str) -> dict[str, Any]:
    """Delete what a job has trained; the job itself stays."""
    job = caller.store.job_of_model(caller.project, model)
    if job is None:
        raise Refusal(404, f"there is no model {model!r} that was trained here", code="model_not_found")
    caller.store.change(job["id"], FINAL, fine_tuned_model=None)
    for folder in ("adapter", "checkpoints"):
        discard(caller.store.folder_of_job(job["id"]) / worker.RUN / folder)
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


def _keys(tree: dict[str, Any], before: str = "") -> list[str]:
    """List the dotted keys of blocks, those of whole blocks among them."""
    found = []
    for name, value in tree.items():
        found += [before + name, *(_keys(value, f"{before}{name}.") if isinstance(value, dict) else [])]
    return found


async def _limited(request: Request, go_on: Callable[[Request], Awaitable[Any]]) -> Any:
    """Refuse requests that are too large before they are read."""
    try:
        size = int(request.headers.get("content-length", "0"))
    except ValueError:
        size = LARGEST + 1
    if size > LARGEST or "chunked" in request.headers.get("transfer-encoding", ""):
        message = f"send at most {LARGEST:,} bytes, and their number in Content-Length"
        return _answer(413, message, code="request_too_large")
    answer = await go_on(request)
    if answer.status_code >= 500 and request.method == "POST":
        answer.headers.setdefault("x-should-retry", "false")
    return answer


def _answer(status: int, message: str, *, param: str | None = None, code: str | None = None) -> JSONResponse:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)  # noqa: S101 - starlette's type of handlers is wider
    answer = _answer(error.status, str(error), param=error.param, code=error.code)
    answer.headers.update(error.headers)
    return answer


def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    found = [(".".join(map(str, one["loc"][1:])), one["msg"]) for one in error.errors()]
    return _answer(400, "; ".join(f"{field}: {said}" for field, said in found), param=found[0][0])


def _unknown(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101
    return _answer(error.status_code, f"{request.method} {request.url.path}: {error.detail}")


def _not_set_up(request: Request, error: Exception) -> JSONResponse:
    # It names files of the host: the operator reads it in the log.
    _logger.error("%s", error)
    return _answer(500, "this service is not set up right; its operator finds the reason in its log")
