"""The objects of the API, as OpenAI's client types have them, made of jobs and of what their run folders hold."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from hf_finetune.service import history

RESULTS = "fine-tune-results"
"""Purpose of files that jobs make."""


def error(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Make the body of an answer with an error; its type says whose fault a status is."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def unplaced(text: str, root: Path, jobs: Iterable[Mapping[str, Any]]) -> str:
    """Put the names that callers know in the place of paths of the host, which runs of these jobs and errors hold."""
    names = {str(root / "runs"): "runs", str(root): ""}
    # Caches and packages lie there; the root of the file system, which may be a home, is in every path.
    names |= {path: "~" for path in (os.path.expanduser("~"), sys.prefix) if path != "/"}  # noqa: PTH111
    for job in jobs:
        base = job["base"]["name"]
        names |= dict.fromkeys((base, os.path.abspath(base), os.path.realpath(base)), job["model"])  # noqa: PTH100
    # Longer ones first: one may begin with another.
    for path in sorted(filter(None, names), key=len, reverse=True):
        for written in {path, escape(path)}:
            text = text.replace(written, names[path])
    return text


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
    if chosen:  # it is a factor of the rate that would be chosen
        known |= {name: 1.0 for name in ("learning_rate_multiplier",) if asked.get(name) == "auto"}
        known |= {"beta": chosen.get("beta")}
    shown = {name: known.get(name) or asked[name] for name in asked}
    method = document.get("method") or "supervised"
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
    reached = history.progress(document, folder) if folder is not None and begun else None
    tokens = document["numbers"].get("splits", {}).get("train", {}).get("all_tokens", 0)
    trained = tokens * document.get("epochs", chosen.get("epochs", 0))
    return {
        "object": "fine_tuning.job",
        **{name: document[name] for name in fields},
        "organization_id": document["project"],
        "status": document["state"],
        "error": document["error"],
        "hyperparameters": {name: value for name, value in shown.items() if name != "beta"},
        "method": {"type": method, method: {"hyperparameters": shown}},
        "result_files": document.get("result_files", []),
        "trained_tokens": int(trained) if document["state"] == "succeeded" else None,
        "estimated_finish": reached and reached["estimated_finish"],
        "progress": reached,
        "integrations": [],
        "metadata": document["metadata"],
        "user_provided_suffix": document["suffix"],
    }


def listed(data: Sequence[dict[str, Any]], *, more: bool) -> dict[str, Any]:
    """Make a list."""
    return {"object": "list", "data": list(data), "has_more": more}


def preview(
    document: dict[str, Any], found: dict[str, Any], root: Path, rate: tuple[float, str] | None
) -> dict[str, Any]:
    """Make what is answered before there is a job; `rate` is as of `history.rate`."""

    def told(texts: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: unplaced(text, root, [document]) if isinstance(text, str) else text for name, text in texts.items()
        }

    # What the host has left is the operator's business.
    numbers = {name: value for name, value in found["numbers"].items() if "free" not in name}
    train, epochs = numbers.get("splits", {}).get("train", {}), found["chosen"].get("epochs")
    if epochs is None and numbers.get("epoch_steps"):
        epochs = numbers["total_steps"] / numbers["epoch_steps"]
    tokens = int(train["all_tokens"] * epochs) if train and epochs else None
    return {
        "object": "fine_tuning.preview",
        **{name: document[name] for name in ("model", "training_file", "validation_file")},
        "valid": found["code"] == 0,
        "findings": [told(finding) for finding in found["findings"]],
        "plan": told({name: text for name, text in found["plan"].items() if name not in ("machine", "disk")}),
        "numbers": numbers,
        "total_steps": numbers.get("total_steps"),
        "trained_tokens": tokens,
        "estimated_seconds": round(tokens / rate[0], 1) if tokens and rate else None,
        "estimated_from": rate[1] if tokens and rate else None,
        "hyperparameters": {**found["chosen"], "epochs": epochs},
        "rows": found["rows"],
    }
