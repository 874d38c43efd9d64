"""Answers of finished runs, by `Run.predict`: the numbers of `hf-finetune predict`, in a process of its own."""

from __future__ import annotations

import threading
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_finetune.pipeline.run import Run

KEPT = 2
"""Runs whose weights stay loaded; the one that was asked longest ago leaves."""


class Engine:
    """Asks one process, which loads what it is asked for: neither the API nor the queue waits for a model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ProcessPoolExecutor | None = None

    def predict(self, run: Path, rows: list[dict[str, Any]], most: int | None) -> list[dict[str, Any]]:
        """Predict rows, one request after the other.

        Args:
            run: The run folder.
            rows: See `Run.predict`.
            most: Tokens of a generated answer.

        Raises:
            FinetuneError: The rows or the run can't be used.
            BrokenProcessPool: The process died twice, e.g. for want of memory.
        """
        try:
            return self._started().submit(_predict, str(run), rows, most).result()
        except BrokenProcessPool:
            self.close()
            return self._started().submit(_predict, str(run), rows, most).result()

    def close(self) -> None:
        """End the process."""
        with self._lock:
            if self._pool is not None:
                self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _started(self) -> ProcessPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
            return self._pool


_loaded: dict[str, Run] = {}
"""In the process of the engine; the one that was asked last stands last."""


def _predict(run: str, rows: list[dict[str, Any]], most: int | None) -> list[dict[str, Any]]:
    from hf_finetune.pipeline.run import load_run

    opened = _loaded.pop(run, None) or load_run(run)
    _loaded[run] = opened
    while len(_loaded) > KEPT:
        del _loaded[next(iter(_loaded))]
    return opened.predict(rows, max_new_tokens=most)
