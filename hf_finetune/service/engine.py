"""A process of its own that answers: neither the API nor the queue waits for a model.

Requests that arrive together, or while a batch is computed, are answered in one batch if they are for the same run. The
process is started by the first request, and by the next one after it has died.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from hf_finetune.config import paths
from hf_finetune.service.questions import FINAL, Event, Failed, Question

TOGETHER = 0.01
"""Seconds that the first request waits for others."""
WAITING = 256
"""Requests that may wait; another one is refused."""
AFTER = 5
"""Seconds after which a refused client may ask again."""
ROWS = 256
"""Rows of the requests that share a batch."""


class Full(Exception):  # noqa: N818 - it is an answer
    """Too many requests wait."""


class Engine:
    """Asks the process.

    Args:
        memory: Bytes of weights that stay loaded; None takes a share of the machine's memory.
        most: Requests that may wait.
        url: Address of a server like vLLM that generates the tokens; None does that in the process.
    """

    def __init__(self, memory: int | None = None, most: int = WAITING, *, url: str | None = None) -> None:
        self.most = most
        self._target: Callable[..., None] = work if url is None else forward
        self._given = memory if url is None else url
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._heard: dict[int, Callable[[Event], None]] = {}
        self._process: Any = None
        self._connection: Connection | None = None

    async def ask(self, question: Question) -> AsyncIterator[Event]:
        """Ask; yields events until one of `FINAL`. Closed before its end, the answer is not written any further.

        Raises:
            Full: Too many requests wait.
        """
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def heard(event: Event) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        number = await asyncio.to_thread(self._send, question, heard)
        try:
            while True:
                event = await events.get()
                yield event
                if isinstance(event, FINAL):
                    return
        finally:
            self._forget(number)

    @property
    def waiting(self) -> int:
        """Number of requests that wait or are answered."""
        return len(self._heard)

    @property
    def pid(self) -> int | None:
        """The process, where there is one."""
        process = self._process
        return None if process is None else process.pid

    def close(self) -> None:
        """End the process."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()  # it has nothing to keep
            process.join()

    def _send(self, question: Question, heard: Callable[[Event], None]) -> int:
        with self._lock:
            if len(self._heard) >= self.most:
                raise Full
            number = next(self._numbers)
            self._heard[number] = heard
            for attempt in (1, 2):
                if self._process is None or not self._process.is_alive():
                    self._start()
                try:
                    assert self._connection is not None  # noqa: S101 - it was started
                    self._connection.send((number, question))
                    break
                except OSError:  # it died just now
                    if attempt == 2:
                        del self._heard[number]
                        raise
                    self._process = None
        return number

    def _forget(self, number: int) -> None:
        """Stop an answer that nobody waits for."""
        with self._lock:
            if self._heard.pop(number, None) is not None and self._connection is not None:
                try:
                    self._connection.send((number, None))
                except OSError:
                    return  # it died

    def _start(self) -> None:
        context = get_context("spawn")  # a fork would have this process's threads in pieces, and no CUDA
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=self._target, args=(theirs, self._given), name="engine", daemon=True)
        self._process.start()
        theirs.close()
        threading.Thread(target=self._listen, args=(self._process, self._connection), daemon=True).start()

    def _listen(self, process: Any, connection: Connection) -> None:
        """Hand on what one process says, until it is gone."""
        while True:
            try:
                number, event = connection.recv()
            except (EOFError, OSError):
                break
            with self._lock:
                heard = self._heard.get(number)
                if isinstance(event, FINAL):
                    self._heard.pop(number, None)
            _tell(heard, event)
        process.join()
        with self._lock:
            if self._connection is not connection:
                return  # what waits now was sent to a later process
            lost, self._heard, self._process, self._connection = self._heard, {}, None, None
        for heard in lost.values():
            message = "the process that answers has ended, e.g. for want of memory; ask again"
            _tell(heard, Failed(503, message, code="engine_lost"))


def _tell(heard: Callable[[Event], None] | None, event: Event) -> None:
    if heard is not None:
        try:
            heard(event)
        except RuntimeError:
            return  # the event loop of the service has ended


@dataclass(frozen=True)
class _Waiting:
    number: int
    question: Question


def work(connection: Connection, memory: int | None) -> None:
    """Be the process: answer what comes, until the service is gone.

    Args:
        connection: Takes `(number, question)`, and `(number, None)` for one that nobody waits for; gives
            `(number, event)`.
        memory: See `Engine`.
    """
    os.environ[paths.ROWS] = os.devnull  # rows of callers hold what they are about, and name no file of the host
    inbox = _Inbox(connection)
    from hf_finetune.service import models

    loaded = models.Models(memory)
    while batch := inbox.take():
        numbers = [waiting.number for waiting in batch]

        def say(place: int, event: Event, numbers: list[int] = numbers) -> None:
            connection.send((numbers[place], event))

        def is_wanted(place: int, numbers: list[int] = numbers) -> bool:
            return inbox.is_wanted(numbers[place])

        try:
            models.answer(loaded, [waiting.question for waiting in batch], say, is_wanted)
        except OSError:
            return  # the service is gone
        except Exception:  # noqa: BLE001 - a bug ends these requests, not those of others
            traceback.print_exc()
            for place in range(len(batch)):
                say(place, Failed(500, "the model failed; the operator finds the reason in the log of the service"))


def forward(connection: Connection, url: str) -> None:
    """Be the process that lets another server generate the tokens; see `work`."""
    os.environ[paths.ROWS] = os.devnull
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from hf_finetune.service import forwarding

    forwarding.serve(connection, url)


class _Inbox:
    """Questions that wait, filled by a thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._waiting = connection, deque[_Waiting]()
        self._changed = threading.Condition()
        self._taken: set[int] = set()
        self._is_closed = False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service, which then ends this
        threading.Thread(target=self._receive, daemon=True).start()

    def is_wanted(self, number: int) -> bool:
        """Tell whether anybody still waits for the answer to a question that was taken."""
        return number in self._taken and not self._is_closed

    def _receive(self) -> None:
        while True:
            try:
                number, question = self._connection.recv()
            except (EOFError, OSError):
                break
            with self._changed:
                if question is None:
                    self._taken.discard(number)
                    self._waiting = deque(one for one in self._waiting if one.number != number)
                else:
                    self._waiting.append(_Waiting(number, question))
                self._changed.notify_all()
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def take(self) -> list[_Waiting]:
        """Wait for a question; returns it with others to the same run, or nothing once the service is gone."""
        with self._changed:
            while not self._waiting and not self._is_closed:
                self._changed.wait()
                until = time.monotonic() + TOGETHER
                while (left := until - time.monotonic()) > 0 and not self._is_closed:
                    self._changed.wait(left)
            if self._is_closed:
                return []
            run, rows = self._waiting[0].question.run, 0
            batch, rest = list[_Waiting](), deque[_Waiting]()
            for one in self._waiting:
                size = len(one.question.rows) * one.question.choices
                fits = one.question.run == run and (not batch or rows + size <= ROWS)
                (batch if fits else rest).append(one)
                rows += size if fits else 0
            self._waiting, self._taken = rest, {one.number for one in batch}
            return batch
