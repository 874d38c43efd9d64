"""The objects of the API, as OpenAI's client types have them, made of jobs and of what their run folders hold."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_finetune.run import journal
from hf_finetune.run.store import MANIFEST
from hf_finetune.service import progress, worker

RESULTS = "fine-tune-results"
"""Purpose of files that jobs make."""


def file(document: dict[str, Any]) -> dict[str, Any]:
    """Make a `file`."""
    fields = ("id", "bytes", "created_at", "filename", "purpose", "expires_at")
    return {"object": "file", "status": "processed"} | {name: document[name] for name in fields if name in document}


def model(name: str, created: int, owner: str) -> dict[str, Any]:
    """Make a `model`."""
    return {"id": name, "object": "model", "created": created, "owned_by": owner}


def job(document: dict[str, Any], folder: Path | None = None) -> dict[str, Any]:
    """Make a `fine_tuning.job`; with its folder, what is known of its progress, too."""
    asked, chosen = document["hyperparameters"], document["chosen"]
    known = {"n_epochs": chosen and max(1, round(chosen["epochs"])), "batch_size": chosen.get("batch_size")}
    shown = {name: known.get(name) or asked[name] for name in asked}
    fields = (
        "id",
        "created_at",
        "finished_at",
        "model",
        "fine_tuned_model",
        "training_file",
        "validation_file",
        "seed",
    )
    begun = folder is not None and document["state"] in ("queued", "running", "paused")
    reached = progress.progress(document, folder) if folder is not None and begun else None
    trained = document["numbers"].get("splits", {}).get("train", {}).get("trained_items", 0) * chosen.get("epochs", 0)
    return {
        "object": "fine_tuning.job",
        **{name: document[name] for name in fields},
        "organization_id": document["project"],
        "status": document["state"],
        "error": document["error"],
        "hyperparameters": shown,
        "method": {"type": "supervised", "supervised": {"hyperparameters": shown}},
        "result_files": document.get("result_files", []),
        "trained_tokens": int(trained) if document["state"] == "succeeded" else None,
        "estimated_finish": reached and reached["estimated_finish"],
        "progress": reached,
        "integrations": [],
        "metadata": document["metadata"],
        "user_provided_suffix": document["suffix"],
    }


def events(name: str, folder: Path) -> list[dict[str, Any]]:
    """List the events of a job, newest first: what the service says of it, and each line of metrics."""
    found = []
    file = folder / "events.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for number, line in enumerate(lines):
        event = json.loads(line)
        found.append({**event, "id": f"ftevent-{name.removeprefix('ftjob-')}-m{number}", "type": "message", "data": {}})
    for number, measured in enumerate(journal.read(folder / worker.RUN / "metrics.jsonl")):
        if measured["phase"] in ("train", "eval"):
            metrics = _metrics(measured)
            shown = ", ".join(f"{key.replace('_', ' ')}={value:.4g}" for key, value in metrics.items() if key != "step")
            said = f"Step {measured['step']}: {shown}"
            event = {"created_at": int(measured["time"]), "level": "info", "message": said}
            more = {"id": f"ftevent-{name.removeprefix('ftjob-')}-s{number}", "type": "metrics", "data": metrics}
            found.append({**event, **more})
    found = [{"object": "fine_tuning.job.event", **event} for event in found]
    return sorted(found, key=lambda event: event["created_at"], reverse=True)


def _metrics(line: dict[str, Any]) -> dict[str, Any]:
    """Name the numbers of a line as OpenAI does, and ours beside them."""
    names = {"train": {"loss": "train_loss", "token_accuracy": "train_mean_token_accuracy"}}
    names["eval"] = {"loss": "full_valid_loss", "token_accuracy": "full_valid_mean_token_accuracy"}
    own = names[line["phase"]]
    kept = {own[name]: line[name] for name in own if line.get(name) is not None}
    if line["phase"] == "eval":
        more = ("accuracy", "f1_macro", "perplexity", "mse", "exact_match")
        kept |= {f"valid_{name}": line[name] for name in more if line.get(name) is not None}
    return {"step": line["step"], **kept}


def results(folder: Path) -> str:
    """Write the metrics of a run as OpenAI's result file has them; cells where nothing was measured are empty."""
    columns = {"train_loss": "train_loss", "train_accuracy": "train_mean_token_accuracy"}
    columns |= {"valid_loss": "full_valid_loss", "valid_mean_token_accuracy": "full_valid_mean_token_accuracy"}
    steps: dict[int, dict[str, Any]] = {}
    for line in journal.read(folder / worker.RUN / "metrics.jsonl"):
        if line["phase"] in ("train", "eval"):
            steps.setdefault(line["step"], {}).update(_metrics(line))
    own = sorted({name for found in steps.values() for name in found} - {"step", *columns.values()})
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["step", *columns, *own])
    for step, found in sorted(steps.items()):
        table.writerow([step, *(found.get(name, "") for name in (*columns.values(), *own))])
    return text.getvalue()


def checkpoints(document: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """List the committed checkpoints of a job, newest first."""
    run = folder / worker.RUN
    measured: dict[int, dict[str, Any]] = {}
    for line in journal.read(run / "metrics.jsonl"):
        if line["phase"] in ("train", "eval"):
            measured.setdefault(line["step"], {}).update(_metrics(line))
    steps = []
    for path in (run / "checkpoints").glob("checkpoint-*"):
        if (path / MANIFEST).exists():
            steps.append((int(path.name.removeprefix("checkpoint-")), path))
    identity = document["id"].removeprefix("ftjob-")
    name = document["fine_tuned_model"] or f"ft:{document['model']}:{document['project']}::{identity}"
    return [
        {
            "id": f"ftckpt_{identity}_{step}",
            "object": "fine_tuning.job.checkpoint",
            "created_at": int((path / MANIFEST).stat().st_mtime),
            "fine_tuned_model_checkpoint": f"{name}:ckpt-step-{step}",
            "fine_tuning_job_id": document["id"],
            "step_number": step,
            "metrics": measured.get(step, {"step": step}),
        }
        for step, path in sorted(steps, reverse=True)
    ]


def listed(data: Sequence[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """Make a list."""
    return {"object": "list", "data": list(data), "has_more": more}


def paged(found: Sequence[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """Make the page of a list that comes after an entry; of one that is not there, an empty page."""
    start = 0 if after is None else next((n + 1 for n, one in enumerate(found) if one["id"] == after), len(found))
    return listed(found[start : start + limit], more=start + limit < len(found))
