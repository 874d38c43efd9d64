"""Endpoints of webhooks, as OpenAI's client manages them: a URL, and the types of events that are sent to it."""

from __future__ import annotations

import json
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from pydantic import Field

from hf_finetune.run.files import discard, sync_folder, write_atomically
from hf_finetune.service import delivery, egress, outbox, views
from hf_finetune.service.calls import Called, Caller, Refusal
from hf_finetune.service.outbox import EventType
from hf_finetune.service.requests import Body
from hf_finetune.service.store import Page, Store, locked, new_id, now
from hf_finetune.service.tables import ENDPOINTS, OUTBOX

routes = APIRouter()
AGAIN = 60
"""Seconds in which a request that a client sends again makes no second endpoint or secret."""
DAY = 24 * 3600
AT_ONCE = 4
"""Requests that may look up names or call endpoints at the same time: others wait for them in threads."""
_outward = threading.BoundedSemaphore(AT_ONCE)

Types = Annotated[list[EventType], Field(min_length=1, max_length=100)]
Name = Annotated[str, Field(min_length=1, max_length=200)]
Url = Annotated[str, Field(min_length=1, max_length=2000)]


class EndpointRequest(Body):
    """A new endpoint."""

    event_types: Types
    name: Name
    url: Url


class EndpointChange(Body):
    """The new values of an endpoint; fields that are left out stay."""

    event_types: Types | None = None
    name: Name | None = None
    url: Url | None = None


class Rotation(Body):
    """A new secret."""

    keep_old_secret_active_for_24_hours: bool = False


class Sample(Body):
    """An event to try an endpoint with."""

    event_type: EventType


@routes.get("/v1/webhook_event_types")
def list_types(caller: Called) -> dict[str, Any]:
    """List the types of events."""
    return {"object": "list", "data": list(outbox.TYPES)}


@routes.post("/v1/webhook_endpoints")
def create(caller: Called, body: EndpointRequest, x_stainless_retry_count: Annotated[int, Header()] = 0) -> Any:
    """Make an endpoint; the answer has its secret."""
    store, when = caller.store, now()
    _check(caller, body.url)
    said = {"name": body.name, "url": body.url}
    if x_stainless_retry_count:
        for latest in _page(caller, Page(20))[0]:
            is_equal = said.items() <= latest.items() and list(latest["event_types"]) == _unique(body.event_types)
            if is_equal and when - latest["created_at"] <= AGAIN:
                return _view(store, latest, has_secret=True)
    _make_key(store)
    document: dict[str, Any] = {
        **{"id": new_id("we_"), "project": caller.project, "created_at": when, "updated_at": when, **said},
        **{"event_types": dict.fromkeys(_unique(body.event_types), when), "secret": 0, "rotated_at": 0, "old_until": 0},
    }
    answer = _view(store, document, has_secret=True)
    with store.engine.begin() as connection:
        connection.execute(ENDPOINTS.insert().values(outbox.row_of(document)))
        store.refuse_over(connection, caller.project, "webhooks")
        folder = store.root / "webhooks" / document["id"]
        folder.mkdir()
        write_atomically(folder / "endpoint.json", json.dumps(document), durable=True)
    return answer


@routes.get("/v1/webhook_endpoints")
def list_endpoints(
    caller: Called, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> dict[str, Any]:
    """List endpoints, newest first."""
    found, more = _page(caller, Page(limit, after))
    ids = [one["id"] for one in found]
    listed = views.listed([_view(caller.store, one) for one in found], more=more)
    return {**listed, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}


@routes.get("/v1/webhook_endpoints/{endpoint}")
def retrieve(caller: Called, endpoint: str) -> dict[str, Any]:
    """Describe an endpoint."""
    return _view(caller.store, _endpoint(caller, endpoint))


@routes.post("/v1/webhook_endpoints/{endpoint}")
def update(caller: Called, endpoint: str, body: EndpointChange) -> dict[str, Any]:
    """Change an endpoint; events that wait for it are sent to its new URL."""
    _endpoint(caller, endpoint)
    if body.url is not None:
        _check(caller, body.url)
    with _changed(caller, endpoint) as document:
        document |= body.model_dump(include={"name", "url"}, exclude_none=True)
        if body.event_types is not None:
            since = document["event_types"]
            document["event_types"] = {one: since.get(one, now()) for one in _unique(body.event_types)}
    return _view(caller.store, document)


@routes.delete("/v1/webhook_endpoints/{endpoint}")
def delete(caller: Called, endpoint: str) -> dict[str, Any]:
    """Delete an endpoint; events that wait for it are not delivered any more."""
    _endpoint(caller, endpoint)
    folder = caller.store.root / "webhooks" / endpoint
    # First what `--rebuild` would bring it back by.
    (folder / "endpoint.json").unlink(missing_ok=True)
    with caller.store.engine.begin() as connection:
        connection.execute(ENDPOINTS.delete().where(ENDPOINTS.c.id == endpoint))
        connection.execute(OUTBOX.delete().where(OUTBOX.c.endpoint == endpoint))
    discard(folder)
    return {"id": endpoint, "object": "webhook_endpoint.deleted", "deleted": True}


@routes.post("/v1/webhook_endpoints/{endpoint}/rotate_secret")
def rotate_secret(
    caller: Called, endpoint: str, body: Rotation | None = None, x_stainless_retry_count: Annotated[int, Header()] = 0
) -> dict[str, Any]:
    """Replace the secret of an endpoint; for a day, events may be signed with both."""
    with _changed(caller, endpoint) as document:
        # The answer to an earlier try may have been lost: another rotation would drop the secret that is kept.
        if not x_stainless_retry_count or now() - document["rotated_at"] > AGAIN:
            keeps = body is not None and body.keep_old_secret_active_for_24_hours
            document |= {"secret": document["secret"] + 1, "rotated_at": now(), "old_until": now() + DAY * keeps}
    return _view(caller.store, document, has_secret=True)


@routes.post("/v1/webhook_endpoints/{endpoint}/test")
def test(caller: Called, endpoint: str, body: Sample) -> dict[str, Any]:
    """Send a sample at once, and tell how the endpoint answered."""
    document = _endpoint(caller, endpoint)
    kind = "batch_test" if body.event_type.startswith("batch") else "ftjob-test"
    event = {"event": new_id("evt_test_"), "type": body.event_type, "subject": kind}
    with _refusing():
        status = delivery.send(caller.store, document, event, now())
    result = {"event_type": body.event_type, "status_code": status, "success": True}
    return {"object": "webhook_endpoint.test", "webhook_endpoint_id": endpoint, **result}


def _page(caller: Caller, page: Page) -> tuple[list[dict[str, Any]], bool]:
    with caller.store.engine.connect() as connection:
        return page.of(connection, ENDPOINTS, ENDPOINTS.c.project == caller.project)


def _endpoint(caller: Caller, endpoint: str) -> dict[str, Any]:
    fits = (ENDPOINTS.c.id == endpoint) & (ENDPOINTS.c.project == caller.project)
    found = caller.store.document(ENDPOINTS, fits)
    if found is None:
        raise Refusal(404, f"there is no webhook endpoint {endpoint!r}", code="not_found")
    return found


@contextmanager
def _changed(caller: Caller, endpoint: str) -> Iterator[dict[str, Any]]:
    """Give the document of an endpoint, and keep what is changed of it."""
    fits = (ENDPOINTS.c.id == endpoint) & (ENDPOINTS.c.project == caller.project)
    with caller.store.engine.begin() as connection:
        # Writing first takes the lock, in every database.
        if not connection.execute(ENDPOINTS.update().where(fits).values(project=caller.project)).rowcount:
            raise Refusal(404, f"there is no webhook endpoint {endpoint!r}", code="not_found")
        row = connection.execute(ENDPOINTS.select().where(fits)).mappings().one()
        document = json.loads(row["document"])
        yield document
        if document != json.loads(row["document"]):
            document["updated_at"] = now()
            folder = caller.store.root / "webhooks" / endpoint
            write_atomically(folder / "endpoint.json", json.dumps(document), durable=True)
            connection.execute(ENDPOINTS.update().where(fits).values(outbox.row_of(document)))


def _view(store: Store, document: dict[str, Any], *, has_secret: bool = False) -> dict[str, Any]:
    """Make a `webhook_endpoint`."""
    fields = ("id", "created_at", "updated_at", "name", "url")
    shown = {"object": "webhook_endpoint", **{name: document[name] for name in fields}}
    secret = delivery.secret(store.root, document)
    shown |= {"event_types": list(document["event_types"]), "signing_secret_hint": f"whsec_...{secret[-5:]}"}
    return {**shown, "signing_secret": secret} if has_secret else shown


def _unique(types: list[Any]) -> list[str]:
    return list(dict.fromkeys(types))


def _check(caller: Caller, url: str) -> None:
    """Refuse a URL that may not be called."""
    with _refusing(param="url"):
        egress.check(url, caller.store.limits().webhooks.networks)


@contextmanager
def _refusing(param: str | None = None) -> Iterator[None]:
    """Look outward, a few at a time, and refuse what can't be reached."""
    if not _outward.acquire(blocking=False):
        headers = {"retry-after": "2"}
        raise Refusal(429, f"{AT_ONCE} endpoints are being tried; try again in a moment", headers=headers)
    try:
        yield
    except egress.Unreachable as error:
        raise Refusal(400, f"the endpoint can't be reached: {error}", param=param, code="unreachable") from None
    finally:
        _outward.release()


def _make_key(store: Store) -> None:
    """Make the key of all secrets with the first endpoint; one that is lost later is never replaced in silence."""
    file = store.root / delivery.KEY
    with locked(store.root / "schema.lock"):
        if file.exists() or next((store.root / "webhooks").glob("*/endpoint.json"), None):
            return
        temporary = file.with_suffix(".new")
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as stream:
            stream.write(secrets.token_bytes(delivery.KEY_BYTES))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
        sync_folder(store.root)
