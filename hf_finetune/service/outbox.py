"""Events for webhooks: written in one transaction with what happened, and kept until each endpoint has them.

    ROOT/webhooks/ID/endpoint.json    an endpoint, and since when it wants which types of events
    ROOT/webhooks/ID/settled.txt      a line for each event that was delivered or given up, so that `--rebuild` knows
                                      which are still to be delivered

Delivery is at least once. The id of an event follows from its subject, so that a receiver recognises a repetition.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import sqlalchemy as sql

from hf_finetune.service.tables import ENDPOINTS, OUTBOX

EventType = Literal[
    "fine_tuning.job.succeeded",
    "fine_tuning.job.failed",
    "fine_tuning.job.cancelled",
    "batch.completed",
    "batch.failed",
    "batch.cancelled",
]
TYPES: tuple[str, ...] = get_args(EventType)
STATES = {"succeeded": "completed"}
"""Of batches, which OpenAI calls otherwise than those of jobs."""
BACKOFF = (5, 30, 120, 600, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 24 * 3600)
"""Seconds until the next attempt of a delivery; after the last one it is given up, about three days later."""


def event_of(job: Mapping[str, Any]) -> dict[str, Any]:
    """Name the event that a job or a batch has ended, which happens once."""
    subject, state = job["id"], job["state"]
    if subject.startswith("batch_"):
        return {"event": f"evt_{subject}", "type": f"batch.{STATES.get(state, state)}", "subject": subject}
    event = f"evt_{subject.partition('-')[2] or subject}"
    return {"event": event, "type": f"fine_tuning.job.{state}", "subject": subject}


def payload(event: Mapping[str, Any], created: int) -> bytes:
    """Write an event as it is sent, in OpenAI's form.

    Args:
        event: Of `event_of`, or a row of the outbox.
        created: Seconds since the epoch.
    """
    head = {"id": event["event"], "object": "event", "created_at": created, "type": event["type"]}
    return json.dumps({**head, "data": {"id": event["subject"]}}).encode()


def announce(connection: sql.Connection, project: str, event: Mapping[str, Any], when: int) -> None:
    """Put an event into the outbox for each endpoint of a project that wants it, as part of a transaction."""
    wanted = sql.select(ENDPOINTS.c.document).where(ENDPOINTS.c.project == project)
    for endpoint in map(json.loads, connection.execute(wanted).scalars().all()):
        if event["type"] in endpoint["event_types"]:
            _insert(connection, event, endpoint["id"], when)


def fill(connection: sql.Connection, root: Path, ended: Iterable[tuple[str, Mapping[str, Any], int]]) -> None:
    """Fill both tables from the folders.

    Args:
        connection: In a transaction.
        root: The root folder.
        ended: Project, event and time of everything that has ended.
    """
    endpoints = [json.loads(file.read_bytes()) for file in sorted((root / "webhooks").glob("*/endpoint.json"))]
    for endpoint in endpoints:
        connection.execute(ENDPOINTS.insert().values(row_of(endpoint)))
    settled = {endpoint["id"]: _settled(root, endpoint["id"]) for endpoint in endpoints}
    for project, event, when in ended:
        for endpoint in endpoints:
            since = endpoint["event_types"].get(event["type"]) if endpoint["project"] == project else None
            if since is not None and when >= since and event["event"] not in settled[endpoint["id"]]:
                _insert(connection, event, endpoint["id"], when)


def row_of(endpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Make the row of an endpoint."""
    return {"id": endpoint["id"], "project": endpoint["project"], "document": json.dumps(endpoint)}


def next_due(
    connection: sql.Connection, now: int, busy: Iterable[str], full: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any] | None] | None:
    """Find the delivery that is due for longest.

    Args:
        connection: To the database.
        now: Seconds since the epoch.
        busy: Endpoints to leave out.
        full: Projects to leave out.

    Returns:
        Its row, and its endpoint, None where that was deleted; None where nothing is due.
    """
    both = sql.select(OUTBOX, ENDPOINTS.c.document).outerjoin(ENDPOINTS, ENDPOINTS.c.id == OUTBOX.c.endpoint)
    due = (OUTBOX.c.next_at <= now) & OUTBOX.c.endpoint.not_in(list(busy))
    due &= ENDPOINTS.c.project.is_(None) | ENDPOINTS.c.project.not_in(list(full))
    found = connection.execute(both.where(due).order_by(OUTBOX.c.next_at).limit(1)).mappings().first()
    if found is None:
        return None
    row = {**found}
    document = row.pop("document")
    return row, None if document is None else json.loads(document)


def settle(connection: sql.Connection, root: Path, row: Mapping[str, Any], now: int, *, delivered: bool) -> bool:
    """Note how a delivery went; a failed one is due again later. Returns False where it was given up."""
    attempts = row["attempts"] + 1
    if not delivered and attempts <= len(BACKOFF):
        later = {"attempts": attempts, "next_at": now + BACKOFF[attempts - 1]}
        connection.execute(OUTBOX.update().where(_is(row)).values(later))
        return True
    # First the file: a delivery that is forgotten is repeated, one that did not happen would be lost.
    with (
        suppress(FileNotFoundError),  # the endpoint was deleted
        (root / "webhooks" / row["endpoint"] / "settled.txt").open("a", encoding="ascii") as file,
    ):
        file.write(f"{row['event']}\n")
        file.flush()
        os.fsync(file.fileno())
    connection.execute(OUTBOX.delete().where(_is(row)))
    return delivered


def _insert(connection: sql.Connection, event: Mapping[str, Any], endpoint: str, when: int) -> None:
    there = (OUTBOX.c.event == event["event"]) & (OUTBOX.c.endpoint == endpoint)
    if connection.execute(sql.select(OUTBOX.c.event).where(there)).first() is None:
        row = {**event, "endpoint": endpoint, "created_at": when, "attempts": 0, "next_at": when}
        connection.execute(OUTBOX.insert().values(row))


def _is(row: Mapping[str, Any]) -> Any:
    return (OUTBOX.c.event == row["event"]) & (OUTBOX.c.endpoint == row["endpoint"])


def _settled(root: Path, endpoint: str) -> set[str]:
    try:
        return set((root / "webhooks" / endpoint / "settled.txt").read_text(encoding="ascii").split())
    except FileNotFoundError:
        return set()
