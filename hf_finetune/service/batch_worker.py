"""The worker of a batch: it answers a file of requests with one model, window by window, and goes on after a kill.

Beside what `service.worker` names, the folder of the job holds

    data/input.jsonl                     a link to the upload
    results.jsonl.partial, .partial.json the answers so far, and how many of them count; see `inference.sinks`
    results.jsonl                        one line a request, once all are answered
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from hf_finetune.config.problems import shown
from hf_finetune.data import readers
from hf_finetune.errors import DataError, Problem
from hf_finetune.inference import opening
from hf_finetune.recipe import Recipe
from hf_finetune.run.files import write_atomically
from hf_finetune.service import forms, views, worker
from hf_finetune.service.questions import Event, Heard, Question
from hf_finetune.service.requests import faults
from hf_finetune.service.store import Store, new_id

if TYPE_CHECKING:
    from hf_finetune.service.models import Models

KIND = "batch"
INPUT, RESULTS = "data/input.jsonl", "results.jsonl"
REQUESTS: Mapping[str, type[forms.AnyRequest]] = {
    "/v1/chat/completions": forms.ChatRequest,
    "/v1/completions": forms.CompletionRequest,
    "/v1/classifications": forms.ClassificationRequest,
    "/v1/chat/classifications": forms.ChatClassificationRequest,
}
WINDOW = 64
"""Requests that are answered together; so many are lost by a kill, and answered again."""
MOST = 50_000
"""Requests of a batch, as at OpenAI."""
FAULTS = 100
"""Bad lines that are named."""


def work(job: Mapping[str, Any]) -> None:
    """Answer all requests; the working directory is the folder of the job.

    Raises:
        DataError: Lines of the input are no requests to this model; each is named.
    """
    from hf_finetune.inference import sinks
    from hf_finetune.service.models import Models

    if Path(RESULTS).exists():
        return
    total = _check(job)
    checked = {"chosen": {}, "numbers": {"requests": total}}
    write_atomically(Path(worker.CHECKED), json.dumps(checked), durable=True)
    run = job["run"]
    recipe, loaded = opening.read(run), Models()
    with sinks.opened(RESULTS, {"batch": job["id"]}, restart=False, resumable=True) as output:
        left = islice(_lines(), output.progress.rows, None)
        while lines := list(islice(left, WINDOW)):
            answered = _answered(job["endpoint"], lines, run, recipe, loaded)
            output.progress.rows += len(answered)
            output.progress.faulty += sum(line["response"]["status_code"] != 200 for line in answered)
            output.write("".join(json.dumps(line) + "\n" for line in answered).encode())
        output.finish(sinks.Sink("jsonl", [], {}))


def _lines() -> Iterator[Mapping[str, Any]]:
    """Read the requests."""
    with readers.opened(INPUT, "jsonl") as (found, _):
        yield from (row.cells for row in found)


def _check(job: Mapping[str, Any]) -> int:
    """Count the requests, once each is one to the model of this batch."""
    problems, seen, total = list[Problem](), set[str](), 0
    with readers.opened(INPUT, "jsonl") as (found, _):
        for row in found:
            total += 1
            fault = row.fault or _fault(job, row.cells, seen)
            if fault and len(problems) < FAULTS:
                problems.append(Problem(fault, file=INPUT, line=row.number))
    if not total:
        problems.append(Problem("holds no request", file=INPUT))
    if total > MOST:
        problems.append(Problem(f"holds {total:,} requests, {MOST:,} at most; split it", file=INPUT))
    if problems:
        raise DataError(problems)
    return total


def _fault(job: Mapping[str, Any], request: Mapping[str, Any], seen: set[str]) -> str:
    """Say what is wrong with a line; nothing if it is a request to this model, whatever comes of it."""
    if not isinstance(request.get("body"), dict):
        return "is no {custom_id, method, url, body}"
    name = request.get("custom_id")
    if not isinstance(name, str) or not name:
        return "has no custom_id"
    if name in seen:
        return f"has the custom_id {shown(name)} of an earlier line"
    seen.add(name)
    wanted = {"method": "POST", "url": job["endpoint"]}
    for field, value in wanted.items():
        if request.get(field) != value:
            return f"{field} is {shown(request.get(field))}, not {value}"
    if request["body"].get("model") != job["model"]:
        asked = shown(request["body"].get("model"))
        return f"asks {asked}, and the first line {job['model']}; a batch asks one model"
    return "asks for a stream, which a file can't hold" if request["body"].get("stream") else ""


def _answered(
    endpoint: str, lines: list[Mapping[str, Any]], run: str, recipe: Recipe, loaded: Models
) -> list[dict[str, Any]]:
    """Answer a window of requests; each has an answer or an error."""
    from hf_finetune.service import models

    bodies: dict[int, tuple[int, dict[str, Any]]] = {}
    asked: list[tuple[int, forms.AnyRequest, Question]] = []
    for place, line in enumerate(lines):
        try:
            request = REQUESTS[endpoint].model_validate(line["body"])
            asked.append((place, request, request.question(run, recipe)))
        except ValidationError as error:
            field, said = next(iter(faults((one["loc"], one) for one in error.errors()).items()))
            bodies[place] = 400, _error(f"{field}: {said}", field, None)
        except forms.Unfit as error:
            bodies[place] = 400, _error(str(error), error.param, None)
    heard = [Heard() for _ in asked]

    def say(number: int, event: Event) -> None:
        heard[number].hear(event)

    if asked:
        models.answer(loaded, [question for *_, question in asked], say, lambda _: True)
    for (place, request, _), one in zip(asked, heard, strict=True):
        if one.failed is not None:
            failed = one.failed
            bodies[place] = failed.status, _error(failed.message, failed.param, failed.code)
        else:
            bodies[place] = 200, forms.answer(request, recipe, one)
    return [
        {
            "id": new_id("batch_req_"),
            "custom_id": line["custom_id"],
            "response": {"status_code": bodies[place][0], "request_id": new_id("req_"), "body": bodies[place][1]},
            "error": None,
        }
        for place, line in enumerate(lines)
    ]


def _error(message: str, param: str | None, code: str | None) -> dict[str, Any]:
    return views.error(400, message, param=param, code=code)


def collect(store: Store, job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Make files of the project of the results; returns the fields of the job that name them."""
    kinds: dict[str, list[str]] = {"output": [], "error": []}
    with (folder / RESULTS).open(encoding="utf-8") as stream:
        for line in stream:
            kinds["output" if json.loads(line)["response"]["status_code"] == 200 else "error"].append(line)
    fields: dict[str, Any] = {"counts": {f"{kind}s": len(lines) for kind, lines in kinds.items()}}
    for kind, lines in kinds.items():
        # Their ids follow from the job's: should the service be killed here, there are two still.
        made = f"file-{job['id'].removeprefix('batch_')}{kind[0]}"
        if lines:
            content = "".join(lines).encode()
            store.add_made_file(job["project"], made, f"batch_{kind}.jsonl", "batch_output", content)
        fields[f"{kind}_file_id"] = made if lines else None
    return fields
