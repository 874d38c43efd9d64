"""The server process: address, places for jobs, and a graceful end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from sqlalchemy.exc import DataError, OperationalError

from hf_finetune import log
from hf_finetune.errors import Problem, RecipeError
from hf_finetune.service import answers, api, batches, executors, ops, views, worker
from hf_finetune.service.settings import Settings
from hf_finetune.service.store import Store
from hf_finetune.service.supervisor import Place, Supervisor
from hf_finetune.service.web import board, pages

GRACE = 20
"""Seconds that answers which are under way have when the service is told to end."""


def run(
    store: Store,
    host: str,
    port: int,
    *,
    tls: Sequence[str] | None = None,
    behind_proxy: bool = False,
    settings: Settings,
) -> None:
    """Serve until SIGTERM or Ctrl-C; jobs that run go on, and the next start finds them.

    Args:
        store: The root folder.
        host: Address.
        port: 0 takes a free one.
        tls: Files of certificate and key.
        behind_proxy: A proxy does TLS, and requests that seem to come from this machine may be anybody's.
        settings: How the queue works.

    Raises:
        RecipeError: The address is taken.
    """
    queue = Supervisor(store, executors.make(settings, store.root), places(settings), settings)
    app = make(store, queue, behind_proxy=behind_proxy, secure=tls is not None)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With its protocol named, asyncio sends answers at once: else those on a kept connection wait 40 ms for Nagle.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            listener.listen(2048)  # whoever reads the address below is heard
        except OSError as error:
            message = f"{host}:{port} can't be used: {error.strerror}; give another --port"
            raise RecipeError(Problem(message, key="--port")) from None
        certificate, key = tls or (None, None)
        config = uvicorn.Config(
            app,
            log_level="warning",
            server_header=False,
            timeout_graceful_shutdown=GRACE,
            ssl_certfile=certificate,
            ssl_keyfile=key,
        )
        address = f"{'https' if tls else 'http'}://{host}:{listener.getsockname()[1]}"
        log.say(f"fine-tuning API: {address}/v1, page: {address}/ (Ctrl-C ends it; jobs keep running)")
        uvicorn.Server(config).run(sockets=[listener])


def make(store: Store, supervisor: Supervisor, *, behind_proxy: bool = False, secure: bool = False) -> FastAPI:
    """Make the whole application: the API, the answers of models, and the page."""
    app = api.make(store, supervisor)
    app.state.behind_proxy, app.state.secure = behind_proxy, behind_proxy or secure
    for routes in (answers.routes, batches.routes, pages.routes, board.routes):
        app.include_router(routes)
    app.state.boards = board.Boards(store)
    app.state.closing.append(app.state.boards.close)
    ops.watch(app)
    app.add_exception_handler(OperationalError, _database_away)
    app.add_exception_handler(DataError, _no_text)
    return app


def _database_away(request: Request, error: Exception) -> JSONResponse:
    """Let the client try again: the database is started anew, or locked for long."""
    return JSONResponse(views.error(503, "the database can't be reached now"), 503)


def _no_text(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(views.error(400, "a value is no text that the database takes, e.g. with a NUL"), 400)


def places(settings: Settings) -> list[Place]:
    """List the places where jobs train: one for each GPU, else for each slot of the CPU, or of a scheduler."""
    if settings.executor != "local":
        return [Place({})] * (settings.slots or 16)
    if settings.slots is None and (gpus := _gpus()):
        return gpus
    slots = settings.slots or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return [Place({"CUDA_VISIBLE_DEVICES": "", **_cores(slot, slots)}, memory // slots) for slot in range(slots)]


def _cores(slot: int, slots: int) -> dict[str, str]:
    """Give a slot cores of its own: jobs that train side by side would fight for the same ones."""
    if slots == 1 or not hasattr(os, "sched_getaffinity"):
        return {}
    cores = sorted(os.sched_getaffinity(0))
    each = len(cores) // slots
    own = cores[slot * each : (slot + 1) * each] or [cores[slot % len(cores)]]
    return {worker.CORES: ",".join(map(str, own))}


def _gpus() -> list[Place]:
    """List the GPUs that this process sees."""
    if not any(Path("/dev").glob("nvidia[0-9]*")) and not any(Path("/dev", name).exists() for name in ("kfd", "dxg")):
        return []
    # In a process of its own: torch would stay in this one, with all its memory.
    sizes = "torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())"
    ask = [sys.executable, "-c", f"import torch; print(*({sizes}))"]
    found = subprocess.run(ask, capture_output=True, text=True, check=False).stdout.split()  # noqa: S603
    # An operator may have given this service some of them.
    names = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(len(found))))).split(",")
    return [Place({"CUDA_VISIBLE_DEVICES": name}, int(size)) for name, size in zip(names, found, strict=False)]
