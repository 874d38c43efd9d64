"""`/v1/batches`: a file of requests to one model, answered by a job of the same queue."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query

from hf_finetune.service import views, worker
from hf_finetune.service.batch_worker import KIND, RESULTS
from hf_finetune.service.calls import LARGEST, Called, Caller, Refusal
from hf_finetune.service.requests import Body, Metadata
from hf_finetune.service.store import Page, new_id, now

routes = APIRouter()
STATES = {"succeeded": "completed", "running": "in_progress"}


class BatchRequest(Body):
    """A new batch."""

    input_file_id: str
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/classifications", "/v1/chat/classifications"]
    completion_window: Literal["24h"] = "24h"
    metadata: Metadata | None = None


@routes.post("/v1/batches")
def create(caller: Called, body: BatchRequest) -> dict[str, Any]:
    """Queue a batch; its worker checks the file first."""
    file = caller.file(body.input_file_id, "input_file_id")
    source = caller.store.folder_of_file(file["id"]) / "data"
    model = _model(source)
    if model is None:
        message = f"the first line of {file['filename']!r} ({file['purpose']}) is no request: give lines such as "
        example = f'{{"custom_id": "1", "method": "POST", "url": "{body.endpoint}", "body": {{"model": ...}}}}'
        raise Refusal(400, message + example, param="input_file_id", code="invalid_request")
    place = caller.answering(model, "input_file_id")[1].relative_to(caller.store.root / "runs")
    made = new_id("batch_")
    document = {
        **{
            "id": made,
            "kind": KIND,
            "project": caller.project,
            "created_at": now(),
            "finished_at": None,
            "model": model,
        },
        **{"input_file_id": file["id"], "endpoint": body.endpoint, "metadata": body.metadata, "error": None},
        **{"run": f"../{place}", "state": "queued", "wanted": "run", "handle": None, "places": []},
        **{"attempts": 0, "overrides": [], "priority": 0, "base": {"name": model}, "chosen": {}, "numbers": {}},
        **{"fine_tuned_model": None, "digest": "", "hyperparameters": {}, "suffix": None, "told": False},
    }
    worker.link([("input", source, ".jsonl")], caller.store.folder_of_job(made))
    caller.store.add_job({**document, "request_key": None})
    return view(document, caller.store.folder_of_job(made))


@routes.get("/v1/batches")
def list_batches(
    caller: Called, after: str | None = None, limit: Annotated[int, Query(ge=1, le=100)] = 20
) -> dict[str, Any]:
    """List batches, newest first."""
    found, more = caller.store.jobs(caller.project, {}, Page(limit, after), prefix="batch_")
    listed = views.listed([view(one, caller.store.folder_of_job(one["id"])) for one in found], more=more)
    ids = [one["id"] for one in found]
    return {**listed, "first_id": ids[0] if ids else None, "last_id": ids[-1] if ids else None}


@routes.get("/v1/batches/{batch}")
def retrieve(caller: Called, batch: str) -> dict[str, Any]:
    """Describe a batch."""
    return view(_batch(caller, batch), caller.store.folder_of_job(batch))


@routes.post("/v1/batches/{batch}/cancel")
def cancel(caller: Called, batch: str) -> dict[str, Any]:
    """Cancel a batch: it is `cancelled` once its worker is gone."""
    before = _batch(caller, batch)
    changed = caller.store.change(batch, ["queued", "running"], wanted="cancel")
    if changed is None:
        raise Refusal(400, f"the batch is {view(before, None)['status']}: it can't be cancelled", code="invalid_state")
    return view(changed, caller.store.folder_of_job(batch))


def _batch(caller: Caller, batch: str) -> dict[str, Any]:
    found = caller.store.job(batch, caller.project)
    if found is None or found.get("kind") != KIND:
        raise Refusal(404, f"there is no batch {batch!r}", code="not_found")
    return found


def _model(file: Path) -> str | None:
    """Read which model the first request asks."""
    with file.open("rb") as stream:
        head = stream.read(LARGEST)  # no request is longer, and a line may be as long as the file
    try:
        model = json.loads(head.lstrip().partition(b"\n")[0])["body"]["model"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return model if isinstance(model, str) else None


def view(job: dict[str, Any], folder: Path | None) -> dict[str, Any]:
    """Make a `batch`."""
    state, ended = job["state"], job["finished_at"]
    status = STATES.get(state, state)
    if state not in ("succeeded", "failed", "cancelled"):
        status = "cancelling" if job["wanted"] == "cancel" else "in_progress" if state == "running" else "validating"
    fields = ("id", "endpoint", "input_file_id", "created_at", "metadata", "model")
    ends = {f"{name}_at": ended if status == name else None for name in ("completed", "failed", "cancelled")}
    return {
        "object": "batch",
        **{name: job[name] for name in fields},
        "completion_window": "24h",
        "status": status,
        "errors": _errors(job, folder),
        "output_file_id": job.get("output_file_id"),
        "error_file_id": job.get("error_file_id"),
        "request_counts": _counts(job, folder),
        **ends,
    }


def _counts(job: dict[str, Any], folder: Path | None) -> dict[str, int]:
    """Count requests: at the end by the files, before by what the worker has committed."""
    total = job["numbers"].get("requests", 0)
    if "counts" in job:
        return {"total": total, "completed": job["counts"]["outputs"], "failed": job["counts"]["errors"]}
    try:
        assert folder is not None  # noqa: S101 - a folder is given where counts matter
        progress = json.loads((folder / f"{RESULTS}.partial.json").read_bytes())["progress"]
    except (OSError, ValueError, KeyError, AssertionError):
        progress = {"rows": 0, "faulty": 0}
    return {"total": total, "completed": progress["rows"] - progress["faulty"], "failed": progress["faulty"]}


def _errors(job: dict[str, Any], folder: Path | None) -> dict[str, Any] | None:
    """List what is wrong with the file."""
    if job["state"] != "failed" or folder is None:
        return None
    data = [
        {
            "code": "invalid_request",
            "message": views.unplaced(problem["message"], folder.parent.parent, [job]),
            "line": problem["line"],
            "param": None,
        }
        for problem in worker.problems_of(folder)
    ]
    error = job["error"] or {}
    whole = {"code": error.get("code"), "message": error.get("message"), "line": None, "param": None}
    return {"object": "list", "data": data or [whole]}
