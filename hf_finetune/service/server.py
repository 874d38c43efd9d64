"""The server process: address, places for jobs, and a graceful end."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Sequence

import uvicorn

from hf_finetune import log
from hf_finetune.errors import Problem, RecipeError
from hf_finetune.service import answers, api, ops
from hf_finetune.service.executors.local import Local
from hf_finetune.service.store import Store
from hf_finetune.service.supervisor import Supervisor
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
    slots: int | None = None,
) -> None:
    """Serve until SIGTERM or Ctrl-C; jobs that run go on, and the next start finds them.

    Args:
        store: The root folder.
        host: Address.
        port: 0 takes a free one.
        tls: Files of certificate and key.
        behind_proxy: A proxy does TLS, and requests that seem to come from this machine may be anybody's.
        slots: Jobs that train side by side without GPUs; None: one.

    Raises:
        RecipeError: The address is taken.
    """
    app = api.make(store, Supervisor(store, Local(), places(slots)))
    app.state.behind_proxy, app.state.secure = behind_proxy, behind_proxy or tls is not None
    for routes in (answers.routes, pages.routes, board.routes):
        app.include_router(routes)
    app.state.boards = board.Boards(store)
    app.state.closing.append(app.state.boards.close)
    ops.watch(app)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
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
        log.say(f"fine-tuning API: {address}/v1, page: {address}/ (Ctrl-C ends it; jobs go on)")
        uvicorn.Server(config).run(sockets=[listener])


def places(slots: int | None) -> list[dict[str, str]]:
    """List the environments of the places where jobs train: one for each GPU, else for each slot of the CPU."""
    # In a process of its own: torch would stay in this one, with all its memory.
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    count = int(subprocess.run(ask, capture_output=True, text=True, check=False).stdout.strip() or 0)  # noqa: S603
    if count and slots is None:
        return [{"CUDA_VISIBLE_DEVICES": str(index)} for index in range(count)]
    return [{"CUDA_VISIBLE_DEVICES": ""}] * (slots or 1)
