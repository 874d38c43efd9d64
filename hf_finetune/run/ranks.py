"""The processes of a run acting as one: all succeed, or all raise. Also which of them looks after which disk."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from hf_finetune.errors import FinetuneError, PeerError, Problem, StorageError
from hf_finetune.run import files

T = TypeVar("T")
# Beginning of the names of files by which ranks find out who shares a disk.
MARK = ".mark-"


class Ranks:
    """The only process of a run. Every method is called by all ranks, in the same order."""

    rank = 0
    local_rank = 0
    world_size = 1

    def barrier(self) -> None:
        """Wait until all ranks are here."""

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank, on every rank; they are pickled on their way."""
        return [value]


class Group(Ranks):
    """The processes of torch's default process group, with a gloo group of their own for messages.

    Every rank makes one at the same time. It works beside NCCL and takes no memory of a GPU.

    Args:
        local_rank: Of this process on its node.
        timeout: How long a rank waits for the others. It must be longer than the slowest rank writes, or the first
            rank hashes and syncs, one checkpoint: hours, for the largest models. Who dies is noticed by `peers`.
    """

    def __init__(self, local_rank: int, timeout: timedelta) -> None:
        from torch import distributed

        self.rank = distributed.get_rank()
        self.local_rank = local_rank
        self.world_size = distributed.get_world_size()
        self._timeout = timeout
        self._group = distributed.new_group(backend="gloo", timeout=timeout)

    def barrier(self) -> None:
        """Wait until all are here.

        Raises:
            PeerError: A rank died, or did not come in time; rank 0 can name it, mostly.
        """
        from torch import distributed

        with self._peers_answer():
            distributed.monitored_barrier(self._group, timeout=self._timeout, wait_all_ranks=True)

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank, on every rank.

        Raises:
            PeerError: See `barrier`.
        """
        from torch import distributed

        self.barrier()  # names the rank that is missing, which all_gather_object can't
        values: list[T] = [value] * self.world_size
        with self._peers_answer():
            distributed.all_gather_object(values, value, group=self._group)
        return values

    @contextlib.contextmanager
    def _peers_answer(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            # gloo names ranks only where a barrier was waiting for them.
            named = re.search(r"[Rr]anks? ([\d, ]*\d) failed to pass", str(error))
            missing = "another rank"
            if named or self.world_size == 2:
                missing = f"rank {named[1] if named else 1 - self.rank}"
            seconds = f"{self._timeout.total_seconds():.0f} s"
            message = (
                f"{missing} of {self.world_size} died or did not answer within {seconds}, says rank {self.rank}; "
                "look for the first error of that rank"
            )
            raise PeerError(message) from error


def join(local_rank: int, timeout: timedelta) -> Ranks:
    """Join the ranks of torch's default process group where there is one; else this process is alone."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return Group(local_rank, timeout)
    return Ranks()


def together(ranks: Ranks, action: Callable[[], T]) -> list[T]:
    """Do something on every rank; either it works on all of them, or all of them raise.

    Args:
        ranks: Who takes part; all of them call this.
        action: If it talks to other ranks itself, a failure in it may keep them waiting there until their timeout.

    Returns:
        The results by rank, on every rank.

    Raises:
        FinetuneError: Of the first rank that failed, on ranks that did not.
        PeerError: A rank failed with an error that is no `FinetuneError`; the rank itself raises that one.
    """
    try:
        result = action()
    except PeerError:
        raise  # the others can't be reached
    except BaseException as error:
        is_own, text = isinstance(error, FinetuneError), str(error)
        sentence = f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
        try:
            ranks.gather((None, error if is_own else PeerError(f"rank {ranks.rank}: {sentence}")))
        except PeerError as lost:
            # torch's errors of communication are plain RuntimeErrors: then the rank that is lost came first.
            if not is_own and re.search(r"gloo|Gloo|NCCL|by peer|[Tt]imed out", text):
                raise lost from error
        raise  # what went wrong first matters more
    outcomes: list[tuple[T | None, FinetuneError | None]] = ranks.gather((result, None))
    for _, failed in outcomes:
        if failed is not None:
            raise failed
    return [value for value, _ in outcomes]  # type: ignore[misc]  # no rank failed, so each has its result


def on_first(ranks: Ranks, action: Callable[[], T]) -> T:
    """Do something on rank 0; all ranks get its result, or raise its error as of `together`."""
    # The others must raise, too: one that waits for a rank that is gone ends in a traceback.
    results = together(ranks, lambda: action() if ranks.rank == 0 else None)
    return results[0]  # type: ignore[return-value]  # rank 0's is the action's


def writers(folder: Path, ranks: Ranks) -> tuple[int, ...]:
    """Find out which rank writes for which disk, by leaving files; every rank calls this.

    Output folders may be shared by all nodes, by some, or by none.

    Args:
        folder: Made where it is missing.
        ranks: All ranks.

    Returns:
        By rank, the writer for its disk: of the nodes' first ranks, the lowest whose file is seen there.

    Raises:
        StorageError: The folder can't be made or written, or ranks of one node see different folders.
    """
    met = ranks.gather((ranks.local_rank, secrets.token_hex(8)))
    firsts = [rank for rank, (local_rank, _) in enumerate(met) if local_rank == 0]
    marks = [folder / f"{MARK}{met[0][1]}-{rank}" for rank in range(ranks.world_size)]

    def leave() -> None:
        if ranks.local_rank == 0:
            with files.reported(folder, 0):
                folder.mkdir(parents=True, exist_ok=True)
                marks[ranks.rank].touch()

    def look() -> int:
        # Each name is looked up by itself: listings of network file systems may be old.
        with files.reported(folder, 0):
            seen = [rank for rank in firsts if marks[rank].exists()]
        if not seen:
            raise StorageError(Problem(f"{folder} is not what the first rank of this node sees there", key="output"))
        return seen[0]

    together(ranks, leave)
    found = tuple(together(ranks, look))
    if ranks.local_rank == 0:
        marks[ranks.rank].unlink(missing_ok=True)
    return found
