"""The progress of a job, read off its `metrics.jsonl` without reading all of it each time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_finetune.run import journal
from hf_finetune.service import history, worker

NEAR = 1 << 16
"""Bytes at either end of the file that are looked at: many times the longest line."""


def ends(folder: Path) -> tuple[journal.Entry | None, journal.Entry | None]:
    """Read the first and the last training line of a job; None where there is none yet."""
    try:
        with (folder / worker.RUN / "metrics.jsonl").open("rb") as stream:
            head = stream.read(NEAR)
            size = stream.seek(0, 2)
            stream.seek(max(0, size - NEAR))
            tail = stream.read(NEAR)
    except OSError:
        return None, None
    return _train(head.split(b"\n")), _train(reversed(tail.split(b"\n")))


def _train(lines: Any) -> journal.Entry | None:
    for text in lines:
        if b'"phase": "train"' in text:
            try:
                line: journal.Entry = json.loads(text)
            except ValueError:  # half a line, at the edge of what was read
                continue
            return line
    return None


def progress(document: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """Tell the step that a job has reached, of how many, and the Unix time at which it may end; None before."""
    total = document["numbers"].get("total_steps")
    first, last = ends(folder)
    if not total or first is None or last is None:
        return None
    return {"step": last["step"], "total_steps": total, "estimated_finish": history.finish(document, folder)}


def thinned(lines: Sequence[Mapping[str, Any]], most: int) -> list[Mapping[str, Any]]:
    """Keep at most so many lines, evenly, the first and the last among them."""
    if len(lines) <= most:
        return list(lines)
    return [lines[round(index * (len(lines) - 1) / (most - 1))] for index in range(most)]
