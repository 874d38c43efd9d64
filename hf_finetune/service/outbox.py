"""Events that webhooks are told of: written in one transaction with what happened, kept until each address has them.

    ROOT/webhooks/ID/endpoint.json    an address, and the types of events that it wants
    ROOT/webhooks/ID/settled.txt      a line for each event that it has, or that was given up: so that a database that
                                      is made anew knows what is still to be told

An event is told at least once. Its id follows from what it is about, so that a receiver knows what it has already.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from hf_finetune.service.tables import ENDPOINTS, OUTBOX

BACKOFF = (5, 30, 120, 600, 3600, 4 * 3600, 12 * 3600, 24 * 3600, 24 * 3600)
"""Seconds after which a delivery is tried again; after the last one it is given up, about three days later."""


def event_of(subject: str, type_: str) -> dict[str, Any]:
    """Name the event that something has come to its end.

    Args:
        subject: Id of a job, of which there is one end.
        type_: E.g. `fine_tuning.job.succeeded`.
    """
    return {"event": f"evt_{subject.partition('-')[2] or subject}", "type": type_, "subject": subject}


def announce(connection: sql.Connection, project: str, event: Mapping[str, Any], when: int) -> None:
    """Put an event into the outbox of every address of a project that wants it, as part of a transaction."""
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
            wants = endpoint["project"] == project and event["type"] in endpoint["event_types"]
            if wants and when >= endpoint["created_at"] and event["event"] not in settled[endpoint["id"]]:
                _insert(connection, event, endpoint["id"], when)


def row_of(endpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Make the row of an address."""
    return {"id": endpoint["id"], "project": endpoint["project"], "document": json.dumps(endpoint)}


def claim(connection: sql.Connection, now: int, lease: int, busy: Iterable[str]) -> dict[str, Any] | None:
    """Take the delivery that has waited longest, for a while: if nothing is heard of it, it is due again.

    Args:
        connection: In a transaction.
        now: Seconds since the epoch.
        lease: Seconds.
        busy: Addresses that are being called.

    Returns:
        A row of the outbox; None where none is due.
    """
    due = (OUTBOX.c.next_at <= now) & OUTBOX.c.endpoint.not_in(list(busy))
    found = connection.execute(sql.select(OUTBOX).where(due).order_by(OUTBOX.c.next_at).limit(1)).mappings().first()
    if found is None:
        return None
    row: dict[str, Any] = {**found}
    # Another process may have been faster: one of both changes the row that it has read.
    mine = _is(row) & (OUTBOX.c.next_at == row["next_at"])
    taken = connection.execute(OUTBOX.update().where(mine).values(next_at=now + lease)).rowcount
    return row if taken else None


def settle(connection: sql.Connection, root: Path, row: Mapping[str, Any], now: int, *, delivered: bool) -> bool:
    """Note how a delivery went; a failed one is due again later. Returns False where it was given up."""
    attempts = row["attempts"] + 1
    if not delivered and attempts <= len(BACKOFF):
        later = {"attempts": attempts, "next_at": now + BACKOFF[attempts - 1]}
        connection.execute(OUTBOX.update().where(_is(row)).values(later))
        return True
    # First the file: a delivery that is forgotten is made twice, one that is not made would be lost.
    folder = root / "webhooks" / row["endpoint"]
    if folder.is_dir():
        with (folder / "settled.txt").open("a", encoding="ascii") as file:
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
