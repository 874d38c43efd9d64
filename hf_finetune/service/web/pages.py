"""The pages: login, jobs, one job with its reports, a form that starts one, and a playground.

A page holds no data of users: its script asks the API for them, with the session's cookie, and writes them as text. The
policy of every page forbids scripts and styles within it, and whatever lies elsewhere. Reports, which show users' data,
are served into a sandbox without scripts and without the session.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.resources import files
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

import jinja2
from fastapi import APIRouter, Form, Query, Request, Response
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException

from hf_finetune.config import paths
from hf_finetune.errors import FinetuneError
from hf_finetune.inference import opening
from hf_finetune.run import journal
from hf_finetune.service import history, views, worker
from hf_finetune.service.calls import Called, Caller
from hf_finetune.service.requests import may_set
from hf_finetune.service.sessions import COOKIE, Sessions, csrf_of, is_own, set_cookie
from hf_finetune.tasks._catalogue import METRICS

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)
SANDBOX = "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'"
STATIC = Path(__file__).parent / "static"
KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POINTS = 400
"""Points of a curve: more than a chart is wide in pixels on a telephone."""
CHARTS = {name: metric.chart.capitalize() for name, metric in METRICS.items() if metric.chart}
CHARTS["learning_rate"] = "Learning rate"
"""Quantity -> the chart that it is drawn in."""
DATA_REPORT = "data.html"
SECONDS = 600
"""For a data report."""
_making = threading.Lock()
routes = APIRouter(include_in_schema=False)


@cache
def _templates() -> jinja2.Environment:
    # Not that of the reports, which would load torch into this process.
    return jinja2.Environment(
        loader=jinja2.PackageLoader("hf_finetune.service.web", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _page(name: str, request: Request, status: int = 200, **context: Any) -> HTMLResponse:
    csrf = csrf_of(request.cookies.get(COOKIE, ""))
    text = _templates().get_template(f"{name}.html.jinja").render(page=name, csrf=csrf, **context)
    return HTMLResponse(text, status, {"content-security-policy": POLICY, **_CLOSED})


_CLOSED = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-opener-policy": "same-origin",
}


def project_of(request: Request) -> str | None:
    """Tell the project of whoever is logged in; None: nobody."""
    cookie = request.cookies.get(COOKIE)
    sessions: Sessions = request.app.state.sessions
    return None if cookie is None else sessions.project_of(cookie)


def _framed(name: str, request: Request, status: int = 200, **context: Any) -> Response:
    """Give a page to whoever is logged in, the login to others."""
    project = project_of(request)
    if project is None:
        return RedirectResponse("/login", 303)
    return _page(name, request, status, project=project, **context)


# ---- login ----


@routes.get("/login")
def login(request: Request) -> Response:
    """Ask for an API key."""
    return _page("login", request, wrong=False)


@routes.post("/login")
def log_in(request: Request, key: Annotated[str, Form(max_length=400)]) -> Response:
    """Begin a session."""
    if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
        raise HTTPException(403, "another site may not log you in")
    sessions: Sessions = request.app.state.sessions
    cookie = sessions.open(key.strip())
    if cookie is None:
        return _page("login", request, 401, wrong=True)
    answer = RedirectResponse("/", 303)
    set_cookie(answer, cookie, secure=request.app.state.secure)
    return answer


@routes.post("/logout")
def log_out(request: Request) -> Response:
    """End the session."""
    if not is_own(request):
        raise HTTPException(403, "the CSRF token is missing or wrong; reload the page")
    request.app.state.sessions.close(request.cookies.get(COOKIE, ""))
    answer = Response(status_code=204)
    answer.delete_cookie(COOKIE, path="/")
    return answer


# ---- pages ----


@routes.get("/")
def jobs(request: Request) -> Response:
    """List the jobs."""
    return _framed("jobs", request)


@routes.get("/new")
def new(request: Request) -> Response:
    """Start a job."""
    return _framed("new", request)


@routes.get("/playground")
def playground(request: Request) -> Response:
    """Ask models."""
    return _framed("playground", request)


@routes.get("/webhooks")
def webhooks(request: Request) -> Response:
    """List, make and delete endpoints of webhooks."""
    return _framed("webhooks", request)


@routes.get("/jobs/{job}")
def one_job(request: Request, job: str) -> Response:
    """Show a job."""
    return _framed("missing", request, 404) if _of(request, job) is None else _framed("job", request, job=job)


@routes.get("/static/{name}")
def static(name: str) -> Response:
    """Send a script or a style sheet; nothing in them is anybody's own."""
    headers = {"cache-control": "no-cache", "x-content-type-options": "nosniff"}
    if name == "page.css":  # that of the reports
        return Response(
            files("hf_finetune.reports").joinpath(name).read_bytes(), media_type="text/css", headers=headers
        )
    known = {path.name: path for path in STATIC.iterdir() if path.suffix in KINDS}
    if name not in known:
        raise HTTPException(404, "there is no such file")
    return FileResponse(known[name], media_type=KINDS[known[name].suffix], headers=headers)


# ---- reports ----


def _sandboxed(file: Path, request: Request, job: dict[str, Any]) -> Response:
    text = views.unplaced(file.read_text(encoding="utf-8"), request.app.state.store.root, [job])
    return HTMLResponse(text, headers={**_CLOSED, "content-security-policy": SANDBOX})


def _of(request: Request, job: str) -> tuple[dict[str, Any], Path] | None:
    project = project_of(request)
    found = None if project is None else request.app.state.store.job(job, project)
    return None if found is None else (found, request.app.state.store.folder_of_job(job))


@routes.get("/jobs/{job}/report")
def report(request: Request, job: str) -> Response:
    """Show the run report."""
    found = _of(request, job)
    file = None if found is None else found[1] / worker.RUN / "report.html"
    if found is None or file is None or not file.is_file():
        return _framed("missing", request, 404)
    return _sandboxed(file, request, found[0])


@routes.get("/jobs/{job}/data")
def data_report(request: Request, job: str) -> Response:
    """Show the report about the data of a job; the first time it is made, which takes seconds."""
    found = _of(request, job)
    if found is None:
        return _framed("missing", request, 404)
    job_document, folder = found
    if not (folder / DATA_REPORT).is_file() and (folder / worker.RECIPE).is_file():
        # One after the other, as each is a process that loads torch; those who wait must not do so in threads.
        if not _making.acquire(blocking=False):
            said = "Another data report is being made. This page asks again in a few seconds."
            return Response(said, 503, {"refresh": "5", "retry-after": "5", **_CLOSED}, "text/plain")
        try:
            _make_data_report(folder)
        finally:
            _making.release()
    if not (folder / DATA_REPORT).is_file():
        return _framed("missing", request, 404)
    return _sandboxed(folder / DATA_REPORT, request, job_document)


def _make_data_report(folder: Path) -> None:
    """Check the data of a job once more, this time with a report; a job with errors has one, too."""
    command = ["-m", "hf_finetune", "check", worker.RECIPE, "--report", DATA_REPORT, "--quiet"]
    # A caller's rows name no file of the host, here as in the worker.
    environment = {**os.environ, paths.ROWS: str(folder), "CUDA_VISIBLE_DEVICES": ""}
    with (folder / worker.LOG).open("ab") as log, suppress(subprocess.TimeoutExpired):
        subprocess.run(  # noqa: S603 - no shell
            [sys.executable, *command],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            timeout=SECONDS,
            check=False,
        )


# ---- what only the page asks ----


@routes.get("/v1/fine_tuning/jobs/{job}/metrics")
def metrics(caller: Called, job: str, points: Annotated[int, Query(ge=2, le=10_000)] = POINTS) -> dict[str, Any]:
    """Give the curves of a job, chart by chart: of each series, at most so many pairs of step and value."""
    caller.job(job)
    lines = journal.read(caller.store.folder_of_job(job) / history.METRICS)
    series: dict[str, list[dict[str, Any]]] = {}
    for phase, split in (("train", "training"), ("eval", "validation")):
        kept = _thinned([line for line in lines if line["phase"] == phase], points)
        for name, chart in CHARTS.items():
            found = [[line["step"], line[name]] for line in kept if isinstance(line.get(name), int | float)]
            if found and all(isfinite(value) for _, value in found):
                series.setdefault(chart, []).append({"name": name, "split": split, "points": found})
    return {"charts": [{"title": title, "series": found} for title, found in series.items()]}


def _thinned(lines: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Keep at most so many lines, evenly, the first and the last among them."""
    if len(lines) <= most:
        return list(lines)
    return [lines[round(index * (len(lines) - 1) / (most - 1))] for index in range(most)]


@routes.get("/v1/fine_tuning/recipe_schema")
def recipe_schema(caller: Called) -> JSONResponse:
    """Give the JSON Schema of `recipe`: the keys that callers may set."""
    return JSONResponse(_allowed())


@cache
def _allowed() -> dict[str, Any]:
    from hf_finetune.recipe import json_schema

    whole = json_schema()
    # A job's recipe lies on top of the one that is proposed for its data: nothing in it is required.
    tree = {**whole["then"], "$defs": whole["$defs"]}
    return {"type": "object", **_pruned(tree, "", tree["$defs"])}


def _pruned(tree: Any, key: str, blocks: dict[str, Any]) -> Any:
    """Leave out the keys that are the operator's, and write each block in the place of its reference."""
    if isinstance(tree, list):
        return [_pruned(one, key, blocks) for one in tree]
    if not isinstance(tree, dict):
        return tree
    if "$ref" in tree:
        block = blocks[tree["$ref"].rpartition("/")[2]]
        tree = block | {name: value for name, value in tree.items() if name != "$ref"}
    made = {name: value for name, value in tree.items() if name not in ("properties", "$defs", "required", "default")}
    made = {name: _pruned(value, key, blocks) for name, value in made.items()}
    if "default" in tree:
        made["default"] = tree["default"]
    if "properties" in tree:
        keys = {name: f"{key}.{name}".lstrip(".") for name in tree["properties"]}
        made["properties"] = {
            name: _pruned(tree["properties"][name], dotted, blocks) for name, dotted in keys.items() if may_set(dotted)
        }
    return made


@routes.get("/v1/fine_tuning/answering_models")
def answering_models(caller: Called) -> dict[str, Any]:
    """List the models that the playground can ask: their task, and the columns that a row has."""
    found = (_models(caller, job) for job in caller.store.models(caller.project))
    return {"object": "list", "data": [*chain.from_iterable(found)]}


def _models(caller: Caller, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Describe the model of a job and its checkpoints, the model last."""
    folder = caller.store.folder_of_job(job["id"])
    try:
        recipe = opening.read(str(folder / worker.RUN))
    except FinetuneError:  # its folder was damaged: nobody can ask it
        return []
    task = recipe.task
    if task.generates and not task.predicts_next_token:  # it has no endpoint
        return []
    asked = task.asked_columns()
    is_chat = task.generates and len(asked) == 1 and task.columns()[asked[0]].kind == "chat"
    endpoint = "chat" if task.generates else "classifications"
    about = {"job": job["id"], "task": task.kind, "title": task.title, "endpoint": endpoint, "is_chat": is_chat}
    return [{"id": name, **about, "columns": asked} for name in (*history.kept(job, folder), job["fine_tuned_model"])]
