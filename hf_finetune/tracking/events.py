"""tensorboardX's `SummaryWriter`, with events written by a thread that can neither stop nor slow training."""

from __future__ import annotations

import queue
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.record_writer import RecordWriter, open_file

from hf_finetune.log import warn
from hf_finetune.tracking.logdir import LogDir

FLUSH_SECONDS = 2.0
# An object store gets the whole file at each flush.
REMOTE_FLUSH_SECONDS = 60.0
# Events that may wait for the disk; of more, the newest are lost.
QUEUE = 10_000
# Seconds that the end of a run waits for the last events.
CLOSE_SECONDS = 20.0
# Begins the tags of all that a board does not open on. TensorBoard sorts groups by name and opens the first two, so
# these have to sort after `eval` and `train`.
ZOOM = "zoom_"
# What Time Series shows.
CARDS = frozenset({"simple_value", "image", "histo"})


def place(tag: str, top: Collection[str] | None) -> str:
    """Say under which tag something is shown: as it is, if TensorBoard shall open on it, or zoomed in."""
    return tag if top is None or tag in top else f"{ZOOM}{tag}"


class EventWriter(SummaryWriter):  # type: ignore[misc]
    """Takes summaries by the methods of `SummaryWriter`, and whole files that belong to them.

    tensorboardX's own file writer is not used: if its thread dies, e.g. of a full disk, every later `add_*` waits for
    ever, and so do `close` and the end of the process (2.6.5; the same in tensorboard:
    https://github.com/tensorflow/tensorboard/issues/6167), and the name of the host is part of its files' names.

    Args:
        logdir: Where events go; nothing is created there before the first event.
        complain: Takes the one warning that events are lost.
    """

    def __init__(self, logdir: LogDir, complain: Callable[[str], None] = warn) -> None:
        self.place = logdir
        self.wait = 0.0
        """Seconds to wait for a slow disk before an event is lost; 0 while training."""
        self.lost = self.written = 0
        self.top: frozenset[str] | None = None
        """Tags that TensorBoard opens on; those of other numbers, images and histograms begin with `ZOOM`."""
        self.embeddings: dict[str, None] = {}
        """Names of the projector's tensors so far, in order."""
        self._complain: Callable[[str], None] | None = complain
        self._step, self._time = 0, 0.0
        self._is_closed = self._has_finished = False
        self._queue: queue.Queue[bytes | tuple[str, bytes] | None] = queue.Queue(QUEUE)
        # A daemon, started by the first event: a disk that hangs must not keep the process from ending, and a run that
        # fails before it trains leaves no event file.
        self._thread = threading.Thread(target=self._work, daemon=True, name="tensorboard")
        super().__init__(logdir=logdir.folder)

    def _get_file_writer(self) -> EventWriter:
        # tensorboardX asks here for the object that takes its summaries.
        return self

    @contextmanager
    def at(self, step: int, seconds: float) -> Iterator[None]:
        """Show what is added inside at this step and time (Unix seconds)."""
        self._step, self._time = step, seconds
        yield

    def add_summary(self, summary: Summary, global_step: int | None = None, walltime: float | None = None) -> None:
        """Take what tensorboardX made; waits for nothing."""
        # As bytes: what the queue holds can't change any more, and the thread only writes.
        step, seconds = self._step if global_step is None else global_step, walltime or self._time
        for value in summary.value:
            if value.WhichOneof("value") in CARDS:
                value.tag = place(value.tag, self.top)
        self._put(Event(wall_time=seconds, step=step, summary=summary).SerializeToString())

    def add_scalars_of_line(self, values: dict[str, float]) -> None:
        """Show numbers by tag in one event.

        `add_scalar` replaces characters of tags, and so may give two labels one tag.
        """
        made = [Summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self.add_summary(Summary(value=made))

    def add_png(self, tag: str, content: bytes) -> None:
        """Show a PNG as it is; `add_image` would decode, scale and encode it."""
        width, height = struct.unpack(">II", content[16:24])  # the first chunk of every PNG, IHDR
        image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=content)
        self.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]))

    def add_file(self, name: str, content: bytes) -> None:
        """Write a file beside the events; an earlier one of this name, a path inside the folder, is replaced."""
        self._put((name, content))

    def flush(self) -> None:
        """Do nothing: the thread flushes every few seconds."""

    def close(self) -> None:
        """Write the events that wait, if that takes a moment only; later calls do nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._thread.is_alive():
            # Neither a full queue nor a slow disk may hold up the end of a run for long.
            with suppress(queue.Full):
                self._queue.put(None, timeout=1.0)
            self._thread.join(CLOSE_SECONDS)
        if self._thread.is_alive():
            self._warn("does not answer", "the last events are lost")
        elif self._thread.ident is not None and not self._has_finished:
            self._warn("is no longer written, its thread has died")

    def _put(self, item: bytes | tuple[str, bytes]) -> None:
        if self._thread.ident is None:
            self._thread.start()
        if self._is_closed or not self._thread.is_alive():
            self.lost += 1
            if not self._is_closed:
                self._warn("is no longer written, its thread has died")
            return
        try:
            self._queue.put(item, block=self.wait > 0, timeout=self.wait or None)
        except queue.Full:
            self.lost += 1
            self.wait = 0.0
            self._warn("answers too slowly")

    def _warn(self, what: str, so: str = "events are lost") -> None:
        # Once: whoever notices first knows best why, which is the thread itself if the disk refuses.
        complain, self._complain = self._complain, None
        if complain is not None:
            again = "`hf-finetune tensorboard RUN --rebuild` makes them again"
            complain(f"{self.place.folder} {what}: {so}, training goes on; {again}")

    # ---- in the thread ----

    def _work(self) -> None:
        try:
            self._write_all()
            self._has_finished = True
        except (OSError, ValueError, ImportError) as error:
            self._warn(f"can't be written ({getattr(error, 'strerror', None) or error})")

    def _write_all(self) -> None:
        """Write until the end is queued, and flush every few seconds."""
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
                records = records or self._open()  # here, not in `__init__`: even opening may hang
                if isinstance(item, tuple):
                    path = f"{self.place.folder}/{item[0]}"
                    if not self.place.is_remote:
                        Path(self.place.folder).stat()  # a run folder that somebody deleted stays deleted
                        Path(path).parent.mkdir(parents=True, exist_ok=True)
                    # No `with`: tensorboardX's writers to object stores are no context managers.
                    stream = open_file(path)
                    stream.write(item[1])
                    stream.flush()
                    stream.close()
                else:
                    records.write(item)
                    self.written += 1
                    due = due or time.monotonic() + pause
            if records is not None and due and time.monotonic() >= due:
                records.flush()
                due = 0.0
        if records is not None:
            records.flush()
            records.close()

    def _open(self) -> Any:
        if not self.place.is_remote:
            Path(self.place.folder).mkdir(parents=True, exist_ok=True)
        records = RecordWriter(self.place.new_file())
        records.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        if self.place.is_remote:  # an earlier process's file stays: readers forget its events here
            start = SessionLog(status=SessionLog.START)
            records.write(Event(wall_time=time.time(), step=0, session_log=start).SerializeToString())
        return records
