"""A rank that dies, fails or hangs is named by the others, who then end, instead of waiting for ever.

    process   a process of this machine, never mistaken for a later one with the same number
    beat      the file that a rank renews while it lives
    verdict   what the files tell about the other ranks
    watch     the thread that writes and reads them, and ends this process where a peer has failed

Ranks see each other through files in the run folder. On nodes without a common file system a rank sees those of its own
node alone; what happens on the others, the time limit of the collectives shows. The ranks of one launch are told from
those of earlier ones by the launcher's variables, and by what was written before this process began.
"""

from __future__ import annotations

from hf_finetune.peers.beat import Failure
from hf_finetune.peers.verdict import is_of_a_peer
from hf_finetune.peers.watch import Watch

__all__ = ["Failure", "Watch", "is_of_a_peer"]
