"""The files of the service, which are the truth, and the database, which is an index of them.

    ROOT/service.db                     keys, files and jobs; made anew by `serve --rebuild`
    ROOT/models.yaml                    the base models that jobs may name
    ROOT/limits.yaml                    what each project may keep: see `service.limits`
    ROOT/files/ID/file.json, data       an upload
    ROOT/uploads/ID/upload.json, PART   an upload in parts that is not complete
    ROOT/webhooks/ID                    an endpoint of webhooks: see `service.outbox`
    ROOT/webhooks.key                   their signing secrets are made of it
    ROOT/runs/ID/job.json               a job, and beside it what its worker writes: see `service.worker`
    ROOT/spool                          requests that are being received, and previews; nothing in it is kept

Whatever a caller was told is on the disk before: a job or a file is written, then indexed, then answered.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sql

from hf_finetune.errors import Problem, RecipeError
from hf_finetune.run.files import discard, write_atomically
from hf_finetune.service import limits, outbox, settings
from hf_finetune.service.tables import ENDPOINTS, FILES, JOBS, KEYS, METADATA, SCHEMA, TABLES, UPLOADS, VERSION

FINAL = ("succeeded", "failed", "cancelled")
"""States that a job never leaves."""
DEFAULT_PROJECT = "default"
FOLDERS = ("files", "runs", "spool", "uploads", "webhooks")
LEFT = 3600
"""Seconds after which what was left in the spool is removed."""


class OverQuota(Exception):  # noqa: N818 - it is an answer
    """A project has as many jobs, files or bytes as its operator allows; the message says which."""

    def __init__(self, what: str, most: int) -> None:
        super().__init__(f"this project may have {most:,} {what.replace('_', ' ')}, and has them")
        self.what = what


def new_id(prefix: str) -> str:
    """Make an id; ids of one prefix sort by the time at which they were made."""
    return f"{prefix}{time.time_ns():016x}{secrets.token_hex(6)}"


class Store:
    """The root folder and the database.

    Args:
        root: Is made where it is missing.
        database: SQLAlchemy URL; None takes SQLite inside the root.
        anew: Make the index of files and jobs anew, from the folders.

    Raises:
        RecipeError: The database can't be opened, is of another version, or knows nothing of the jobs in the root.
    """

    def __init__(self, root: Path, database: str | None = None, *, anew: bool = False) -> None:
        self.root = root.absolute()
        for folder in FOLDERS:
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        self.found = 0
        """Jobs that were found in the folders, where the index was made anew."""
        url = database or f"sqlite:///{self.root / 'service.db'}"
        try:
            # A connection is tried before it is used: the database may have been started anew since.
            self.engine = sql.create_engine(url, pool_pre_ping=True, pool_size=20, max_overflow=20)
            if self.engine.dialect.name == "sqlite":
                sql.event.listen(self.engine, "connect", _as_index)
            # Servers that start together wait for each other: databases check first, and create then.
            with locked(self.root / "schema.lock"), self.engine.begin() as connection:
                self._make(connection, anew=anew)
        except ModuleNotFoundError as error:
            message = f"needs {error.name}; pip install 'hf-finetune[postgresql]'"
            raise RecipeError(Problem(message, key="--database")) from None
        except sql.exc.SQLAlchemyError as error:
            reason = str(error).partition("\n")[0]
            raise RecipeError(Problem(f"the database can't be opened: {reason}", key="--database")) from None

    def _make(self, connection: sql.Connection, *, anew: bool) -> None:
        """Make the tables where they are missing; keys stay where the others are made anew."""
        tables = sql.inspect(connection).get_table_names()
        found = connection.execute(sql.select(SCHEMA.c.version)).scalar() if SCHEMA.name in tables else None
        if not anew and JOBS.name in tables and found != VERSION:
            message = f"the database is of version {found or 0}, and this program needs {VERSION}; stop all servers, "
            raise RecipeError(Problem(message + "and give --rebuild once: it is made of the folders", key="--database"))
        if not anew and JOBS.name not in tables and next((self.root / "runs").glob("*/job.json"), None):
            message = f"the database is empty, and {self.root / 'runs'} has jobs; give --rebuild once"
            raise RecipeError(Problem(message, key="--database"))
        if anew:
            TABLES.drop_all(connection, [table for table in TABLES.sorted_tables if table is not KEYS])
        TABLES.create_all(connection)
        if anew or found is None:
            connection.execute(SCHEMA.insert().values(version=VERSION))
        if anew:
            self._fill(connection)

    def _fill(self, connection: sql.Connection) -> None:
        """Index what lies in the folders; keys are not in them."""

        def documents(pattern: str) -> list[dict[str, Any]]:
            found = []
            for path in sorted(self.root.glob(pattern)):
                try:
                    found.append(json.loads(path.read_bytes()))
                except ValueError:
                    message = "is damaged; restore it from a backup, or move its folder out of the root folder"
                    raise RecipeError(Problem(message, file=str(path))) from None
            return found

        files, uploads = documents("files/*/file.json"), documents("uploads/*/upload.json")
        there = {file["id"] for file in files}
        for upload in uploads:
            if upload["file"] in there:  # the service was killed before it could say so
                upload["status"] = "completed"
        jobs = documents("runs/*/job.json")
        # Of two that the same request made, nobody was told of the one that never moved.
        jobs.sort(key=lambda job: (job["state"] != "validating_files" or job["handle"] is not None, job["id"]))
        jobs = list({job.get("request_key") or job["id"]: job for job in jobs}.values())
        rows: dict[sql.Table, list[dict[str, Any]]] = {
            FILES: [_file_row(file) for file in files],
            UPLOADS: [_upload_row(upload) for upload in uploads],
            JOBS: [_job_row(job) for job in jobs],
            METADATA: [pair for job in jobs for pair in _metadata_rows(job)],
        }
        for table, found in rows.items():
            if found:
                connection.execute(table.insert(), found)
        ended = [(job["project"], outbox.event_of(job), job["finished_at"]) for job in jobs if job["state"] in FINAL]
        outbox.fill(connection, self.root, ended)
        self.found = len(jobs)

    # ---- keys ----

    def create_key(self, project: str, name: str) -> str:
        """Make an API key of a project; it is returned once, and only its hash is kept.

        Raises:
            RecipeError: No project can be called so.
        """
        if re.fullmatch(r"[\w.-]{1,64}", project) is None:
            message = "a project has up to 64 letters, digits and . _ - in its name, which is part of names of models"
            raise RecipeError(Problem(f"{project!r}: {message}", key="--project"))
        token = f"hf-{secrets.token_urlsafe(32)}"
        made = {"id": new_id("key_"), "project": project, "digest": digest(token), "name": name, "created_at": now()}
        with self.engine.begin() as connection:
            connection.execute(KEYS.insert().values(made))
        return token

    def list_keys(self) -> list[dict[str, Any]]:
        """List all keys, without what they are."""
        with self.engine.connect() as connection:
            found = connection.execute(KEYS.select().order_by(KEYS.c.id)).mappings()
            return [{name: value for name, value in row.items() if name != "digest"} for row in found]

    def revoke_key(self, key: str) -> bool:
        """Revoke a key by its id; False where there is none that is valid."""
        with self.engine.begin() as connection:
            valid = (KEYS.c.id == key) & KEYS.c.revoked_at.is_(None)
            return connection.execute(KEYS.update().where(valid).values(revoked_at=now())).rowcount > 0

    def project_of(self, token: str) -> str | None:
        """Tell the project of an API key; None for one that is unknown or revoked.

        Keys are random and long, so a plain hash keeps them; the lookup compares hashes, whose time tells nothing.
        """
        valid = (KEYS.c.digest == digest(token)) & KEYS.c.revoked_at.is_(None)
        with self.engine.connect() as connection:
            return connection.execute(sql.select(KEYS.c.project).where(valid)).scalar()

    # ---- files ----

    def folder_of_file(self, file: str) -> Path:
        """Give the folder of an upload; the id must come from the database."""
        return self.root / "files" / file

    def add_file(self, project: str, document: Mapping[str, Any], *, is_limited: bool = False) -> None:
        """Keep an upload whose bytes lie in its folder already.

        Args:
            project: Whose it is.
            document: Of the file.
            is_limited: It counts, though what the service itself makes may always be kept.

        Raises:
            OverQuota: There is no room for it; nothing is kept.
        """
        kept = {"project": project, **document}
        folder = self.folder_of_file(document["id"])
        write_atomically(folder / "file.json", json.dumps(kept), durable=True)
        try:
            with self.engine.begin() as connection:
                # A file that a job has made may be there already: the service was killed before it told the job so.
                connection.execute(FILES.delete().where(FILES.c.id == document["id"]))
                connection.execute(FILES.insert().values(_file_row(kept)))
                if is_limited:
                    self.refuse_over(connection, project, "files", "stored_bytes")
        except OverQuota:
            discard(folder)
            raise

    def add_made_file(self, project: str, file: str, filename: str, purpose: str, content: bytes) -> None:
        """Keep a file that a job has made; the same id once more is the same file."""
        place = self.folder_of_file(file)
        place.mkdir(exist_ok=True)
        (place / "data").write_bytes(content)
        document = {"id": file, "filename": filename, "bytes": len(content), "created_at": now(), "purpose": purpose}
        self.add_file(project, document)

    def file(self, project: str, file: str) -> dict[str, Any] | None:
        """Look up an upload of a project; one that has expired is gone."""
        return self.document(FILES, (FILES.c.id == file) & (FILES.c.project == project) & _not_expired())

    def files(self, project: str, purpose: str | None, page: Page) -> tuple[list[dict[str, Any]], bool]:
        """List uploads; returns a page, and whether there are more."""
        fits = (FILES.c.project == project) & _not_expired()
        if purpose is not None:
            fits &= FILES.c.purpose == purpose
        with self.engine.connect() as connection:
            return page.of(connection, FILES, fits)

    def delete_file(self, file: str) -> None:
        """Forget an upload; jobs that read it have links of their own."""
        # First what `--rebuild` would bring it back by.
        (self.folder_of_file(file) / "file.json").unlink(missing_ok=True)
        with self.engine.begin() as connection:
            connection.execute(FILES.delete().where(FILES.c.id == file))
        discard(self.folder_of_file(file))

    def sweep(self) -> None:
        """Delete files and uploads whose time is over, and what a killed server has left in the spool."""
        with self.engine.connect() as connection:
            files = list(connection.execute(sql.select(FILES.c.id).where(~_not_expired())).scalars())
            over = sql.select(UPLOADS.c.id).where(UPLOADS.c.expires_at <= now())
            uploads = list(connection.execute(over).scalars())
        for file in files:
            self.delete_file(file)
        for upload in uploads:
            with self.engine.begin() as connection:
                connection.execute(UPLOADS.delete().where(UPLOADS.c.id == upload))
            discard(self.folder_of_upload(upload))
        for path in (self.root / "spool").iterdir():
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < now() - LEFT:
                    discard(path)

    # ---- uploads in parts ----

    def folder_of_upload(self, upload: str) -> Path:
        """Give the folder of an upload in parts; the id must come from the database."""
        return self.root / "uploads" / upload

    def add_upload(self, document: Mapping[str, Any]) -> None:
        """Keep a new upload, which takes the room of the file that it will be.

        Raises:
            OverQuota: There is none.
        """
        folder = self.folder_of_upload(document["id"])
        with self.engine.begin() as connection:
            connection.execute(UPLOADS.insert().values(_upload_row(document)))
            self.refuse_over(connection, document["project"], "files", "stored_bytes")
            folder.mkdir()
            write_atomically(folder / "upload.json", json.dumps(document), durable=True)

    def upload(self, project: str, upload: str) -> dict[str, Any] | None:
        """Look up an upload of a project."""
        return self.document(UPLOADS, (UPLOADS.c.id == upload) & (UPLOADS.c.project == project))

    def settle_upload(
        self,
        upload: str,
        status: str,
        *,
        file: Mapping[str, Any] | None = None,
        data: Path | None = None,
        parts: Sequence[str] | None = None,
    ) -> dict[str, Any] | None:
        """End an upload that is pending.

        Args:
            upload: The id.
            status: `completed` or `cancelled`.
            file: The document of the file that it becomes.
            data: Its bytes, which are moved.
            parts: What it was made of.

        Returns:
            The upload as it is now; None where it has ended before.
        """
        with self.engine.begin() as connection:
            connection.execute(UPLOADS.update().where(UPLOADS.c.id == upload).values(bytes=UPLOADS.c.bytes))
            found = connection.execute(sql.select(UPLOADS.c.document).where(UPLOADS.c.id == upload)).scalar()
            document: dict[str, Any] | None = None if found is None else json.loads(found)
            if document is None or document["status"] != "pending":
                return None
            document |= {"status": status, "parts": parts}
            if file is not None and data is not None:
                folder = self.folder_of_file(file["id"])
                folder.mkdir(exist_ok=True)
                data.replace(folder / "data")
                write_atomically(folder / "file.json", json.dumps(file), durable=True)
                connection.execute(FILES.insert().values(_file_row(file)))
            write_atomically(self.folder_of_upload(upload) / "upload.json", json.dumps(document), durable=True)
            connection.execute(UPLOADS.update().where(UPLOADS.c.id == upload).values(_upload_row(document)))
        return document

    def limits(self) -> limits.Limits:
        """Read `limits.yaml`.

        Raises:
            RecipeError: The file is wrong.
        """
        return limits.read(self.root / limits.FILE)

    def refuse_over(self, connection: sql.Connection, project: str, *what: str) -> None:
        """Refuse what a transaction has just added, where it is too much.

        Raises:
            OverQuota: It is.
        """
        counts = (
            ("waiting_jobs", JOBS, JOBS.c.state.in_(["validating_files", "queued"])),
            ("files", FILES, sql.true()),
            ("files", UPLOADS, UPLOADS.c.bytes > 0),
            ("stored_bytes", FILES, sql.true()),
            ("stored_bytes", UPLOADS, UPLOADS.c.bytes > 0),
            ("webhooks", ENDPOINTS, sql.true()),
        )
        quota, found = self.limits().quota(project), dict.fromkeys(what, 0)
        for name, table, fits in counts:
            if name in found:
                amount = sql.func.sum(table.c.bytes) if name == "stored_bytes" else sql.func.count()
                rows = sql.select(amount).select_from(table).where((table.c.project == project) & fits)
                found[name] += connection.execute(rows).scalar() or 0
        for name, number in found.items():
            if number > getattr(quota, name):
                raise OverQuota(name, getattr(quota, name))

    # ---- jobs ----

    def folder_of_job(self, job: str) -> Path:
        """Give the folder of a job; the id must come from the database."""
        return self.root / "runs" / job

    def add_job(self, document: Mapping[str, Any]) -> str:
        """Keep a new job; of two with the same `request_key` the first is kept. Returns the id of the one that is.

        Raises:
            OverQuota: Too many wait; nothing is kept.
        """
        folder = self.folder_of_job(document["id"])
        write_job(folder, document)
        try:
            with self.engine.begin() as connection:
                connection.execute(JOBS.insert().values(_job_row(document)))
                if pairs := _metadata_rows(document):
                    connection.execute(METADATA.insert(), pairs)
                self.refuse_over(connection, document["project"], "waiting_jobs")
        except OverQuota:
            discard(folder)
            raise
        except sql.exc.IntegrityError:
            discard(folder)
            with self.engine.connect() as connection:
                found = sql.select(JOBS.c.id).where(JOBS.c.request_key == document.get("request_key"))
                return str(connection.execute(found).scalar_one())
        return str(document["id"])

    def requested(self, request_key: str) -> str | None:
        """Find the job that a request has made already."""
        with self.engine.connect() as connection:
            return connection.execute(sql.select(JOBS.c.id).where(JOBS.c.request_key == request_key)).scalar()

    def job(self, job: str, project: str | None = None) -> dict[str, Any] | None:
        """Look up a job, of one project if that is given."""
        fits = JOBS.c.id == job
        if project is not None:
            fits &= JOBS.c.project == project
        return self.document(JOBS, fits)

    def job_of_model(self, project: str, model: str) -> dict[str, Any] | None:
        """Look up the job that made a model."""
        return self.document(JOBS, (JOBS.c.project == project) & (JOBS.c.model == model))

    def models(self, project: str) -> list[dict[str, Any]]:
        """List the jobs that have made a model."""
        fits = (JOBS.c.project == project) & JOBS.c.model.is_not(None)
        with self.engine.connect() as connection:
            found = connection.execute(sql.select(JOBS.c.document).where(fits).order_by(JOBS.c.id)).scalars()
            return [json.loads(document) for document in found]

    def jobs(
        self, project: str, metadata: Mapping[str, str] | None, page: Page, *, prefix: str = "ftjob-"
    ) -> tuple[list[dict[str, Any]], bool]:
        """List jobs, newest first; returns a page, and whether there are more.

        Args:
            project: Whose they are.
            metadata: Pairs that jobs must have; None lists those without any.
            page: Limits.
            prefix: Of their ids, which tells fine-tuning jobs from batches.
        """
        fits = (JOBS.c.project == project) & JOBS.c.id.startswith(prefix, autoescape=True)
        if metadata is None:
            fits &= JOBS.c.id.not_in(sql.select(METADATA.c.job))
        for name, value in (metadata or {}).items():
            pair = (METADATA.c.name == name) & (METADATA.c.value == value)
            fits &= JOBS.c.id.in_(sql.select(METADATA.c.job).where(pair))
        with self.engine.connect() as connection:
            return page.of(connection, JOBS, fits)

    def active(self) -> list[dict[str, Any]]:
        """List all jobs that have not ended, by priority, then age."""
        fits = JOBS.c.state.not_in([*FINAL, "paused"]) | (JOBS.c.wanted != "run") & JOBS.c.state.not_in(FINAL)
        ordered = sql.select(JOBS.c.document).where(fits).order_by(JOBS.c.priority.desc(), JOBS.c.id)
        with self.engine.connect() as connection:
            return [json.loads(document) for document in connection.execute(ordered).scalars()]

    def change(
        self, job: str, states: Sequence[str], seen: Mapping[str, Any] | None = None, /, **fields: Any
    ) -> dict[str, Any] | None:
        """Change a job if it is in one of the states; all at once, or not at all.

        Args:
            job: Its id.
            states: One of them it must have.
            seen: Fields that must still have these values, too.
            fields: The new values.

        Returns:
            The job as it is now; None where it was otherwise.
        """
        with self.engine.begin() as connection:
            # Writing first takes the lock, in every database: two processes never change one job at the same time.
            connection.execute(JOBS.update().where(JOBS.c.id == job).values(priority=JOBS.c.priority))
            row = sql.select(JOBS.c.document).where(JOBS.c.id == job)
            document: dict[str, Any] = json.loads(connection.execute(row).scalar_one())
            if document["state"] not in states or any(document[name] != value for name, value in (seen or {}).items()):
                return None
            ends = document["state"] not in FINAL and fields.get("state") in FINAL
            document |= fields
            if ends:
                outbox.announce(connection, document["project"], outbox.event_of(document), document["finished_at"])
            write_job(self.folder_of_job(job), document)
            connection.execute(JOBS.update().where(JOBS.c.id == job).values(_job_row(document)))
        return document

    def document(self, table: sql.Table, fits: Any) -> dict[str, Any] | None:
        """Look up the document of the one row that fits."""
        with self.engine.connect() as connection:
            found = connection.execute(sql.select(table.c.document).where(fits)).scalar()
        return None if found is None else json.loads(found)

    # ---- base models ----

    def base_models(self) -> dict[str, dict[str, Any]]:
        """Read `models.yaml`; see `settings.models`."""
        return settings.models(self.root / "models.yaml")


class Page:
    """A page of a list: so many entries after one."""

    def __init__(self, limit: int, after: str | None = None, *, newest_first: bool = True) -> None:
        self.limit, self.after, self.newest_first = limit, after, newest_first

    def ordered(self, table: sql.Table, fits: Any) -> Any:
        """Select the documents that come after."""
        if self.after is not None:
            fits &= table.c.id < self.after if self.newest_first else table.c.id > self.after
        order = table.c.id.desc() if self.newest_first else table.c.id
        return sql.select(table.c.document).where(fits).order_by(order)

    def of(self, connection: sql.Connection, table: sql.Table, fits: Any) -> tuple[list[dict[str, Any]], bool]:
        """Read the page; tell whether there are more."""
        rows = list(connection.execute(self.ordered(table, fits).limit(self.limit + 1)).scalars())
        return [json.loads(row) for row in rows[: self.limit]], len(rows) > self.limit


def now() -> int:
    """Seconds since the epoch, as the API has them."""
    return int(time.time())


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Let one process of this root at a time work; the kernel frees a killed one's lock."""
    with file.open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def write_job(folder: Path, document: Mapping[str, Any]) -> None:
    """Write `job.json`."""
    folder.mkdir(exist_ok=True)
    write_atomically(folder / "job.json", json.dumps(document, indent=1), durable=True)


def _job_row(document: Mapping[str, Any]) -> dict[str, Any]:
    columns = ("id", "project", "state", "wanted", "priority")
    return {
        **{name: document[name] for name in columns},
        "model": document.get("fine_tuned_model"),
        "request_key": document.get("request_key"),
        "document": json.dumps(document),
    }


def _file_row(document: Mapping[str, Any]) -> dict[str, Any]:
    row = {name: document[name] for name in ("id", "project", "purpose", "bytes")}
    return {**row, "expires_at": document.get("expires_at"), "document": json.dumps(document)}


def _not_expired() -> Any:
    return FILES.c.expires_at.is_(None) | (FILES.c.expires_at > now())


def _upload_row(document: Mapping[str, Any]) -> dict[str, Any]:
    row = {name: document[name] for name in ("id", "project", "expires_at")}
    # One that has ended takes no room any more.
    size = document["bytes"] if document["status"] == "pending" else 0
    return {**row, "bytes": size, "document": json.dumps(document)}


def _metadata_rows(job: Mapping[str, Any]) -> list[dict[str, str]]:
    return [{"job": job["id"], "name": name, "value": value} for name, value in (job.get("metadata") or {}).items()]


def digest(token: str) -> str:
    """Hash a secret that is random and long, for keeping it."""
    return hashlib.sha256(token.encode()).hexdigest()


def _as_index(connection: Any, record: Any) -> None:
    """Let readers and a writer work side by side, and writers wait for each other."""
    for pragma in ("journal_mode=WAL", "busy_timeout=30000", "synchronous=NORMAL"):
        connection.execute(f"PRAGMA {pragma}")
