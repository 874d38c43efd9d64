"""Event files, written by a thread of their own that can neither stop nor slow training.

tensorboardX makes the summaries, frames the records and speaks to object stores. Its writer is not used: where its
thread dies, e.g. of a full disk, whoever hands it the next event waits for ever (2.6.5; the same in tensorboard:
https://github.com/tensorflow/tensorboard/issues/6167), `close` and the end of the process wait for it too, and the name
of the host is part of every file's name.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter, open_file

from hf_finetune.tracking.board.place import Place

FLUSH_SECONDS = 2.0
REMOTE_FLUSH_SECONDS = 60.0
"""An object store gets the whole file at each flush."""
QUEUE = 10_000
"""Events that may wait for the disk; of more, the newest are lost."""
PATIENCE = 60.0
"""Seconds that whoever draws a whole run anew waits for the disk."""
CLOSE_SECONDS = 20.0
"""Seconds that the end of a run waits for the last events."""

DEAD = "is no longer written, its thread has died"

_File = tuple[str, bytes]


class Events:
    """Takes summaries, and whole files that belong to them.

    Args:
        place: Where they go.
        complain: Says once what is wrong, and stops nothing.
    """

    def __init__(self, place: Place, complain: Callable[[str], None]) -> None:
        self.place = place
        self.lost = 0
        """Events that were not written, because the disk was too slow or the writer is dead."""
        self.written = 0
        """Events that were."""
        self._complain = complain
        self._has_complained = False
        self._patience = 0.0
        self._is_closed = self._is_broken = self._has_finished = False
        self._queue: queue.Queue[bytes | _File | None] = queue.Queue(QUEUE)
        self._thread = threading.Thread(target=self._work, daemon=True, name="tensorboard")

    def add(self, summary: Summary, step: int, at: float) -> None:
        """Hand an event over, and wait for nothing.

        Args:
            summary: What tensorboardX made.
            step: Where it is shown.
            at: Unix seconds.
        """
        self._put(Event(wall_time=at, step=step, summary=summary).SerializeToString())

    def attach(self, name: str, content: bytes) -> None:
        """Hand over a file beside the events; an earlier one of this name, a path inside the folder, is replaced."""
        self._put((name, content))

    @contextmanager
    def patient(self) -> Iterator[None]:
        """While many events come at once, wait for the disk instead of losing them."""
        self._patience = PATIENCE
        try:
            yield
        finally:
            self._patience = 0.0

    def close(self) -> None:
        """Write what waits, as long as that takes a moment only; later calls do nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._thread.is_alive():
            with suppress(queue.Full):
                self._queue.put(None, timeout=1.0)
            self._thread.join(CLOSE_SECONDS)
            if self._thread.is_alive():
                self._warn("does not answer", "the last events are lost")
            elif not self._has_finished and not self._is_broken:
                self._warn(DEAD, "events are lost")

    def _put(self, item: bytes | _File) -> None:
        if self._thread.ident is None:
            self._thread.start()
        if self._is_closed or not self._thread.is_alive():
            self.lost += 1
            if not self._is_closed and not self._is_broken:  # else the thread itself has said why
                self._warn(DEAD, "events are lost")
            return
        try:
            self._queue.put(item, block=self._patience > 0, timeout=self._patience or None)
        except queue.Full:
            self.lost += 1
            self._patience = 0.0
            self._warn("answers too slowly", "events are lost")

    def _warn(self, what: str, so: str) -> None:
        if not self._has_complained:
            self._has_complained = True
            again = "`hf-finetune tensorboard RUN --rebuild` makes them again"
            self._complain(f"{self.place.folder} {what}: {so}, training goes on; {again}")

    # ---- in the thread ----

    def _work(self) -> None:
        try:
            self._write_all()
            self._has_finished = True
        except (OSError, ValueError, ImportError) as error:
            self._is_broken = True
            self._warn(f"can't be written ({getattr(error, 'strerror', None) or error})", "events are lost")

    def _write_all(self) -> None:
        """Write until the end is handed over; what waits is flushed every few seconds."""
        pause = REMOTE_FLUSH_SECONDS if self.place.is_remote else FLUSH_SECONDS
        records: RecordWriter | None = None
        due = 0.0
        while True:
            try:
                item = self._queue.get(timeout=max(0.0, due - time.monotonic()) if due else None)
            except queue.Empty:
                item = b""
            if item is None:
                break
            if item:
                records = records or self._open()
            if isinstance(item, tuple):
                self._write_file(*item)
            elif item and records is not None:
                records.write(item)
                self.written += 1
                due = due or time.monotonic() + pause
            if records is not None and due and time.monotonic() >= due:
                records.flush()
                due = 0.0
        if records is not None:
            records.flush()
            records.close()

    def _open(self) -> RecordWriter:
        if not self.place.is_remote:
            Path(self.place.folder).mkdir(parents=True, exist_ok=True)
        records = RecordWriter(self.place.file())
        records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        if self.place.is_remote:  # an earlier process's file stays: readers forget its events here
            start = SessionLog(status=SessionLog.START)
            records.write(Event(wall_time=time.time(), step=0, session_log=start).SerializeToString())
        return records

    def _write_file(self, name: str, content: bytes) -> None:
        path = f"{self.place.folder}/{name}"
        if not self.place.is_remote:
            # A run folder that somebody deleted stays deleted.
            Path(self.place.folder).stat()
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        stream = open_file(path)
        stream.write(content)
        stream.flush()
        stream.close()
