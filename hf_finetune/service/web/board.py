"""TensorBoard of a project's runs, below `/tensorboard/` and behind the page's login.

Each project that looks gets a process of its own, which sees links to that project's runs and nothing else, and listens
on a socket that only this user opens. It ends when nobody has asked for a while, and when the service does.
"""

from __future__ import annotations

import http.client
import importlib.util
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse
from starlette.exceptions import HTTPException

from hf_finetune.service import views, worker
from hf_finetune.service.store import Page, Store
from hf_finetune.service.web.pages import project_of

PREFIX = "/tensorboard"
IDLE = 900
"""Seconds without a request after which a process ends."""
PATIENCE = 60
"""Seconds that TensorBoard may take to start, and to answer."""
AT_ONCE = 8
"""Requests that wait for TensorBoard at the same time: they must not take the threads of the API."""
RUNS = 500
"""Newest runs of a project that are shown."""
LARGEST = 8 << 20
"""Bytes of a request to TensorBoard."""
PASSED = (
    "content-type",
    "content-encoding",
    "content-security-policy",
    "cache-control",
    "expires",
    "x-content-type-options",
)
"""Headers of an answer that are handed on."""
routes = APIRouter(include_in_schema=False)


class Board:
    """TensorBoard of one project."""

    def __init__(self, store: Store, project: str) -> None:
        self.store, self.project = store, project
        self.folder = Path(tempfile.mkdtemp(prefix="hf-finetune-board-"))  # only this user may enter it
        self.socket, self.logdir = self.folder / "socket", self.folder / "runs"
        self.logdir.mkdir()
        self.asked, self.listens = time.monotonic(), False
        self.link()
        # It ends with its standard input: also when this process is killed.
        self.process = subprocess.Popen(  # noqa: S603 - no shell
            [sys.executable, "-m", "hf_finetune.service.web.board", str(self.logdir), str(self.socket)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def link(self) -> None:
        """Link the runs of the project, by the names that people know."""
        self.jobs, _ = self.store.jobs(self.project, {}, Page(RUNS))
        for job in self.jobs:
            events = self.store.folder_of_job(job["id"]) / worker.RUN / "tensorboard"
            name = f"{job['suffix'] or job['model'].replace('/', '_')} {job['id'][-12:]}"
            with suppress(FileExistsError):
                if events.is_dir():
                    (self.logdir / name).symlink_to(events, target_is_directory=True)

    def ask(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Hand a request on; it waits while TensorBoard starts.

        Raises:
            OSError: TensorBoard does not answer.
        """
        self.asked = time.monotonic()
        connection = _Connection(str(self.socket), PATIENCE)
        try:
            connection.request(method, path, body or None, headers)
            answer = connection.getresponse()
            found = {name.lower(): value for name, value in answer.getheaders()}
            content = answer.read()
        except http.client.HTTPException as error:
            raise OSError(f"TensorBoard broke off: {error}") from error
        finally:
            connection.close()
        # Answers about runs show recipes, and TensorBoard its own folder.
        if found.get("content-type", "").startswith("application/json"):
            text = content.decode().replace(str(self.logdir), "runs")
            content = views.unplaced(text, self.store.root, self.jobs).encode()
        return answer.status, found, content

    def wait(self) -> bool:
        """Wait until it listens."""
        end = time.monotonic() + PATIENCE
        while not self.listens and self.process.poll() is None and time.monotonic() < end:
            try:
                connection = _Connection(str(self.socket), 1)
                connection.connect()
            except OSError:
                time.sleep(0.1)
            else:
                connection.close()
                self.listens = True
        return self.listens

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class _Connection(http.client.HTTPConnection):
    def __init__(self, path: str, seconds: float) -> None:
        super().__init__("localhost", timeout=seconds)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


class Boards:
    """The processes, one a project."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._lock = threading.Lock()
        self._running: dict[str, Board] = {}
        self.threads = CapacityLimiter(AT_ONCE)

    def of(self, project: str) -> Board | None:
        """Find or start that of a project; None where it does not start."""
        with self._lock:
            for name, board in list(self._running.items()):
                if board.process.poll() is not None or time.monotonic() - board.asked > IDLE:
                    self._running.pop(name).close()
            if project not in self._running:
                self._running[project] = Board(self.store, project)
            board = self._running[project]
        return board if board.wait() else None

    def close(self) -> None:
        """End them all."""
        with self._lock:
            while self._running:
                self._running.popitem()[1].close()


@routes.get(PREFIX)
def slash(request: Request) -> Response:
    """Lead to the page."""
    return RedirectResponse(f"{PREFIX}/", 308)


@routes.api_route(PREFIX + "/{path:path}", methods=["GET", "POST"])
async def board(request: Request, path: str) -> Response:
    """Hand a request on to the TensorBoard of the caller's project."""
    project = await run_in_threadpool(project_of, request)
    if project is None:
        return RedirectResponse("/login", 303)
    # TensorBoard knows no CSRF token, and changes nothing; other sites have no business here all the same.
    if request.method == "POST" and request.headers.get("sec-fetch-site", "same-origin") != "same-origin":
        raise HTTPException(403, "another site may not ask TensorBoard")
    if importlib.util.find_spec("tensorboard") is None:
        raise HTTPException(501, "TensorBoard is not installed with this service; pip install tensorboard")
    body = await request.body()
    if len(body) > LARGEST:
        raise HTTPException(413, "the request is too large")
    kept = {"content-type": request.headers.get("content-type", ""), "accept-encoding": "identity"}
    target = request.scope["raw_path"].decode("ascii") + (f"?{request.url.query}" if request.url.query else "")

    def asked() -> tuple[int, dict[str, str], bytes]:
        found = request.app.state.boards.of(project)
        if found is None:
            raise OSError("TensorBoard did not start")
        if not path:
            found.link()  # runs that began since
        status, headers, content = found.ask(request.method, target, body, kept)
        return status, headers, content

    try:
        status, headers, content = await to_thread.run_sync(asked, limiter=request.app.state.boards.threads)
    except OSError as error:
        raise HTTPException(502, str(error)) from None
    answer = Response(content, status, {name: headers[name] for name in PASSED if name in headers})
    answer.headers["referrer-policy"] = "no-referrer"
    return answer


def main(logdir: str, place: str) -> None:
    """Run TensorBoard on a socket of this machine until standard input ends."""
    from tensorboard import default, program
    from werkzeug.serving import make_server

    class Server(program.TensorBoardServer):  # type: ignore[misc]
        def __init__(self, app: Callable[..., Any], flags: Any) -> None:
            self.server = make_server(f"unix://{place}", 0, app, threaded=True)

        def serve_forever(self) -> None:
            self.server.serve_forever()

        def get_url(self) -> str:
            return f"unix://{place}"

        def print_serving_message(self) -> None:
            pass

    def ends() -> None:
        sys.stdin.buffer.read()
        import os

        os._exit(0)

    threading.Thread(target=ends, daemon=True).start()
    board = program.TensorBoard(default.get_plugins(), server_class=Server)
    board._register_info = lambda server: None  # it notes a port, and the socket has none
    options = [
        "--path_prefix",
        PREFIX,
        "--load_fast",
        "false",
        "--reload_interval",
        "5",
        "--window_title",
        "hf_finetune",
    ]
    board.configure(("tensorboard", "--logdir", logdir, *options))
    board.main()


if __name__ == "__main__":
    main(*sys.argv[1:])
