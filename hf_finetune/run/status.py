"""Read `status.json` of a run and say whether the run is alive. Imports nothing heavy: probes ask every half minute."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

HEARTBEAT_SECONDS = 5.0
LOST_SECONDS = 12 * HEARTBEAT_SECONDS
"""A run that says `running` and has not written a heartbeat for so long was killed, or its machine is gone."""


def read(file: Path) -> dict[str, Any]:
    """Return the object in `status.json`; an empty one if the file is missing, damaged or has no state."""
    try:
        status = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) and isinstance(status.get("state"), str) else {}


def silence(status: dict[str, Any], now: float | None = None) -> float:
    """Return the seconds since the last heartbeat; 0 if there is none that can be read.

    Args:
        status: See `read`.
        now: Seconds since the epoch.
    """
    try:
        heartbeat = datetime.fromisoformat(status["heartbeat"]).timestamp()
    except (KeyError, TypeError, ValueError, OverflowError):
        return 0.0
    return (time.time() if now is None else now) - heartbeat


def is_alive(status: dict[str, Any], now: float | None = None) -> bool:
    """Tell by the heartbeat whether a run goes on; arguments as of `silence`."""
    return status.get("state") == "running" and "heartbeat" in status and silence(status, now) <= LOST_SECONDS
