"""Time limits for ranks that wait for others, in seconds, as the environment says."""

from __future__ import annotations

import math
import os
from datetime import timedelta

from hf_finetune.errors import RecipeError

PEER, PEER_S = "HF_FINETUNE_PEER_TIMEOUT", 600.0
"""After so long a rank that shows no sign of life, or hangs while others wait for it, is given up."""
COLLECTIVE, COLLECTIVE_S = "HF_FINETUNE_COLLECTIVE_TIMEOUT", 600.0
"""After so long a rank gives up a collective that the others do not take part in: what a cut network is noticed by.

It must be longer than the slowest rank is late at any step.
"""
WAIT, WAIT_S = "HF_FINETUNE_WAIT_TIMEOUT", 6 * 3600.0
"""For so long ranks wait for one that prepares data, loads weights, saves, or checks what was saved: work that keeps
one of them busy and leaves the others with nothing to do. A rank that dies meanwhile is noticed all the same."""

MEETING = timedelta(minutes=10)
"""The last node may start at least so much later than the first one."""


def peer() -> float:
    """The limit of silence."""
    return _seconds(PEER, PEER_S)


def collective() -> timedelta:
    """The limit of a collective."""
    return timedelta(seconds=_seconds(COLLECTIVE, COLLECTIVE_S))


def wait() -> timedelta:
    """The limit of waiting for a rank that does long work on its own."""
    return timedelta(seconds=_seconds(WAIT, WAIT_S))


def _seconds(name: str, default: float) -> float:
    """The value of a variable, or its default.

    Raises:
        RecipeError: The variable is no positive number.
    """
    text = os.environ.get(name, str(default))
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RecipeError(f"the environment variable {name} is {text!r}; give seconds, e.g. {default:.0f}")
    return seconds
