"""One thread a rank: it renews the own beat, reads those of the others, and ends this process where one has failed."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType, TracebackType

from hf_finetune import patience, terminal
from hf_finetune.errors import FinetuneError, PeerError, Problem, StorageError
from hf_finetune.peers import verdict
from hf_finetune.peers.beat import Beat, Failure, State, launch, look_at
from hf_finetune.peers.process import Process, born, uptime
from hf_finetune.peers.verdict import Peer
from hf_finetune.runfolder import RANKS

BEAT_S, LOOK_S = 1.0, 0.25
FEW = 50
"""Ranks up to which beats come every second. More of them beat and read less often, so that all together never cost the
shared folder more: 50 small writes and some 450 reads a second."""
ALL = 9
"""Other ranks up to which a rank watches all of them."""
IDLE_S = 2.0
"""After this long without progress, a rank says where it is."""
MISSED_BEATS = 2.5
"""So many make a rank of another node suspect, when a collective fails."""
PATIENCE_S = 3.0
"""How long the reason of a failed collective is looked for."""
CALLBACK_S, EXIT_S = 10.0, 5.0
"""How long the callback may take, and the end of a rank that has failed."""


class Watch:
    """The other ranks, watched from start to end of a run; for a run of one process it does nothing.

        with Watch(folder, rank, world_size, on_failure) as watch:
            watch.progress(step, "training")

    Where another rank dies, fails or hangs, one rank of each node says so on stderr, every rank calls `on_failure`, and
    this process ends at once (`os._exit`) with the failure's exit code: its main thread sits in a collective that can't
    be interrupted. An error that leaves the block is told to the others, who end with it; one that torch raised because
    a peer has gone ends this process in the same way.

    Of many ranks, each watches those that are 1, 2, 4, 8, ... after it, and looks at the processes of its own machine:
    every rank is watched by several others, and as whoever ends says why, all know it after a few readings.

    Args:
        folder: The run folder; it exists.
        rank: Of this process.
        world_size: How many there are.
        on_failure: Called once before the process ends, from another thread, for ten seconds at most.
        timeout: Seconds of silence after which a rank is given up; None reads the environment, else 600. A rank whose
            main thread hangs while its threads live is given up after the same time, while this one waits for it in a
            collective that was called from Python; what waits on a GPU, the collective's own time limit ends.

    Raises:
        RecipeError: The environment's value is no positive number.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        world_size: int,
        on_failure: Callable[[Failure], None],
        timeout: float | None = None,
    ) -> None:
        self.folder, self.rank, self.world_size = folder / RANKS, rank, world_size
        self.timeout = patience.peer() if timeout is None else timeout
        self._on_failure = on_failure
        self._mark = (0, "starting", patience.wait().total_seconds())
        self._seen = self._mark
        self._peers: dict[int, Peer] = {}
        self._ring, self._near = _watched(rank, world_size)
        self._pace = max(1.0, world_size / FEW)
        self._beat_every = min(BEAT_S * self._pace, self.timeout / 4)
        self._round = min(max(LOOK_S, world_size / FEW), self.timeout / 4)
        """Seconds in which each rank that is watched is read once."""
        self._lost = min(max(verdict.LOST_S, MISSED_BEATS * (self._beat_every + self._round)), self.timeout / 2)
        """Seconds of silence that make a rank suspect, when a collective fails."""
        self._due, self._turn = 0.0, 0
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._is_over = world_size == 1
        speaks = os.environ.get("LOCAL_RANK", str(rank)) == "0"
        self._beat = Beat(launch(), rank, Process.own(), count=0, written=uptime(), speaks=speaks)
        self._born = born()

    def progress(self, step: int, phase: str, *, is_long: bool = False) -> None:
        """Say that the main thread has come on; costs nothing. The others learn it within a second.

        Args:
            step: Last finished optimiser step. Steps are in common: each of them has a collective.
            phase: What goes on now, to follow "while": `training`, `evaluating`, `saving`.
            is_long: Whether it may take hours on this rank while the others wait (`patience.wait`). They give it up
                before only if its process ends or falls silent.
        """
        self._mark = (step, phase, patience.wait().total_seconds() if is_long else 0.0)

    def start(self) -> None:
        """Show the own beat and begin to watch.

        Raises:
            StorageError: The run folder can't be written.
        """
        if self._is_over:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for file in self.folder.glob(f".{self.rank}.json.*"):  # whoever was killed while it wrote left one
                file.unlink(missing_ok=True)
            for file in self.folder.glob("[0-9]*.json") if self.rank == 0 else ():
                if int(file.stem) >= self.world_size:
                    file.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(Problem(f"{self.folder} can't be written: {error.strerror}", key="output")) from error
        self._show()
        threading.Thread(target=self._run, daemon=True, name="peers").start()

    def leave(self, error: BaseException | None = None) -> None:
        """Tell the others that this rank ends, and how; nobody is watched any more.

        Does not return where another rank has failed and this process ends because of it, or where the error is what
        torch raises when a peer has gone. Later calls do nothing.

        Args:
            error: What it ends with; None for a normal end.
        """
        if os.getpid() != self._beat.process.pid:
            return
        # The thread holds the lock while it ends this process: whoever comes here meanwhile waits for that.
        with _signals_later(matter=error is None), self._lock:
            if self._is_over:
                return
            if error is not None and (failure := self._cause(error)) is not None:
                self._end(failure)
            self._say_goodbye(*verdict.farewell(self.rank, error))

    def error_of(self, error: BaseException) -> PeerError | None:
        """The peer's failure behind an error in the main thread, with its exit code; None where none is behind it.

        Looks around for some seconds if torch says that a peer has gone.
        """
        with self._lock:
            failure = None if self._is_over else self._cause(error)
        if failure is None:
            return None
        found = PeerError(Problem(line) for line in failure.reason.splitlines())
        found.exit_code = failure.exit_code
        return found

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave(error)

    # ---- the thread ----

    def _run(self) -> None:
        look_every = min(LOOK_S, self._beat_every)
        before = last_beat = time.monotonic()
        while not self._stop.wait(look_every):
            now = time.monotonic()
            # This process may have been stopped or starved itself: that time proves nothing about others.
            passed, before = min(now - before, 4 * look_every), now
            with self._lock:
                if self._is_over:
                    return
                is_news = self._note_progress(passed)
                is_shown = True
                if (is_news and self._pace == 1) or now - last_beat >= self._beat_every:
                    is_shown, last_beat = self._show(), now
                self._look(passed if is_shown else 0.0)
                failure = self._sure(patient=True)
                if failure is not None:
                    self._end(failure)

    def _note_progress(self, passed: float) -> bool:
        """Bring the own beat up to date; whether a new phase has begun, which is worth a beat at once."""
        mark, before = self._mark, self._seen
        idle, self._seen = self._beat.idle + passed if mark is before else 0.0, mark
        waits, place = look_at(threading.main_thread().ident or 0) if idle >= IDLE_S else (False, "")
        self._beat = replace(
            self._beat, step=mark[0], phase=mark[1], allowed=mark[2], idle=idle, waits=waits, place=place
        )
        return mark[1] != before[1]

    def _show(self) -> bool:
        """Renew the own file; False where that fails: those of the others can't be expected to change either."""
        self._beat = replace(self._beat, count=self._beat.count + 1, written=uptime())
        return self._beat.write(self._file(self.rank))

    def _look(self, passed: float) -> None:
        """Read the files that are due."""
        due = [*self._ring, *(rank for rank in self._near if not self._is_settled(rank))]
        self._due += len(due) * LOOK_S / self._round
        for _ in range(min(int(self._due), len(due))):
            self._read(due[self._turn % len(due)])
            self._turn += 1
        self._due -= int(self._due)
        for rank, peer in self._peers.items():
            peer.silent += passed if rank in self._ring else 0.0
            peer.left += passed if peer.beat.state != "running" else 0.0

    def _is_settled(self, rank: int) -> bool:
        """Whether a rank that should be on this machine needs no reading: its process is known, or is elsewhere."""
        peer = self._peers.get(rank)
        return peer is not None and (peer.is_known or not peer.is_here)

    def _read(self, rank: int) -> None:
        beat = Beat.read(self._file(rank))
        if beat is None and not self._file(rank).exists():
            self._peers.pop(rank, None)  # it could not say goodbye on a disk that is full, or somebody deleted it
        if beat is None or beat.launch != self._beat.launch:
            return
        peer = self._peers.get(rank)
        if peer is None or peer.beat.process != beat.process:
            is_here = beat.process.machine == self._beat.process.machine
            self._peers[rank] = Peer(beat, is_here, is_known=is_here and beat.written >= self._born)
        elif peer.beat.count != beat.count:
            peer.beat, peer.silent, peer.is_known = beat, 0.0, True

    def _file(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"

    # ---- the verdict; all of it under the lock ----

    def _known(self) -> dict[int, Peer]:
        known = {rank: peer for rank, peer in self._peers.items() if peer.is_known}
        least = self._mark[0] - 1  # a step ends for no rank before all have taken part in it; a beat may be older
        for peer in known.values():
            if peer.beat.state == "running" and peer.beat.step < least:
                peer.beat = replace(peer.beat, step=least)
        return known

    def _sure(self, *, patient: bool) -> Failure | None:
        if next(verdict.sure(self._known(), self._beat, self.timeout, patient=patient), None) is None:
            return None
        for rank in self._peers:
            self._read(rank)  # whoever is gone may have said goodbye after the last look
        return next(verdict.sure(self._known(), self._beat, self.timeout, patient=patient), None)

    def _cause(self, error: BaseException) -> Failure | None:
        """Who is behind an error of the main thread, if it may be a consequence."""
        is_lost, is_own = verdict.is_of_a_peer(error), isinstance(error, FinetuneError)
        if not is_lost and (is_own or not isinstance(error, RuntimeError | SystemExit)):
            return None
        # Connections close some time before the kernel shows a process as gone; a signal came from outside. Of many
        # ranks, a few know first, and the others hear it from them.
        pause, waited = LOOK_S * self._pace, 0.0
        least = LOOK_S if isinstance(error, SystemExit) else PATIENCE_S * self._pace
        while waited < least or (is_lost and self._is_anybody_late()):
            if waited:
                time.sleep(pause)
                self._show()  # whoever looks for the cause is alive; the thread waits for the lock
            waited += pause
            for rank in (*self._ring, *self._near):
                self._read(rank)
            failure = self._sure(patient=False)
            if failure is not None:
                return failure
            for rank in self._ring.keys() & self._peers.keys():
                self._peers[rank].silent += pause
        known = self._known()
        rest = None if is_own or not is_lost else verdict.unexplained(self._beat, known, error)
        return next(verdict.likely(known, self._beat, self.timeout, self._lost), rest) if is_lost else None

    def _is_anybody_late(self) -> bool:
        """Whether a rank of another node misses beats, but not yet for so long that it is to blame.

        Its process can't be looked at; a lost connection does not tell whose end is at fault.
        """
        far = [peer for peer in self._known().values() if not peer.is_here and peer.beat.state == "running"]
        missed = MISSED_BEATS * BEAT_S * self._pace
        return any(missed <= peer.silent < self._lost for peer in far)

    def _end(self, failure: Failure) -> None:
        """Say it, and end this process."""
        try:
            speaks = not self._is_said_by_another(failure)
            self._say_goodbye("failed", failure, has_said=speaks)
            if speaks:
                _say(failure)
            callback = threading.Thread(target=self._call_back, args=(failure,), daemon=True)
            callback.start()
            callback.join(CALLBACK_S)
            # A launcher ends all ranks when it sees one end: the culprit shall have told its own story before.
            culprit, until = self._peers.get(failure.rank), time.monotonic() + EXIT_S
            while culprit and culprit.beat.failure and not culprit.is_gone() and time.monotonic() < until:
                time.sleep(LOOK_S / 10)
        finally:
            os._exit(failure.exit_code)

    def _is_said_by_another(self, failure: Failure) -> bool:
        """Whether the rank itself or another one of this machine prints it."""
        here = {rank: peer for rank, peer in self._known().items() if peer.is_here}
        culprit = here.pop(failure.rank, None)
        if culprit and culprit.beat.state == "failed" and culprit.beat.speaks:
            return True
        running = {rank: peer for rank, peer in here.items() if peer.beat.state == "running"}
        alive = [rank for rank, peer in running.items() if peer.silent < self._lost and not peer.is_gone()]
        return any(peer.beat.has_said for peer in here.values()) or any(rank < self.rank for rank in alive)

    def _call_back(self, failure: Failure) -> None:
        self._on_failure(failure)
        with suppress(OSError, ValueError):
            sys.stdout.flush()

    def _say_goodbye(self, state: State, failure: Failure | None, *, has_said: bool = False) -> None:
        self._is_over = True
        self._stop.set()
        step, phase, _ = self._mark
        self._beat = replace(self._beat, step=step, phase=phase, state=state, failure=failure, has_said=has_said)
        if not self._show():
            with suppress(OSError):
                self._file(self.rank).unlink()


def _watched(rank: int, world_size: int) -> tuple[dict[int, None], dict[int, None]]:
    """The ranks whose files a rank reads again and again, and those of its machine that it must know besides."""
    others = [(rank + distance) % world_size for distance in range(1, world_size)]
    if len(others) <= ALL:
        return dict.fromkeys(others), {}
    ring = dict.fromkeys(others[2**power - 1] for power in range((world_size - 1).bit_length()))
    place, size = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    near = range(max(0, rank - place), min(world_size, rank - place + size))
    return ring, dict.fromkeys(other for other in near if other != rank and other not in ring)


def _say(failure: Failure) -> None:
    """One line of stderr for each of its problems; without Python's buffers, which a hung thread may hold."""
    terminal.last_words(failure.reason.splitlines(), failure.exit_code)


@contextmanager
def _signals_later(*, matter: bool) -> Iterator[None]:
    """Keep signals that a launcher sends from interrupting; if they matter, they arrive afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        for received in came if matter else ():
            signal.raise_signal(received)
