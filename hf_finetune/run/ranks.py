"""The processes of a run, and how they act as one: all succeed, or all raise."""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Protocol, TypeVar

from hf_finetune.errors import FinetuneError, PeerError, Problem, StorageError
from hf_finetune.run import files

T = TypeVar("T")


class Ranks(Protocol):
    """One process among those of a run. Every method is called by all of them, in the same order."""

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""

    @property
    def local_rank(self) -> int:
        """Number of this process on its node, from 0."""

    @property
    def world_size(self) -> int:
        """How many processes there are."""

    def barrier(self) -> None:
        """Wait until all are here."""

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, by rank, on every rank; they are pickled on their way."""

    def all_true(self, flag: bool) -> bool:
        """Whether the flag is set on every rank."""


@dataclass(frozen=True)
class Alone:
    """The only process of a run."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1

    def barrier(self) -> None:
        """Nobody to wait for."""

    def gather(self, value: T) -> list[T]:
        """The one value."""
        return [value]

    def all_true(self, flag: bool) -> bool:
        """The one flag."""
        return flag


class Group:
    """The processes of torch's default process group, with a gloo group of their own for flags and messages.

    Every rank makes one at the same time. It works beside NCCL and takes no memory of a GPU.

    Args:
        local_rank: Of this process.
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
        """The values of all ranks, by rank, on every rank.

        Raises:
            PeerError: See `barrier`.
        """
        from torch import distributed

        self.barrier()
        values: list[T] = [value] * self.world_size
        with self._peers_answer():
            distributed.all_gather_object(values, value, group=self._group)
        return values

    def all_true(self, flag: bool) -> bool:
        """Whether the flag is set on every rank: one all-reduce of one number.

        Raises:
            PeerError: See `barrier`.
        """
        import torch
        from torch import distributed

        number = torch.tensor(int(flag))
        with self._peers_answer():
            distributed.all_reduce(number, op=distributed.ReduceOp.MIN, group=self._group)
        return bool(number.item())

    @contextlib.contextmanager
    def _peers_answer(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            message = (
                f"{self._missing(str(error))} of {self.world_size} died or did not answer within "
                f"{self._timeout.total_seconds():.0f} s, says rank {self.rank}; look for the first error of that rank"
            )
            raise PeerError(message) from error

    def _missing(self, text: str) -> str:
        """Who it is, where that is known: gloo names ranks only where a barrier was waiting for them."""
        named = re.search(r"[Rr]anks? ([\d, ]*\d) failed to pass", text)
        if named or self.world_size == 2:
            return f"rank {named[1] if named else 1 - self.rank}"
        return "another rank"


def join(local_rank: int, timeout: timedelta) -> Ranks:
    """The ranks of torch's default process group where there is one, or else this process alone."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        return Group(local_rank, timeout)
    return Alone()


def together(ranks: Ranks, action: Callable[[], T]) -> list[T]:
    """Do something on every rank; either it works on all of them, or all of them raise.

    Args:
        ranks: Who takes part; all of them call this.
        action: What each does. If it talks to other ranks itself, a failure in it may keep them waiting there until
            their timeout.

    Returns:
        The results by rank, on every rank.

    Raises:
        FinetuneError: Of the first rank that failed, on ranks that did not.
        PeerError: A rank failed with an error that is no `FinetuneError`; the rank itself raises that one.
    """
    try:
        result = action()
    except PeerError:
        raise  # the others can't be told
    except BaseException as error:
        told = error if isinstance(error, FinetuneError) else PeerError(f"rank {ranks.rank}: {_sentence(error)}")
        try:
            ranks.gather((None, told))
        except PeerError as lost:
            if _is_of_a_peer(error):
                raise lost from error
        raise  # what went wrong first matters more
    outcomes: list[tuple[T | None, FinetuneError | None]] = ranks.gather((result, None))
    for _, failed in outcomes:
        if failed is not None:
            raise failed
    return [value for value, _ in outcomes]  # type: ignore[misc]  # no rank failed, so each has its result


def _is_of_a_peer(error: BaseException) -> bool:
    """Whether torch's own communication failed: such errors are plain RuntimeErrors."""
    return not isinstance(error, FinetuneError) and bool(re.search(r"gloo|Gloo|NCCL|by peer|[Tt]imed out", str(error)))


def _sentence(error: BaseException) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# Which rank looks after which disk: output folders may be shared by all nodes, by some, or by none.

MARK = ".mark-"
"""Names of the files by which ranks find out who shares a disk."""


def leaders(folder: Path, ranks: Ranks) -> tuple[int, ...]:
    """Find out by leaving files; every rank calls this.

    Args:
        folder: Made where it is missing.
        ranks: All ranks.

    Returns:
        By rank, who looks after its disk: of the nodes' first ranks, the lowest whose file is seen there.

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
