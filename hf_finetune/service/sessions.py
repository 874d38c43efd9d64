"""Logins of the web page: a cookie whose hash the database keeps, and which is worth as much as the key behind it."""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING

import sqlalchemy as sql

from hf_finetune.service.store import Store, digest, locked, now
from hf_finetune.service.tables import KEYS

if TYPE_CHECKING:
    from fastapi import Request, Response

COOKIE = "hf_finetune_session"
LASTS = 12 * 3600
"""Seconds after which a login ends."""
CSRF = "x-csrf-token"
"""Header of every request of a page that changes something."""

_tables = sql.MetaData()
SESSIONS = sql.Table(
    "sessions",
    _tables,
    sql.Column("digest", sql.String(64), primary_key=True),
    sql.Column("key", sql.String(64), nullable=False),
    sql.Column("expires_at", sql.Integer, nullable=False),
)


class Sessions:
    """The logins of a service."""

    def __init__(self, store: Store) -> None:
        self.engine = store.engine
        with locked(store.root / "schema.lock"):
            _tables.create_all(self.engine)

    def open(self, token: str) -> str | None:
        """Begin a session by an API key; returns the cookie, or None for a key that is unknown or revoked."""
        made = secrets.token_urlsafe(32)
        with self.engine.begin() as connection:
            valid = (KEYS.c.digest == digest(token)) & KEYS.c.revoked_at.is_(None)
            key = connection.execute(sql.select(KEYS.c.id).where(valid)).scalar()
            if key is None:
                return None
            connection.execute(SESSIONS.delete().where(SESSIONS.c.expires_at <= now()))
            connection.execute(SESSIONS.insert().values(digest=digest(made), key=key, expires_at=now() + LASTS))
        return made

    def project_of(self, cookie: str) -> str | None:
        """Tell the project of a session; None once it is over, or its key is revoked."""
        valid = (SESSIONS.c.digest == digest(cookie)) & (SESSIONS.c.expires_at > now()) & KEYS.c.revoked_at.is_(None)
        with self.engine.connect() as connection:
            return connection.execute(
                sql.select(KEYS.c.project).select_from(SESSIONS.join(KEYS, KEYS.c.id == SESSIONS.c.key)).where(valid)
            ).scalar()

    def close(self, cookie: str) -> None:
        """End a session."""
        with self.engine.begin() as connection:
            connection.execute(SESSIONS.delete().where(SESSIONS.c.digest == digest(cookie)))


def csrf_of(cookie: str) -> str:
    """Make the token that pages of a session send with every change; it tells nothing of the cookie."""
    return hashlib.sha256(f"csrf:{cookie}".encode()).hexdigest()


def is_own(request: Request) -> bool:
    """Tell whether a request that changes something comes from a page of the session that its cookie names."""
    given = request.headers.get(CSRF, "")
    return secrets.compare_digest(given.encode(), csrf_of(request.cookies.get(COOKIE, "")).encode())


def set_cookie(response: Response, cookie: str, *, secure: bool) -> None:
    """Hand a session to a browser, which shows it to no script and to no other site."""
    response.set_cookie(COOKIE, cookie, max_age=LASTS, httponly=True, samesite="strict", secure=secure, path="/")
