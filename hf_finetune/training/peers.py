"""Ranks that watch each other, so that one that dies, fails or hangs is named and the others end instead of waiting.

Each rank has a thread that renews a small file, `<run folder>/.ranks/<launch>/<rank>.json`, and reads those of the
next rank and of the next one of its node: in such a ring, some rank that lives always watches one that does not. A
failure is written into `failure.json` beside them, where all ranks look. On nodes without a common file system, a rank
sees only its own node; the time limit of the collectives shows what happens on the others.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from hf_finetune import device, log
from hf_finetune.errors import FinetuneError, PeerError, Problem, StorageError
from hf_finetune.run.folder import RANKS
from hf_finetune.run.invocation import same_command

HEARTBEAT_S = 1.0
# Ranks up to which each writes and reads once a second; more of them do so less often, to spare the shared folder.
FEW = 50
# Silence or idleness that makes a rank suspect once a collective has failed.
LOST_S = 10.0
LOOK_S = 0.25
# Time for a rank to find the error itself that another found, before it ends because of that one.
ERROR_GRACE_S = 1.0
# Time for a rank to go on after another was stopped by a signal.
STOP_GRACE_S = 30.0
CALLBACK_S, EXIT_S = 10.0, 5.0
FAILURE = "failure.json"
# Exit code after Ctrl-C.
INTERRUPTED = 130

# What gloo and NCCL say, as RuntimeError, when the other end has gone or does not answer.
_GONE = re.compile(
    r"Connection (closed|reset|refused)|[Tt]imed out waiting|Broken pipe|[Rr]ead timeout|[Ss]ocket (closed|timeout)"
    r"|pair closure|failed to pass monitoredBarrier|connectFullMesh|wait timeout|Watchdog caught|NCCL communicator"
)
_COLLECTIVES = os.path.join("torch", "distributed", "distributed_c10d.py")  # noqa: PTH118  # compared with text
# DDP waits for the buffers of rank 0 in the first, and for gradients of the others in the second; a rank in the second
# may also compute its own, but it can't be told apart from those that wait for it.
_WAITING = ("_distributed_broadcast_coalesced", "_engine_run_backward")


@dataclass(frozen=True)
class Failure:
    """The reason to end: what happened to a rank."""

    rank: int
    reason: str
    """Names the rank; one line for each problem of its error."""
    exit_code: int
    """10 where the rank died or hangs; else that of its own error, or 128 + signal."""
    is_own: bool = False
    """An error that the rank reported itself."""
    is_stop: bool = False
    """The rank was stopped by a signal."""
    printed_on: str = ""
    """Machine on which it was printed already."""


@dataclass(frozen=True)
class Heartbeat:
    """The contents of a rank's file."""

    rank: int
    host: str
    machine: str
    """Boot and process namespace: where this is equal, process numbers mean the same."""
    pid: int
    started: str
    """As the kernel counts: process numbers are used again."""
    count: int = 0
    step: int = 0
    phase: str = "starting"
    idle: float = 0.0
    """Seconds without progress of the main thread."""
    allowed: float = 0.0
    """Seconds that the present phase may take without progress, where that is more than the usual limit."""
    waits: bool = False
    """The main thread is idle inside a collective or a backward pass."""
    place: str = ""
    """The place of an idle main thread: `file.py:line (function)`."""

    def is_gone(self) -> bool:
        """Look at the process; only on its machine."""
        state, started = _process(self.pid)
        return bool(self.started) and (state in ("", "Z", "X") or started != self.started)

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"

    @property
    def when(self) -> str:
        """The point of the run that the rank has reached."""
        return f"after step {self.step}, while {self.phase}"


class Watch:
    """The other ranks, watched from start to end of a run; for a run of one process it does nothing.

        with Watch(folder, launch, rank, world_size, on_failure=...) as watch:
            watch.progress(step, "training")

    Where another rank dies, fails or hangs, one rank of each node says so on stderr, every rank calls `on_failure`, and
    this process ends at once (`os._exit`) with the failure's exit code: its main thread sits in a collective that can't
    be interrupted. An error that leaves the block is reported to the others, who end with it.

    Args:
        folder: The run folder; it exists.
        launch: A name of this launch alone, the same on every rank: what earlier ones left in the folder counts for
            nothing.
        rank: Of this process.
        world_size: Number of ranks.
        on_failure: Called once before the process ends, from another thread, for ten seconds at most.
        timeout: Seconds of silence after which a rank is given up; None reads the environment. A rank whose main thread
            hangs is given up after the same time, while this one waits for it in a collective that was called from
            Python; the collective's own time limit ends what waits on a GPU.

    Raises:
        RecipeError: The environment's value is no positive number.
    """

    def __init__(
        self,
        folder: Path,
        launch: str,
        rank: int,
        world_size: int,
        *,
        on_failure: Callable[[Failure], None],
        timeout: float | None = None,
    ) -> None:
        self.folder, self.rank, self.world_size = folder / RANKS / launch, rank, world_size
        self.timeout = device.peer_timeout() if timeout is None else timeout
        self.every = min(max(HEARTBEAT_S, world_size / FEW), self.timeout / 4)
        self._on_failure = on_failure
        self._mark = self._seen = (0, "starting", device.wait_timeout().total_seconds())
        self._own = Heartbeat(rank, socket.gethostname(), _machine(), os.getpid(), _process(os.getpid())[1])
        self._is_first_of_node = os.environ.get("LOCAL_RANK", str(rank)) == "0"
        self._peers: dict[int, Heartbeat] = {}
        self._silent: dict[int, float] = {}
        self._known_for = 0.0
        """Seconds since another rank's failure was first seen."""
        self._lock, self._stop = threading.Lock(), threading.Event()
        if world_size == 1:
            self._stop.set()

    def progress(self, step: int, phase: str, *, is_long: bool = False) -> None:
        """Note that the main thread has come on; costs nothing. The others learn it with the next heartbeat.

        Args:
            step: Last finished optimiser step.
            phase: What goes on now, to follow "while": `training`, `evaluating`, `saving`.
            is_long: It may take hours on this rank (`device.wait_timeout`) while the others wait; they then give it up
                only if its process ends or falls silent.
        """
        self._mark = (step, phase, device.wait_timeout().total_seconds() if is_long else 0.0)

    def __enter__(self) -> Watch:
        """Show the first heartbeat and begin to watch; all ranks do it together.

        Raises:
            StorageError: The run folder can't be written.
        """
        if self._stop.is_set():
            return self
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.parent.iterdir() if self._is_first_of_node else ():
                if old != self.folder:
                    shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(Problem(f"{self.folder} can't be written: {error.strerror}", key="output")) from error
        self._show()
        threading.Thread(target=self._run, daemon=True, name="peers").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Report how this rank ends; does not return where another one is behind the error."""
        if os.getpid() != self._own.pid:
            return  # a data loader's process, forked from this one
        # Ranks that end for a reason are not to be interrupted by the launcher's signals before they have said it.
        numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1) if error is not None else ()
        before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
        # The thread holds the lock while it ends this process, so that the main thread waits here for that.
        with self._lock:
            if not self._stop.is_set():
                if error is not None and (failure := self._cause(error)) is not None:
                    self._end(failure)
                own = _own_failure(self.rank, error)
                if own is not None:
                    self._record(replace(own, printed_on=self._own.machine if self._is_first_of_node else ""))
                self._go(keep=own is not None and own.is_own)
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _run(self) -> None:
        before = time.monotonic()
        while not self._stop.wait(self.every):
            now = time.monotonic()
            # This process may have been stopped or starved itself: that time proves nothing about the others.
            passed, before = min(now - before, 2 * self.every), now
            with self._lock:
                if self._stop.is_set():
                    return
                # Where this rank can't write, the others can't either, and their files will not change.
                passed = passed if self._show(passed) else 0.0
                is_waiting = self._own.waits and self._own.idle >= self.timeout
                failure = self._recorded(passed) or self._look(passed, self.timeout, is_waiting=is_waiting)
                if failure is not None:
                    self._end(failure)

    def _show(self, passed: float = 0.0) -> bool:
        """Renew the own file; False where that fails."""
        mark, own = self._mark, self._own
        idle = own.idle + passed if mark is self._seen else 0.0
        self._seen, (step, phase, allowed) = mark, mark
        waits, place = False, ""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        if idle >= 2 * HEARTBEAT_S and frame is not None:
            code = frame.f_code
            waits = code.co_filename.endswith(_COLLECTIVES) or code.co_name in _WAITING
            place = f"{Path(code.co_filename).name}:{frame.f_lineno} ({code.co_name})"
        own = replace(own, count=own.count + 1, step=step, phase=phase, allowed=allowed, idle=idle)
        self._own = replace(own, waits=waits, place=place)
        file = self._file(self.rank)
        try:
            # In place: a full disk has no room for another file.
            with file.open("r+" if file.exists() else "w", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(self._own)))
                stream.truncate()
        except OSError:
            return False
        return True

    def _file(self, rank: int) -> Path:
        return self.folder / f"{rank}.json"

    def _recorded(self, passed: float) -> Failure | None:
        """Return a failure that another rank has recorded, once this one had time to find out by itself."""
        found: Failure | None = _read(self.folder / FAILURE, Failure)
        if found is None:
            return None
        self._known_for += passed
        if found.is_stop:
            # An agreed stop ends all ranks, one after the other; one that waits in vain was left behind.
            return found if self._own.waits and min(self._known_for, self._own.idle) >= STOP_GRACE_S else None
        return found if not found.is_own or self._known_for >= ERROR_GRACE_S else None

    def _look(self, passed: float, timeout: float, *, is_waiting: bool) -> Failure | None:
        """Look at the next rank, and at the next one of this node, which has the same disk.

        Args:
            passed: Seconds since the last look.
            timeout: Seconds of silence or idleness after which a rank is given up.
            is_waiting: This rank waits for the others, so that one which is idle elsewhere is to blame.
        """
        place, size = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        near = self.rank - place + (place + 1) % (size or 1)
        for rank in {(self.rank + 1) % self.world_size, near} - {self.rank}:
            heartbeat, known = _read(self._file(rank), Heartbeat), self._peers.get(rank)
            if heartbeat is None and not self._file(rank).exists():
                self._peers.pop(rank, None)  # it has not begun, or has left
                continue
            if heartbeat is not None and (known is None or heartbeat.count != known.count):
                self._peers[rank], self._silent[rank] = heartbeat, 0.0
            elif known is not None:  # nothing new, or a file that is being written
                self._silent[rank] += passed
            if rank in self._peers and (reason := self._judge(self._peers[rank], timeout, is_waiting=is_waiting)):
                return Failure(rank, f"{reason}; resume with {same_command()}", PeerError.exit_code)
        return None

    def _judge(self, peer: Heartbeat, timeout: float, *, is_waiting: bool) -> str | None:
        is_here, silent = peer.machine == self._own.machine, self._silent[peer.rank]
        if is_here and peer.is_gone():
            # A rank that leaves takes its file away before it ends, and one that fails says why before.
            has_left = not self._file(peer.rank).exists() or (self.folder / FAILURE).exists()
            return None if has_left else f"{peer} died {peer.when}"
        if silent >= timeout:
            how = " (it is stopped by a signal)" if is_here and _process(peer.pid)[0] in ("T", "t") else ""
            return f"{peer} has not answered for {silent:.0f} s{how}, last {peer.when}; {self._steps()}"
        if is_waiting and not peer.waits and peer.idle >= max(timeout, peer.allowed):
            where = f", at {peer.place}" if peer.place else ""
            return f"{peer} has made no progress for {peer.idle:.0f} s {peer.when}{where}; {self._steps()}"
        return None

    def _cause(self, error: BaseException) -> Failure | None:
        """Return the failure of another rank that is behind an error of the main thread, if any."""
        is_lost, is_signal = is_of_a_peer(error), isinstance(error, SystemExit)
        if not (is_lost or is_signal or (isinstance(error, RuntimeError) and not isinstance(error, FinetuneError))):
            return None
        lost = min(max(LOST_S, 3 * self.every), self.timeout / 2)
        pause = min(LOOK_S * max(1.0, self.every), self.every)
        # A launcher sends SIGTERM to all ranks when one has died; connections close some time before the kernel shows a
        # process as gone, and a node that lost its power is known by its silence alone.
        longest, waited = pause if is_signal else lost + self.every if is_lost else 3 * self.every, 0.0
        while True:
            found = _read(self.folder / FAILURE, Failure)
            if found is not None and not (is_signal and found.is_stop):
                return found  # type: ignore[no-any-return]
            if failure := self._look(pause, lost if is_lost else self.timeout, is_waiting=is_lost):
                return failure
            if waited >= longest:
                break
            time.sleep(pause)
            waited += pause
            self._show()  # the thread waits for the lock
        if not is_lost:
            return None
        text = f"rank {self.rank} lost the others {self._own.when}: {_first_line(error)}"
        if any(peer.machine != self._own.machine for peer in self._peers.values()):
            text += "; all of them are alive, so look at the network between the nodes"
        return Failure(self.rank, f"{text}; {self._steps()}; resume with {same_command()}", PeerError.exit_code)

    def _steps(self) -> str:
        """Return the last step of each rank, ranks of the same step together."""
        reached: dict[int, list[int]] = defaultdict(list)
        for file in self.folder.glob("[0-9]*.json"):
            if (heartbeat := _read(file, Heartbeat)) is not None:
                reached[heartbeat.step].append(heartbeat.rank)
        steps = (f"{step} (rank {', '.join(map(str, sorted(ranks)))})" for step, ranks in sorted(reached.items()))
        return f"last step of each: {', '.join(steps)}"

    def _end(self, failure: Failure) -> None:
        """Say it, and end this process."""

        def report() -> None:
            self._on_failure(failure)
            with suppress(OSError, ValueError):
                sys.stdout.flush()  # which `os._exit` leaves out, and a thread that hangs may hold up

        try:
            is_new = self._record(replace(failure, printed_on=failure.printed_on or self._own.machine))
            if is_new or (self._is_first_of_node and failure.printed_on != self._own.machine):
                log.last_words(failure.reason.splitlines(), failure.exit_code)
            callback = threading.Thread(target=report, daemon=True)
            callback.start()
            callback.join(CALLBACK_S)
            # A launcher ends all ranks when it sees one end: one that failed by itself shall have printed its error.
            culprit, until = _read(self._file(failure.rank), Heartbeat), time.monotonic() + EXIT_S
            while failure.is_own and culprit and not culprit.is_gone() and time.monotonic() < until:
                time.sleep(LOOK_S / 10)
            self._go()
        finally:
            os._exit(failure.exit_code)

    def _record(self, failure: Failure) -> bool:
        """Write the failure where all ranks look; False where another one is there already."""
        try:
            with (self.folder / FAILURE).open("x", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(failure)))
        except FileExistsError:
            return False
        except OSError:
            pass  # the others will find out by themselves
        return True

    def _go(self, *, keep: bool = False) -> None:
        """Watch no more, and tell those who watch this rank."""
        self._stop.set()
        with suppress(OSError):
            if not keep:
                self._file(self.rank).unlink()


def is_of_a_peer(error: BaseException) -> bool:
    """Recognise what torch raises where another rank has gone or does not answer: by type, or by gloo's texts."""
    if isinstance(error, PeerError) or "DistError" in {kind.__name__ for kind in type(error).__mro__}:
        return True
    return type(error) is RuntimeError and _GONE.search(str(error)) is not None


def _own_failure(rank: int, error: BaseException | None) -> Failure | None:
    """Return the failure that the others shall read; None for a normal end."""
    if isinstance(error, KeyboardInterrupt):
        return Failure(rank, f"rank {rank}: interrupted from the keyboard", INTERRUPTED, is_stop=True)
    if isinstance(error, SystemExit) and error.code:
        code = error.code if isinstance(error.code, int) else 1
        return Failure(rank, f"rank {rank}: {getattr(error, 'reason', f'ended with {code}')}", code, is_stop=True)
    if error is None or isinstance(error, SystemExit | GeneratorExit):
        return None
    if isinstance(error, FinetuneError):
        lines = "\n".join(f"rank {rank}: {problem}" for problem in error.problems)
        return Failure(rank, lines, error.exit_code, is_own=True)
    return Failure(rank, f"rank {rank}: {type(error).__name__}: {_first_line(error)}", 1, is_own=True)


def _read(file: Path, kind: type[Any]) -> Any:
    """Return the dataclass in a file; None where there is none, or not all of it yet."""
    try:
        return kind(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return socket.gethostname()


def _process(pid: int) -> tuple[str, str]:
    """Return the state and start of a process by proc(5), `stat`; empty where there is none, or no /proc."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", ""
    fields = text.rpartition(")")[2].split()  # a name may hold spaces and brackets
    return fields[0], fields[19]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
