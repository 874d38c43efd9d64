"""The operator's view: numbers for Prometheus, and a line of JSON for each request.

A line holds no header, query or body: keys, texts and labels of users stay out of logs.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sql
from fastapi import APIRouter, FastAPI, Request, Response
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from hf_finetune.config.credentials import HIDDEN, redacted
from hf_finetune.service import history
from hf_finetune.service.store import Store, new_id
from hf_finetune.service.tables import JOBS

STATES = ("validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled")
KEY = re.compile(r"hf-[\w-]{20,}|whsec_[\w=+/-]{20,}")
"""Of the API, or of a webhook; `redacted` knows those of other services."""
LOOPBACK = ("127.0.0.1", "::1")
_logger = logging.getLogger("hf_finetune.requests")

Message = MutableMapping[str, Any]
routes = APIRouter()


class Requests:
    """ASGI middleware: numbers, times, counts and logs every request.

    Args:
        app: What answers.
        registry: Of the numbers.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], registry: CollectorRegistry) -> None:
        self.app = app
        self.count = Counter(
            "hf_finetune_requests", "Requests answered.", ("method", "route", "status"), registry=registry
        )
        self.seconds = Histogram(
            "hf_finetune_request_seconds",
            "Time until an answer was sent.",
            ("method", "route"),
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60),
            registry=registry,
        )

    async def __call__(self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        """Answer, and say so."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun, status, number = time.perf_counter(), 500, new_id("req_")

        async def answered(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", number.encode())]
            await send(message)

        try:
            await self.app(scope, receive, answered)
        finally:
            took = time.perf_counter() - begun
            # Of a path that nothing answers there may be any number; of routes there are a few.
            route = getattr(scope.get("route"), "path", "other")
            method = scope["method"] if scope["method"] in ("GET", "POST", "DELETE", "HEAD") else "other"
            self.count.labels(method, route, str(status)).inc()
            self.seconds.labels(method, route).observe(took)
            line = {"method": scope["method"], "path": scope["path"], "status": status, "seconds": round(took, 4)}
            client = (scope.get("client") or (None,))[0]
            _logger.info("%s", number, extra={"request": {**line, "client": client, "request_id": number}})


class _Lines(logging.Formatter):
    """Writes a request as `--log-format json` writes other lines."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        head = {"time": at.replace("+00:00", "Z"), "level": "info", "event": "request"}
        # A key does not belong in an address, but somebody will put it there.
        return redacted(KEY.sub(HIDDEN, json.dumps({**head, **getattr(record, "request", {})})))


class Queue(Collector):
    """Numbers of the queue, read when they are asked for."""

    def __init__(self, app: FastAPI) -> None:
        self.app = app

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Count jobs and places, and add up the tokens a second of the jobs that run."""
        store: Store = self.app.state.store
        with store.engine.connect() as connection:
            counted = sql.select(JOBS.c.state, sql.func.count()).group_by(JOBS.c.state)
            counts = {row[0]: row[1] for row in connection.execute(counted)}
            running = sql.select(JOBS.c.id).where(JOBS.c.state == "running")
            names = list(connection.execute(running).scalars())
        jobs = GaugeMetricFamily("hf_finetune_jobs", "Jobs by state.", labels=["state"])
        for state in STATES:
            jobs.add_metric([state], counts.get(state, 0))
        yield jobs
        places = len(self.app.state.supervisor.places)
        yield GaugeMetricFamily("hf_finetune_slots", "Places where a job trains: GPUs, or slots of the CPU.", places)
        busy = len({place for job in store.active() if job["handle"] is not None for place in job["places"]})
        yield GaugeMetricFamily("hf_finetune_slots_busy", "Places in use.", busy)
        lines = [next(history.steps(store.folder_of_job(name)), None) for name in names]
        speed = sum(line.get("tokens_per_second", 0.0) for line in lines if line)
        yield GaugeMetricFamily("hf_finetune_tokens_per_second", "Tokens a second of all jobs that run.", speed)


def watch(app: FastAPI) -> None:
    """Count and log the requests of an application, and answer `/metrics`."""
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    registry.register(Queue(app))
    app.state.registry = registry
    app.add_middleware(Requests, registry=registry)
    app.include_router(routes)
    handler = logging.StreamHandler()
    handler.setFormatter(_Lines())
    _logger.handlers, _logger.propagate = [handler], False
    _logger.setLevel(logging.INFO)


@routes.get("/metrics", include_in_schema=False)
def metrics(request: Request) -> Response:
    """Answer Prometheus: on this machine, or with an API key where others reach the service."""
    host = request.client.host if request.client else ""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    is_near = host in LOOPBACK and not request.app.state.behind_proxy
    is_known = scheme.lower() == "bearer" and request.app.state.store.project_of(token.strip()) is not None
    if not is_near and not is_known:
        return Response("give an API key: Authorization: Bearer hf-...\n", 401, media_type="text/plain")
    return Response(generate_latest(request.app.state.registry), media_type=CONTENT_TYPE_LATEST)
