"""Delivery of webhooks by the server that holds the lock of the queue: each event until an endpoint answers 2xx.

The signature is that of https://www.standardwebhooks.com, which OpenAI's client verifies.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import threading
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from hf_finetune.errors import Problem, RecipeError
from hf_finetune.service import egress, outbox
from hf_finetune.service.store import Store, now

KEY = "webhooks.key"
KEY_BYTES = 32
SECONDS = 0.5
"""Between two looks at the outbox."""
AT_ONCE = 16
"""Deliveries at the same time, each to another endpoint: a slow one holds up nobody else's events."""
OF_PROJECT = 4
"""Of these, those of one project."""
PAUSE = 60.0
"""Seconds until an endpoint is called again after the result of a call could not be kept."""
_logger = logging.getLogger(__name__)


def secret(root: Path, endpoint: Mapping[str, Any], *, is_old: bool = False) -> str:
    """Make the signing secret of an endpoint, or the one that it had before: it is kept nowhere.

    Raises:
        RecipeError: The key of the root folder is missing.
    """
    file = root / KEY
    key = file.read_bytes() if file.exists() else b""
    if len(key) < KEY_BYTES:
        message = f"is missing or too short; restore it from a backup, or write {KEY_BYTES} random bytes, mode 600, "
        raise RecipeError(
            Problem(message + "and let the projects rotate the secrets of their webhooks", file=str(file))
        )
    named = f"{endpoint['id']}.{endpoint['secret'] - is_old}"
    return "whsec_" + base64.b64encode(hmac.digest(key, named.encode(), hashlib.sha256)).decode()


def send(store: Store, endpoint: Mapping[str, Any], event: Mapping[str, Any], created: int) -> int:
    """Send an event to an endpoint; returns the status of its answer.

    Raises:
        Unreachable: There was none.
        RecipeError: The service is not set up right.
    """
    body, when = outbox.payload(event, created), now()
    signed = f"{event['event']}.{when}.".encode() + body
    signatures = []
    for is_old in (False, True) if endpoint["old_until"] > when else (False,):
        key = base64.b64decode(secret(store.root, endpoint, is_old=is_old).removeprefix("whsec_"))
        signatures.append("v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode())
    headers = {
        "content-type": "application/json",
        "user-agent": "hf_finetune",
        "webhook-id": event["event"],
        "webhook-timestamp": str(when),
        "webhook-signature": " ".join(signatures),
    }
    return egress.post(endpoint["url"], headers, body, store.limits().webhooks.networks)


class Deliveries:
    """Deliver what is in the outbox while the context is open, in threads.

    Args:
        store: Of one root; no other process delivers its events at the same time.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._calling: dict[str, str] = {}
        """Endpoints that are being called, and their projects."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="webhooks", daemon=True)
        self._pool = ThreadPoolExecutor(AT_ONCE, "webhook")

    def __enter__(self) -> Deliveries:
        """Begin."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """End; an event whose delivery is not over is delivered once more by the next server."""
        self._stop.set()
        self._thread.join()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _loop(self) -> None:
        while not self._stop.wait(SECONDS):
            try:
                while not self._stop.is_set() and len(self._calling) < AT_ONCE and self._begin():
                    pass
            except (SQLAlchemyError, OSError) as error:  # a database that is away for a while
                _logger.warning("webhooks could not be delivered: %s", str(error).partition("\n")[0])

    def _begin(self) -> bool:
        """Begin the delivery that is due for longest; False where none is."""
        calling = dict(self._calling)
        full = [project for project, number in Counter(calling.values()).items() if number >= OF_PROJECT]
        with self._store.engine.begin() as connection:
            found = outbox.next_due(connection, now(), calling, full)
            if found is None:
                return False
            row, endpoint = found
            if endpoint is None:
                outbox.settle(connection, self._store.root, row, now(), delivered=True)
                return True
        self._calling[row["endpoint"]] = endpoint["project"]
        self._pool.submit(self._deliver, row, endpoint)
        return True

    def _deliver(self, row: Mapping[str, Any], endpoint: Mapping[str, Any]) -> None:
        said = "webhook %s, %s, attempt %d: %s; %s"
        attempt = (endpoint["id"], row["event"], row["attempts"] + 1)
        try:
            try:
                status = send(self._store, endpoint, row, row["created_at"])
                result, is_delivered = f"the answer was {status}", 200 <= status < 300
            except egress.Unreachable as error:
                result, is_delivered = str(error), False
            with self._store.engine.begin() as connection:
                is_kept = outbox.settle(connection, self._store.root, row, now(), delivered=is_delivered)
            if not is_delivered:
                _logger.warning(said, *attempt, result, "it will be tried again" if is_kept else "it is given up")
        except Exception as error:
            # Nothing was noted, so the event stays due: the receiver must not be called without end.
            _logger.exception(said, *attempt, str(error).partition("\n")[0], f"no other for {PAUSE:g} s")
            self._stop.wait(PAUSE)
        finally:
            del self._calling[row["endpoint"]]
