"""The tables of the database, which is an index of the files below ROOT; keys alone are nowhere else."""

from __future__ import annotations

import sqlalchemy as sql

VERSION = 2
"""Of the tables below; another one is refused, and `--rebuild` makes them anew."""

TABLES = sql.MetaData()
SCHEMA = sql.Table("schema_version", TABLES, sql.Column("version", sql.Integer, nullable=False))


def _id(name: str = "id") -> sql.Column[str]:
    return sql.Column(name, sql.String(64), primary_key=True)


def _project() -> sql.Column[str]:
    return sql.Column("project", sql.String(64), nullable=False, index=True)


KEYS = sql.Table(
    "keys",
    TABLES,
    _id(),
    sql.Column("project", sql.String(64), nullable=False),
    sql.Column("digest", sql.String(64), nullable=False, unique=True),
    sql.Column("name", sql.String(200), nullable=False),
    sql.Column("created_at", sql.Integer, nullable=False),
    sql.Column("revoked_at", sql.Integer),
)
FILES = sql.Table(
    "files",
    TABLES,
    _id(),
    _project(),
    sql.Column("purpose", sql.String(32), nullable=False),
    sql.Column("bytes", sql.BigInteger, nullable=False),
    sql.Column("expires_at", sql.Integer),
    sql.Column("document", sql.Text, nullable=False),
)
UPLOADS = sql.Table(
    "uploads",
    TABLES,
    _id(),
    _project(),
    sql.Column("bytes", sql.BigInteger, nullable=False),
    sql.Column("expires_at", sql.Integer, nullable=False),
    sql.Column("document", sql.Text, nullable=False),
)
JOBS = sql.Table(
    "jobs",
    TABLES,
    _id(),
    _project(),
    sql.Column("state", sql.String(32), nullable=False, index=True),
    sql.Column("wanted", sql.String(16), nullable=False),
    sql.Column("priority", sql.Integer, nullable=False),
    sql.Column("model", sql.String(600), index=True),
    sql.Column("request_key", sql.String(300), unique=True),
    sql.Column("document", sql.Text, nullable=False),
)
METADATA = sql.Table(
    "job_metadata",
    TABLES,
    sql.Column("job", sql.String(64), primary_key=True),
    sql.Column("name", sql.String(64), primary_key=True),
    sql.Column("value", sql.String(512), nullable=False),
)
ENDPOINTS = sql.Table(
    "webhook_endpoints",
    TABLES,
    _id(),
    _project(),
    sql.Column("document", sql.Text, nullable=False),
)
OUTBOX = sql.Table(
    "outbox",
    TABLES,
    _id("event"),
    _id("endpoint"),
    sql.Column("type", sql.String(64), nullable=False),
    sql.Column("subject", sql.String(64), nullable=False),
    sql.Column("created_at", sql.Integer, nullable=False),
    sql.Column("attempts", sql.Integer, nullable=False),
    sql.Column("next_at", sql.Integer, nullable=False, index=True),
)
