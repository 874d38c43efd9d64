"""A call of the API: whose it is, how much it may send, and how it is refused: always in OpenAI's form.

A conflict with the state of a job is 400 and never 409: OpenAI's client sends a request again at 408, 409, 429 and 5xx.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import OperationalError
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from hf_finetune.errors import RecipeError
from hf_finetune.service import history, views, worker
from hf_finetune.service.requests import faults
from hf_finetune.service.sessions import COOKIE, is_own
from hf_finetune.service.store import OverQuota, Store

_logger = logging.getLogger(__name__)
LARGEST = 16 << 20
"""Bytes of a request that carries no file."""
LARGEST_FILE = 8 << 30
LARGEST_PART = 64 << 20
"""Bytes of a part of an upload, as at OpenAI."""
FORM = 1 << 16
"""Bytes of a form around its file."""
FILES = ((re.compile(r"/v1/files/?"), LARGEST_FILE), (re.compile(r"/v1/uploads/[^/]+/parts/?"), LARGEST_PART))
"""Paths that take a file, and its most bytes."""
IDLE = 60.0
"""Seconds that a client may take to send the next piece of a request."""
FAULTS, LEVELS = 20, 12
"""Mistakes of a body that are named, and the levels of a field that name it."""
SLOWEST = 4096
"""Bytes a second that a request must bring, once it has lasted as long: else a few clients would take every place."""

Message = MutableMapping[str, Any]


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
        self.status, self.param, self.code, self.headers = status, param, code, headers


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
        if found is None or found.get("kind", "train") != "train":
            raise Refusal(404, f"there is no fine-tuning job {job!r}", code="not_found")
        return found

    def models(self) -> dict[str, dict[str, Any]]:
        """List the models that may be used, by name."""
        bases = {name: views.model(name, 0, "operator") for name in self.store.base_models()}
        for job in self.store.models(self.project):
            names = [job["fine_tuned_model"], *history.kept(job, self.store.folder_of_job(job["id"]))]
            bases |= {name: views.model(name, job["finished_at"], self.project) for name in names}
        return bases

    def answering(self, model: str, param: str = "model") -> tuple[dict[str, Any], Path]:
        """Find the job that made a model, which the field `param` names, and what answers: its run, or a checkpoint."""
        name, mark, step = model.partition(history.CHECKPOINT)
        job = self.store.job_of_model(self.project, name)
        if job is not None:
            folder = self.store.folder_of_job(job["id"])
            place = history.kept(job, folder).get(model) if mark else folder / worker.RUN
            if place is not None:
                return job, place
        trained = f"there is no model {model!r} that was trained here"
        if model in self.store.base_models():
            trained = f"{model!r} is a base model, which jobs train; ask the fine_tuned_model of a job"
        message = trained if job is None else f"the model {name!r} has not kept the checkpoint of step {step}"
        raise Refusal(404 if param == "model" else 400, message, param=param, code="model_not_found")


def _project(request: Request) -> str | None:
    """Tell whose a request is: by its key, or of the web page by its cookie."""
    authorization, cookie = request.headers.get("authorization", ""), request.cookies.get(COOKIE)
    if not authorization and cookie:
        found: str | None = request.app.state.sessions.project_of(cookie)
        return found
    scheme, _, token = authorization.partition(" ")
    store: Store = request.app.state.store
    return store.project_of(token.strip()) if scheme.lower() == "bearer" else None


def _caller(request: Request) -> Caller:
    found = _project(request)
    if found is None:
        raise _unknown_key()
    by_cookie = not request.headers.get("authorization")
    if by_cookie and request.method not in ("GET", "HEAD") and not is_own(request):
        raise Refusal(403, "the CSRF token is missing or wrong; reload the page", code="csrf")
    return Caller(request.app.state.store, found)


def _unknown_key() -> Refusal:
    return Refusal(401, "the API key is missing, unknown or revoked", code="invalid_api_key")


Called = Annotated[Caller, Depends(_caller)]


class Guard:
    """ASGI middleware: cuts off requests that are too large or too slow, whatever their headers say.

    Of whom it does not know, it reads no more than a login has: FastAPI reads a body before it asks for the key.
    """

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Callable[[], Awaitable[Message]], send: Any) -> None:
        """Hand on a request, counting what is read of it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        posts = scope["method"] == "POST"
        most = next((size + FORM for path, size in FILES if posts and path.fullmatch(scope["path"])), LARGEST)
        read, whole, began = 0, False, time.monotonic()

        async def counted() -> Message:
            nonlocal read, whole
            if whole:
                return await receive()
            left = began + IDLE + read / SLOWEST - time.monotonic()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, min(IDLE, left)))
            except TimeoutError:
                raise HTTPException(408, f"the rest did not come within {IDLE:g} seconds") from None
            read += len(message.get("body", b""))
            whole = not message.get("more_body", False) and read <= most
            if read > most:
                raise HTTPException(413, f"send at most {most:,} bytes")
            return message

        async def answered(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = list(message.get("headers", ()))
                if message["status"] >= 500 and posts and all(name != b"x-should-retry" for name, _ in given):
                    given.append((b"x-should-retry", b"false"))
                if is_long and not whole:  # else all that is still sent would be read, only to be thrown away
                    given.append((b"connection", b"close"))
                message["headers"] = given
            await send(message)

        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"0")
        is_long = b"transfer-encoding" in headers or not length.isdigit() or int(length) > FORM
        refusal = None
        if is_long and not await run_in_threadpool(_is_known, Request(scope)):
            most = FORM
            if scope["path"].startswith("/v1/"):
                refusal = _refused(Request(scope), _unknown_key())
        if refusal is None and (not length.isdigit() or int(length) > most):
            refusal = _answer(413, f"send at most {most:,} bytes", code="request_too_large")
        await (refusal or self.app)(scope, counted, answered)


def _is_known(request: Request) -> bool:
    try:
        return _project(request) is not None
    except OperationalError:
        return True  # the database is away, which the route says in its own way


def guard(app: FastAPI) -> None:
    """Let an application answer every error in OpenAI's form, and none with what is the host's own."""
    app.add_middleware(Guard)
    for kind, answer in (
        (Refusal, _refused),
        (RequestValidationError, _invalid),
        (HTTPException, _unknown),
        (OverQuota, _over_quota),
        (RecipeError, _not_set_up),
        (OSError, _no_space),
        (Exception, _crashed),
    ):
        app.add_exception_handler(kind, answer)


def _answer(
    status: int,
    message: str,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    return JSONResponse(views.error(status, message, param=param, code=code), status, headers)


def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refusal)  # noqa: S101 - starlette's type of handlers is wider
    return _answer(error.status, str(error), param=error.param, code=error.code, headers=error.headers)


def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    # A body that is wrong in thousands of places, or a thousand levels deep, is not told so at full length.
    found = faults((one["loc"][1:LEVELS], one) for one in error.errors()[:FAULTS])
    message = "; ".join(": ".join(filter(None, one)) for one in found.items())
    return _answer(400, message, param=next(iter(found)) or None)


def _unknown(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)  # noqa: S101
    code = "request_too_large" if error.status_code == 413 else None
    headers = dict(error.headers or {})
    return _answer(
        error.status_code, f"{request.method} {request.url.path}: {error.detail}", code=code, headers=headers
    )


def _over_quota(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, OverQuota)  # noqa: S101
    if error.what == "waiting_jobs":  # some end by themselves, but not within the seconds that a client waits
        return _answer(429, str(error), code="queue_full", headers={"x-should-retry": "false"})
    return _answer(403, f"{error}; delete some, or ask the operator", code="quota_exceeded")


def _not_set_up(request: Request, error: Exception) -> JSONResponse:
    # It names files of the host: the operator reads it in the log.
    _logger.error("%s", error)
    return _answer(500, "this service is not set up right; its operator finds the reason in its log")


def _no_space(request: Request, error: Exception) -> JSONResponse:
    _logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _answer(507, "the disk of this service is full; its operator must make room", code="storage_full")
    return _crashed(request, error)


def _crashed(request: Request, error: Exception) -> JSONResponse:
    # Beside `Guard`: starlette answers what nobody caught outside of all middleware.
    message, headers = "this service failed; its operator finds the reason in its log", {"x-should-retry": "false"}
    again = None if request.method == "GET" else headers
    return _answer(500, message, code="internal_error", headers=again)
