"""What the beats of the other ranks tell: who failed, died, stopped answering, or hangs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from hf_finetune.errors import FinetuneError, PeerError
from hf_finetune.invocation import same_command
from hf_finetune.peers.beat import Beat, Failure

INTERRUPTED = 130
"""Exit code after Ctrl-C."""
FAREWELL_S = 1.0
"""How long a rank may take to find the error itself that another found, before it ends because of that one."""
STOP_S = 30.0
"""How long a rank may still work after another ended by a signal."""
LOST_S = 10.0
"""Silence or idleness that makes a rank suspect when a collective fails."""

_BACKWARD = "(_engine_run_backward)"
"""Where a rank waits for gradients of the others, or computes its own."""
_GONE = re.compile(
    r"Connection (closed|reset|refused)|[Tt]imed out waiting|Broken pipe|[Rr]ead timeout|[Ss]ocket (closed|timeout)"
    r"|pair closure|failed to pass monitoredBarrier|connectFullMesh|wait timeout|Watchdog caught|NCCL communicator"
)


@dataclass
class Peer:
    """What this rank knows about another."""

    beat: Beat
    is_here: bool
    """Whether it runs on this machine, so that its process can be looked at."""
    is_known: bool
    """Whether it is of this launch for sure; what earlier ones left counts for nothing."""
    silent: float = 0.0
    """Seconds since its beat changed, by this rank's clock."""
    left: float = 0.0
    """Seconds since it said that it ends."""

    @property
    def rank(self) -> int:
        """Its number."""
        return self.beat.rank

    def is_gone(self) -> bool:
        """Whether its process has ended; False where that can't be seen."""
        return self.is_here and self.beat.process.is_gone()

    def describe(self) -> str:
        """Who it is."""
        process = self.beat.process
        return f"rank {self.rank} ({process.host}, process {process.pid})"

    def when(self) -> str:
        """Where in the run it was heard of last."""
        return f"after step {self.beat.step}, while {self.beat.phase}"

    def died(self) -> Failure:
        """It ended without a word."""
        return Failure(self.rank, f"{self.describe()} died {self.when()}; {_resume()}", PeerError.exit_code)

    def fell_silent(self, steps: str) -> Failure:
        """It lives, as far as one can see, but does not beat."""
        how = " (it is stopped by a signal)" if self.is_here and self.beat.process.is_stopped() else ""
        text = f"{self.describe()} has not answered for {self.silent:.0f} s{how}, last {self.when()}"
        return Failure(self.rank, f"{text}; {steps}; {_resume()}", PeerError.exit_code)

    def hangs(self, steps: str) -> Failure:
        """It beats, but its main thread does not come on."""
        where = f"{self.when()}, at {self.beat.place}" if self.beat.place else self.when()
        text = f"{self.describe()} has made no progress for {self.beat.idle:.0f} s {where}; {steps}; {_resume()}"
        return Failure(self.rank, text, PeerError.exit_code)


Peers = Mapping[int, Peer]
"""Those of this launch, by rank."""


def sure(peers: Peers, own: Beat, timeout: float, *, patient: bool) -> Iterator[Failure]:
    """Failures that end a run, the most likely root cause first.

    Args:
        peers: The others.
        own: This rank; it judges idleness only while it waits in a collective itself.
        timeout: Seconds of silence, and of idleness where a rank's present phase may not take longer.
        patient: Leave this rank time to find out by itself.
    """
    for peer in peers.values():
        failure, over = peer.beat.failure, not patient or peer.left >= FAREWELL_S or peer.is_gone()
        if peer.beat.state == "failed" and failure is not None and over:
            yield failure
    running = [peer for peer in peers.values() if peer.beat.state == "running"]
    yield from (peer.died() for peer in running if peer.is_gone())
    yield from (peer.fell_silent(steps(peers, own)) for peer in running if peer.silent >= timeout)
    if own.waits and own.idle >= timeout:
        yield from (
            peer.hangs(steps(peers, own))
            for peer in running
            if peer.beat.idle >= max(timeout, peer.beat.allowed) and not peer.beat.waits
        )
    for peer in peers.values():
        if peer.beat.state == "stopped" and peer.beat.failure is not None and min(peer.left, own.idle) >= STOP_S:
            yield peer.beat.failure


def likely(peers: Peers, own: Beat, timeout: float, lost: float = LOST_S) -> Iterator[Failure]:
    """Who may be to blame for a collective that failed although nobody has died, the most suspect first.

    Args:
        peers: The others.
        own: This rank.
        timeout: Seconds of silence or idleness that a run allows.
        lost: Those that make a rank suspect.
    """
    lost = min(lost, timeout / 2)
    running = [peer for peer in peers.values() if peer.beat.state == "running"]
    running.sort(key=lambda peer: (peer.beat.place.endswith(_BACKWARD), peer.beat.step))
    yield from (peer.fell_silent(steps(peers, own)) for peer in running if peer.silent >= lost)
    yield from (peer.hangs(steps(peers, own)) for peer in running if peer.beat.idle >= lost and not peer.beat.waits)
    for peer in peers.values():
        if peer.beat.state == "stopped" and peer.beat.failure is not None:
            yield peer.beat.failure
        if peer.beat.state == "done":
            text = f"{peer.describe()} ended {peer.when()}, and this rank still waited for it"
            yield Failure(peer.rank, text, PeerError.exit_code)


def unexplained(own: Beat, peers: Peers, error: BaseException) -> Failure:
    """A collective failed, and nobody seems to be to blame: no rank of this node, at least."""
    text = f"rank {own.rank} lost the others after step {own.step}, while {own.phase}: {_first_line(error)}"
    alive = [peer for peer in peers.values() if peer.beat.state == "running" and peer.silent < LOST_S]
    if len(alive) == len(peers) and any(not peer.is_here for peer in alive):
        text += "; all of them are alive, so look at the network between the nodes"
    return Failure(own.rank, f"{text}; {steps(peers, own)}; {_resume()}", PeerError.exit_code)


def steps(peers: Peers, own: Beat) -> str:
    """The last step of each rank, ranks of the same step together."""
    reached: dict[int, list[int]] = defaultdict(list)
    for beat in (own, *(peer.beat for peer in peers.values())):
        reached[beat.step].append(beat.rank)
    told = (f"{step} (rank {', '.join(map(str, sorted(ranks)))})" for step, ranks in sorted(reached.items()))
    return f"last step of each: {', '.join(told)}"


def _resume() -> str:
    return f"resume with {same_command()}"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def farewell(rank: int, error: BaseException | None) -> tuple[Literal["done", "stopped", "failed"], Failure | None]:
    """How a rank ends that ends with this error, as it tells the others."""
    if isinstance(error, KeyboardInterrupt):
        return "stopped", Failure(rank, f"rank {rank}: interrupted from the keyboard", INTERRUPTED)
    if isinstance(error, SystemExit) and error.code:
        reason = getattr(error, "reason", f"ended with {error.code}")
        return "stopped", Failure(rank, f"rank {rank}: {reason}", error.code if isinstance(error.code, int) else 1)
    if error is None or isinstance(error, SystemExit | GeneratorExit):
        return "done", None
    if isinstance(error, FinetuneError):
        lines = "\n".join(f"rank {rank}: {problem}" for problem in error.problems)
        return "failed", Failure(rank, lines, error.exit_code)
    return "failed", Failure(rank, f"rank {rank}: {type(error).__name__}: {_first_line(error)}", 1)


def is_of_a_peer(error: BaseException) -> bool:
    """Whether this is what torch raises, or what comes of it, where another rank has gone or does not answer.

    torch's own errors of communication count by their type; gloo's are RuntimeErrors, which their text tells.
    """
    if isinstance(error, PeerError) or "DistError" in {kind.__name__ for kind in type(error).__mro__}:
        return True
    return type(error) is RuntimeError and _GONE.search(str(error)) is not None
