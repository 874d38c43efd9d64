"""Which rank looks after which disk: output folders may be shared by all nodes, by some, or by none."""

from __future__ import annotations

import secrets
from pathlib import Path

from hf_finetune.checkpoints import disk
from hf_finetune.checkpoints.ranks import Ranks, together
from hf_finetune.errors import Problem, StorageError

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
            with disk.reported(folder, 0):
                folder.mkdir(parents=True, exist_ok=True)
                marks[ranks.rank].touch()

    def look() -> int:
        # Each name is looked up by itself: listings of network file systems may be old.
        with disk.reported(folder, 0):
            seen = [rank for rank in firsts if marks[rank].exists()]
        if not seen:
            raise StorageError(Problem(f"{folder} is not what the first rank of this node sees there", key="output"))
        return seen[0]

    together(ranks, leave)
    found = tuple(together(ranks, look))
    if ranks.local_rank == 0:
        marks[ranks.rank].unlink(missing_ok=True)
    return found
