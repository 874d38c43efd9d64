"""`run.lock.json`: what a run was made from and on, so that it can be repeated, or refused where that is not possible.

    lockfile      what stands in it; reading and writing
    inputs        the files and commits that a run reads, with hashes
    surroundings  versions of packages, what of the machine decides bits, the commit of the working directory
    making        the lock of a run that is about to train
    drift         what differs between a lock and here and now
    pinning       the recipe with the commits that its revisions meant, and the date that its chat template prints
    repeating     `--locked`: the recipe out of a lock, and where the repeat goes

Importing this is cheap: nothing here needs torch before a run is looked at.
"""

from __future__ import annotations

from hf_finetune.runlock.lockfile import Lock, choices, find, read
from hf_finetune.runlock.pinning import as_trained, day

__all__ = ["Lock", "as_trained", "choices", "day", "find", "read"]
