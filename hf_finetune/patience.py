"""How long a rank waits for the others, in seconds, as the environment says."""

from __future__ import annotations

import math
import os
from datetime import timedelta

from hf_finetune.errors import RecipeError

PEER, PEER_S = "HF_FINETUNE_PEER_TIMEOUT", 600.0
"""After so long a rank that shows no sign of life, or hangs while others wait for it, is given up."""
COLLECTIVE, COLLECTIVE_S = "HF_FINETUNE_COLLECTIVE_TIMEOUT", 600.0
"""After so long a rank gives up a collective that the others do not take part in: what a cut network is noticed by.

It must be longer than the slowest rank is late at any step, and than the first rank hashes and syncs a checkpoint.
"""

MEETING = timedelta(minutes=10)
"""How much later than the first one the last node may start, at least."""


def peer() -> float:
    """The limit of silence.

    Raises:
        RecipeError: The variable is no positive number.
    """
    return _seconds(PEER, PEER_S)


def collective() -> timedelta:
    """The limit of a collective.

    Raises:
        RecipeError: The variable is no positive number.
    """
    return timedelta(seconds=_seconds(COLLECTIVE, COLLECTIVE_S))


def _seconds(name: str, default: float) -> float:
    text = os.environ.get(name, str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RecipeError(f"the environment variable {name} is {text!r}; give seconds, e.g. {default:.0f}")
    return seconds
