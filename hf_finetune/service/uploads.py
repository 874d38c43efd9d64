"""Files of a project, sent whole or in parts. What is received lies below ROOT from its first byte, and is bounded.

The name that a caller gives a file is shown, and its ending tells how it is read; no path is ever made of it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from pydantic import Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from hf_finetune.run.files import discard, sync_folder
from hf_finetune.service import views
from hf_finetune.service.calls import LARGEST_FILE, LARGEST_PART, Called, Caller, Refusal
from hf_finetune.service.requests import Body
from hf_finetune.service.store import Page, new_id, now

routes = APIRouter()
AT_ONCE = 16
"""Files that are received at the same time."""
OF_PROJECT = 8
"""Of these, those of one project: a slow one holds up nobody else's."""
PARTS = 10_000
"""Most parts of an upload."""
HOUR = 3600
SPARE = 256 << 20
"""Bytes of the disk that uploads leave free."""
_PART = re.compile(r"part_[0-9a-f]{28}")
_UNSEEN = re.compile(r"[\x00-\x1f\x7f]")

Purpose = Literal["fine-tune", "batch", "evals", "user_data", "assistants", "vision"]
Lifetime = Annotated[int, Field(ge=HOUR, le=30 * 24 * HOUR)]


class FileForm(Body):
    """The fields beside a file."""

    purpose: Purpose
    seconds: Lifetime | None = Field(None, alias="expires_after[seconds]")
    anchor: Literal["created_at"] | None = Field(None, alias="expires_after[anchor]")


class ExpiresAfter(Body):
    """The lifetime of a file."""

    anchor: Literal["created_at"]
    seconds: Lifetime


class UploadRequest(Body):
    """An upload in parts."""

    bytes: Annotated[int, Field(ge=0, le=LARGEST_FILE)]
    filename: Annotated[str, Field(min_length=1, max_length=1024)]
    mime_type: Annotated[str, Field(max_length=200)] = ""
    purpose: Purpose
    expires_after: ExpiresAfter | None = None


class CompleteRequest(Body):
    """The parts in their order."""

    part_ids: Annotated[list[str], Field(max_length=PARTS)]
    md5: Annotated[str, Field(pattern=r"^[0-9a-fA-F]{32}$")] | None = None


# ---- files ----


@routes.post("/v1/files")
async def upload(caller: Called, request: Request) -> dict[str, Any]:
    """Keep a file."""
    async with _received(request, caller, "file") as (form, file):
        try:
            given = FileForm.model_validate({name: value for name, value in form.items() if name != "file"})
        except ValidationError as error:
            raise RequestValidationError([{**one, "loc": ("body", *one["loc"])} for one in error.errors()]) from None
        document = _document(new_id("file-"), file.filename or "", given.purpose, given.seconds)
        return views.file(await run_in_threadpool(_keep, caller, file.file, document))


@routes.get("/v1/files")
def list_files(
    caller: Called,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """List files."""
    found, more = caller.store.files(caller.project, purpose, Page(limit, after, newest_first=order == "desc"))
    return views.listed([views.file(document) for document in found], more=more)


@routes.get("/v1/files/{file}")
def retrieve_file(caller: Called, file: str) -> dict[str, Any]:
    """Describe a file."""
    return views.file(caller.file(file))


@routes.get("/v1/files/{file}/content")
def content(caller: Called, file: str) -> FileResponse:
    """Send the bytes of a file."""
    found = caller.file(file)
    kind = "text/csv" if found["purpose"] == views.RESULTS else "application/octet-stream"
    # What a browser is given by mistake, it keeps: it never shows it as a page of this service.
    safe = {"x-content-type-options": "nosniff", "content-disposition": "attachment"}
    return FileResponse(caller.store.folder_of_file(file) / "data", media_type=kind, headers=safe)


@routes.delete("/v1/files/{file}")
def delete_file(caller: Called, file: str) -> dict[str, Any]:
    """Delete a file; jobs that read it are not touched."""
    caller.file(file)
    caller.store.delete_file(file)
    return {"id": file, "object": "file", "deleted": True}


# ---- uploads in parts ----


@routes.post("/v1/uploads")
def begin(caller: Called, body: UploadRequest) -> dict[str, Any]:
    """Begin an upload; it is open for an hour."""
    _refuse_full(caller, 2 * body.bytes)
    document = {
        **{"id": new_id("upload_"), "project": caller.project, "file": new_id("file-"), "status": "pending"},
        **{"bytes": body.bytes, "filename": _shown(body.filename), "purpose": body.purpose, "parts": None},
        **{"created_at": now(), "expires_at": now() + HOUR},
        **{"seconds": body.expires_after and body.expires_after.seconds},
    }
    caller.store.add_upload(document)
    return _view(caller, document)


@routes.post("/v1/uploads/{upload}/parts")
async def add_part(caller: Called, upload: str, request: Request) -> dict[str, Any]:
    """Keep a part; parts may come at the same time, and in any order."""
    found = await run_in_threadpool(_pending, caller, upload)
    async with _received(request, caller, "data") as (_, part):
        made = new_id("part_")
        await run_in_threadpool(_keep_part, caller, found, part, made)
    return {"id": made, "object": "upload.part", "created_at": now(), "upload_id": upload}


@routes.post("/v1/uploads/{upload}/complete")
def complete(caller: Called, upload: str, body: CompleteRequest) -> dict[str, Any]:
    """Make a file of the parts; asked for once more, the same file is answered."""
    found = _upload(caller, upload)
    if found["status"] == "completed" and found["parts"] == body.part_ids:
        return _view(caller, found)
    found = _pending(caller, upload)
    store, folder = caller.store, caller.store.folder_of_upload(upload)
    parts = [folder / part for part in body.part_ids if _PART.fullmatch(part)]
    if len(parts) != len(set(body.part_ids)) or not all(part.is_file() for part in parts):
        raise Refusal(400, "name the parts of this upload, each once", param="part_ids")
    size = sum(part.stat().st_size for part in parts)
    if size != found["bytes"]:
        raise Refusal(400, f"the parts have {size:,} bytes, and the upload {found['bytes']:,}", param="part_ids")
    whole = store.root / "spool" / new_id("upload-")
    try:
        digest = _join(parts, whole)
        if body.md5 is not None and digest != body.md5.lower():
            raise Refusal(400, f"the parts have the md5 {digest}; upload them again", param="md5")
        file = _document(found["file"], found["filename"], found["purpose"], found["seconds"]) | {"bytes": size}
        file = {"project": caller.project, **file}
        done = store.settle_upload(upload, "completed", file=file, data=whole, parts=body.part_ids)
    finally:
        discard(whole)
    if done is None:
        raise Refusal(400, "the upload has ended meanwhile", code="invalid_state")
    for part in parts:
        part.unlink(missing_ok=True)
    return _view(caller, done)


@routes.post("/v1/uploads/{upload}/cancel")
def cancel(caller: Called, upload: str) -> dict[str, Any]:
    """Cancel an upload, and delete its parts."""
    found = _upload(caller, upload)
    if found["status"] != "cancelled":
        _pending(caller, upload)
        found = caller.store.settle_upload(upload, "cancelled") or found
        for part in caller.store.folder_of_upload(upload).glob("part_*"):
            part.unlink(missing_ok=True)
    return _view(caller, found)


def _upload(caller: Caller, upload: str) -> dict[str, Any]:
    found = caller.store.upload(caller.project, upload)
    if found is None:
        raise Refusal(404, f"there is no upload {upload!r}", code="not_found")
    if found["status"] == "pending" and found["expires_at"] <= now():
        found["status"] = "expired"
    return found


def _pending(caller: Caller, upload: str) -> dict[str, Any]:
    found = _upload(caller, upload)
    if found["status"] != "pending":
        raise Refusal(400, f"the upload is {found['status']}", code="invalid_state")
    return found


def _view(caller: Caller, upload: dict[str, Any]) -> dict[str, Any]:
    fields = ("id", "bytes", "created_at", "expires_at", "filename", "purpose", "status")
    file = caller.store.file(caller.project, upload["file"]) if upload["status"] == "completed" else None
    shown = {name: upload[name] for name in fields}
    return {"object": "upload", **shown, "file": None if file is None else views.file(file)}


# ---- what is received ----


@asynccontextmanager
async def _received(request: Request, caller: Caller, field: str) -> AsyncIterator[tuple[FormData, UploadFile]]:
    """Receive a form with one file; the key has been looked at before, so nobody else makes the disk busy."""
    receiving: Counter[str] = request.app.state.receiving
    if receiving.total() >= AT_ONCE or receiving[caller.project] >= OF_PROJECT:
        most = f"{AT_ONCE} files are received already, or {OF_PROJECT} of this project"
        raise Refusal(429, f"{most}; try again in a moment", code="too_many_uploads")
    _refuse_full(caller, 2 * int(request.headers.get("content-length") or 0))
    receiving[caller.project] += 1
    try:
        async with request.form(max_files=1, max_fields=8, max_part_size=4096) as form:
            file = form.get(field)
            if not isinstance(file, UploadFile):
                raise Refusal(400, f"the file is missing; send it as the field {field!r} of a form", param=field)
            yield form, file
    finally:
        receiving[caller.project] -= 1


def _refuse_full(caller: Caller, size: int) -> None:
    if shutil.disk_usage(caller.store.root).free < size + SPARE:
        raise Refusal(507, "the disk of this service is full; its operator must make room", code="storage_full")


def _document(file: str, filename: str, purpose: str, seconds: int | None) -> dict[str, Any]:
    document = {"id": file, "filename": _shown(filename), "created_at": now(), "purpose": purpose}
    return document | ({} if seconds is None else {"expires_at": now() + seconds})


def _shown(filename: str) -> str:
    """Take the last part of a name, which is only ever shown."""
    return _UNSEEN.sub("", re.split(r"[/\\]", filename)[-1])[-200:] or "file"


def _keep_part(caller: Caller, upload: Mapping[str, Any], part: UploadFile, name: str) -> None:
    folder, size = caller.store.folder_of_upload(upload["id"]), upload["bytes"]
    kept = [path.stat().st_size for path in folder.glob("part_*")]
    # A part whose answer was lost is sent again.
    if len(kept) >= PARTS or sum(kept) + (part.size or 0) > 2 * size + LARGEST_PART:
        raise Refusal(400, f"the parts are more than the {size:,} bytes of this upload", param="data")
    _write(part.file, folder / name)


def _keep(caller: Caller, source: BinaryIO, document: dict[str, Any]) -> dict[str, Any]:
    folder = caller.store.folder_of_file(document["id"])
    folder.mkdir()
    try:
        document["bytes"] = _write(source, folder / "data")
    except OSError:
        discard(folder)
        raise
    if not document["bytes"]:
        discard(folder)
        raise Refusal(400, f"the file {document['filename']!r} is empty", param="file", code="empty_file")
    caller.store.add_file(caller.project, document, is_limited=True)
    sync_folder(folder.parent)
    return document


def _write(source: BinaryIO, file: Path) -> int:
    """Write what was received, and make it durable; returns the bytes."""
    with file.open("xb") as out:
        try:
            shutil.copyfileobj(source, out, 1 << 20)
            out.flush()
            os.fsync(out.fileno())
        except OSError:
            file.unlink()
            raise
        return out.tell()


def _join(parts: list[Path], whole: Path) -> str:
    """Write parts one after the other; returns the md5 of all."""
    digest = hashlib.md5(usedforsecurity=False)
    with whole.open("xb") as out:
        for part in parts:
            with part.open("rb") as piece:
                while data := piece.read(1 << 20):
                    digest.update(data)
                    out.write(data)
        out.flush()
        os.fsync(out.fileno())
    return digest.hexdigest()
