"""The past of a job, read from the ends of its files: a page costs what it shows, not what the run logged."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from hf_finetune.run import journal
from hf_finetune.run.store import MANIFEST
from hf_finetune.service import worker

BLOCK = 1 << 16
"""Bytes of a file that are read at once."""
RECENT = 50
"""Lines of training that tell how fast it goes on."""
PHASES = ("train", "eval")
METRICS = Path(worker.RUN, "metrics.jsonl")
EVENTS = "events.jsonl"
CHECKPOINT = ":ckpt-step-"
"""Between the name of a model and the step of a checkpoint, as at OpenAI."""


def backwards(file: Path, end: int | None = None) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file from its end, each with its place; the last one only when it is whole.

    Args:
        file: May be missing.
        end: Where to begin, a place that was yielded; None is the end of the file.
    """
    try:
        stream = file.open("rb")
    except FileNotFoundError:
        return
    with stream:
        size = stream.seek(0, io.SEEK_END)
        begin, held = size if end is None else min(end, size), b""
        is_whole = False
        while begin > 0:
            start = max(0, begin - BLOCK)
            stream.seek(start)
            held, begin = stream.read(begin - start) + held, start
            stop = len(held)
            while (cut := held.rfind(b"\n", 0, stop)) >= 0:
                if is_whole:
                    yield begin + cut + 1, held[cut + 1 : stop]
                stop, is_whole = cut, True
            held = held[:stop]
        if is_whole:
            yield 0, held


def events(job: str, folder: Path, after: str | None, limit: int) -> tuple[list[dict[str, Any]], bool]:
    """List the events of a job, newest first: what the service says of it, and each line of metrics.

    The id of an event holds its place in both files, so that the next page begins there.

    Args:
        job: The id.
        folder: Of the job.
        after: Id of the event before the page; one that is not of this job has nothing after it.
        limit: Most events.

    Returns:
        The page, and whether there are more.
    """
    identity = job.removeprefix("ftjob-")
    ends: list[int | None] = [None, None]
    if after is not None:
        try:
            own, said, measured = after.removeprefix("ftevent-").split("-")
            ends = [int(said, 16), int(measured, 16)]
        except ValueError:
            return [], False
        if own != identity:
            return [], False
    lines = [backwards(folder / EVENTS, ends[0]), backwards(folder / METRICS, ends[1])]
    heads = [_said(lines[0]), _measured(lines[1])]
    found: list[dict[str, Any]] = []
    while any(head is not None for head in heads) and len(found) <= limit:
        times = [-1.0 if head is None else head[1] for head in heads]
        newest = 0 if times[0] >= times[1] else 1
        head = heads[newest]
        if head is None:  # a clock that stood at 1970
            newest = 1 - newest
            head = heads[newest]
        assert head is not None  # noqa: S101 - one of both is there
        # Ends of what is older stay where they are when lines are added, and so does the id.
        places = [0 if older is None else older[3] for older in heads]
        places[newest] = head[0]
        name = f"ftevent-{identity}-{places[0]:x}-{places[1]:x}"
        found.append({"object": "fine_tuning.job.event", "id": name, **head[2]})
        heads[newest] = _said(lines[0]) if newest == 0 else _measured(lines[1])
    return found[:limit], len(found) > limit


Head = tuple[int, float, dict[str, Any], int] | None
"""Place, time, the event, and where its line ends."""


def _said(lines: Iterator[tuple[int, bytes]]) -> Head:
    for place, text in lines:
        try:
            line = json.loads(text)
            event = {name: line[name] for name in ("created_at", "level", "message")}
        except (ValueError, KeyError, TypeError):
            continue
        shown = {**event, "type": "message", "data": {}}
        return place, line.get("time", event["created_at"]), shown, place + len(text) + 1
    return None


def _measured(lines: Iterator[tuple[int, bytes]]) -> Head:
    for place, text in lines:
        line = journal.parse(text)
        if line is None or line["phase"] not in PHASES:
            continue
        shown = ", ".join(f"{key.replace('_', ' ')}={value:.4g}" for key, value in _named(line).items())
        event = {"created_at": int(line["time"]), "level": "info", "message": f"Step {line['step']}: {shown}"}
        return place, line["time"], {**event, "type": "metrics", "data": metrics(line)}, place + len(text) + 1
    return None


def _named(line: dict[str, Any]) -> dict[str, float]:
    """Name the numbers of a line as OpenAI does, and ours beside them."""
    names = {"train": {"loss": "train_loss", "token_accuracy": "train_mean_token_accuracy"}}
    names["eval"] = {"loss": "full_valid_loss", "token_accuracy": "full_valid_mean_token_accuracy"}
    own = names[line["phase"]]
    kept = {own[name]: line[name] for name in own if line.get(name) is not None}
    if line["phase"] == "eval":
        more = ("accuracy", "f1_macro", "perplexity", "mse", "exact_match")
        kept |= {f"valid_{name}": line[name] for name in more if line.get(name) is not None}
    return kept


def metrics(line: dict[str, Any]) -> dict[str, Any]:
    """Give the numbers of a line; JSON has none that are infinite."""
    return {"step": line["step"], **{name: value for name, value in _named(line).items() if isfinite(value)}}


def results(folder: Path) -> str:
    """Write the metrics of a run as OpenAI's result file has them; cells where nothing was measured are empty."""
    columns = {"train_loss": "train_loss", "train_accuracy": "train_mean_token_accuracy"}
    columns |= {"valid_loss": "full_valid_loss", "valid_mean_token_accuracy": "full_valid_mean_token_accuracy"}
    steps: dict[int, dict[str, Any]] = {}
    for line in journal.read(folder / METRICS):
        if line["phase"] in PHASES:
            steps.setdefault(line["step"], {}).update(metrics(line))
    own = sorted({name for found in steps.values() for name in found} - {"step", *columns.values()})
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["step", *columns, *own])
    for step, found in sorted(steps.items()):
        table.writerow([step, *(found.get(name, "") for name in (*columns.values(), *own))])
    return text.getvalue()


def entries(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of metrics of a run, newest first."""
    found = (journal.parse(text) for _, text in backwards(folder / METRICS))
    yield from (line for line in found if line is not None and line["phase"] in PHASES)


def epochs(folder: Path) -> float:
    """Tell how often a run has seen its rows."""
    return float(next(entries(folder), {}).get("epoch", 0.0))


def steps(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of training of a run, newest first."""
    return (line for line in entries(folder) if line["phase"] == "train")


def rate(jobs: Iterable[tuple[Mapping[str, Any], Path]]) -> tuple[float, str] | None:
    """Tell the tokens a second of the first of these jobs that says so, steps of training alone, and its id."""
    for document, folder in jobs:
        _, text = next(backwards(folder / METRICS), (0, b""))
        line = journal.parse(text)
        if line is not None and line["phase"] == "summary" and line.get("tokens_per_second"):
            return line["tokens_per_second"], document["id"]
    return None


def progress(document: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """Tell the step that a job has reached, of how many, and the Unix time at which it may end; None before."""
    total = document["numbers"].get("total_steps")
    lines = list(islice(steps(folder), RECENT)) if total else []
    if not lines:
        return None
    finish = _finish(lines, total) if document["state"] == "running" else None
    return {"step": lines[0]["step"], "total_steps": total, "estimated_finish": finish}


def _finish(lines: Sequence[Mapping[str, Any]], total: int) -> int | None:
    """Estimate when a run ends, by the time of its last steps; pauses do not count."""
    paces = [
        (later["time"] - line["time"]) / (later["step"] - line["step"])
        for later, line in pairwise(lines)
        if later["step"] > line["step"]
    ]
    return int(lines[0]["time"] + median(paces) * (total - lines[0]["step"])) if paces else None


def model_of(document: Mapping[str, Any]) -> str:
    """Name the model of a job as OpenAI does: `ft:BASE:ORG:SUFFIX:ID`."""
    identity = document["id"].removeprefix("ftjob-")
    return f"ft:{document['model']}:{document['project']}:{document['suffix'] or ''}:{identity}"


def kept(document: Mapping[str, Any], folder: Path) -> dict[str, Path]:
    """Find the committed checkpoints of a job by the names that they have as models, the oldest first."""
    found = (folder / worker.RUN / "checkpoints").glob(f"checkpoint-*/{MANIFEST}")
    steps = {int(file.parent.name.removeprefix("checkpoint-")): file.parent for file in found}
    return {f"{model_of(document)}{CHECKPOINT}{step}": steps[step] for step in sorted(steps)}


def checkpoints(document: dict[str, Any], folder: Path, after: str | None, limit: int) -> tuple[list[Any], bool]:
    """List the committed checkpoints of a job, newest first; returns a page, and whether there are more."""
    identity = document["id"].removeprefix("ftjob-")
    steps = {int(name.rpartition("-")[2]): (name, place) for name, place in kept(document, folder).items()}
    listed = sorted(steps, reverse=True)
    if after is not None:
        last = re.fullmatch(r"ftckpt_.*_([0-9]{1,18})", after)
        listed = [step for step in listed if last is not None and step < int(last[1])]
    page = listed[:limit]
    measured: dict[int, dict[str, Any]] = {step: {"step": step} for step in page}
    for line in entries(folder):
        if not page or line["step"] < page[-1]:
            break
        if line["step"] in measured:
            measured[line["step"]] |= metrics(line)
    found = [
        {
            "id": f"ftckpt_{identity}_{step}",
            "object": "fine_tuning.job.checkpoint",
            "created_at": int((steps[step][1] / MANIFEST).stat().st_mtime),
            "fine_tuned_model_checkpoint": steps[step][0],
            "fine_tuning_job_id": document["id"],
            "step_number": step,
            "metrics": measured[step],
        }
        for step in page
    ]
    return found, len(listed) > limit
