"""R0: what was killed and run again equals, bit for bit, what was never killed, and was really continued."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from faults.lab import Ended, Job, Lab
from hf_finetune.run.journal import MEASURED

CLOCK = {*MEASURED, "padding_share"}
"""Numbers that depend on the clock, the machine, or how many processes a run was spread over."""


def exact(line: dict[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl with its floats in hex, without those of the clock."""
    hexed = {key: value.hex() if isinstance(value, float) else value for key, value in line.items()}
    return {key: value for key, value in hexed.items() if not any(word in key for word in CLOCK)}


def adapter_hash(job: Job) -> str:
    """SHA-256 of the adapter's weights (of the whole model where there is no adapter)."""
    file = next((job.run / "adapter").glob("*model.safetensors"))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def tensors(path: Path) -> dict[str, Any]:
    """Every tensor and number of an optimiser's state, by its path in it."""
    found: dict[str, Any] = {}

    def walk(value: Any, at: str) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, f"{at}/{key}")
        elif isinstance(value, list | tuple):
            for index, inner in enumerate(value):
                walk(inner, f"{at}/{index}")
        else:
            found[at] = value

    walk(torch.load(path, weights_only=True), "")
    return found


def same_optimizer(one: Path, other: Path) -> None:
    """Compare two optimisers' states bit for bit."""
    left, right = tensors(one), tensors(other)
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert torch.equal(value, right[key]) if isinstance(value, torch.Tensor) else value == right[key], key


def same(job: Job, reference: Job) -> None:
    """Compare two finished runs bit for bit."""
    steps = [line["step"] for line in job.lines("train")]
    assert steps == [line["step"] for line in reference.lines("train")]
    for line, expected in zip(job.lines(), reference.lines(), strict=True):
        assert exact(line) == exact(expected), f"{line} is not {expected}"
    assert adapter_hash(job) == adapter_hash(reference)
    assert job.checkpoints == reference.checkpoints
    if job.checkpoints:
        last = job.checkpoints[-1]
        same_optimizer(job.checkpoint(last) / "optimizer.pt", reference.checkpoint(last) / "optimizer.pt")


def clean(job: Job) -> None:
    """Nothing half-done is left, and the status is right."""
    left = [
        path.name
        for path in job.run.rglob(".*")
        if path.name not in (".lock", ".ranks") and "tensorboard" not in path.parts
    ]
    assert left == []
    status = job.status
    assert (status["state"], status["exit_code"]) == ("done", 0)


def resume(lab: Lab, job: Job, *, at: int | None, before: str | None = None, plugins: tuple[Any, ...] = ()) -> Ended:
    """Run the same command again, to its end, and hold it to R0.

    Args:
        at: Step that it must go on from; 0 from the beginning; None wherever it says.
        before: metrics.jsonl as it was before; None reads it now.
    """
    file = job.run / "metrics.jsonl"
    text = before if before is not None else file.read_text() if file.exists() else ""
    ended = job.go(*plugins)
    assert ended.codes == [0] * job.ranks, ended.output
    step = resumed_at(ended.output)
    if at is not None:
        assert step == at, ended.output
    assert file.read_text().startswith("".join(lines_until(text, step)))
    finished(lab, job)
    return ended


def finished(lab: Lab, job: Job) -> None:
    """R0, for a run that is at its end."""
    same(job, lab.reference(job.overrides, job.ranks))
    clean(job)


def resumed_at(output: str) -> int:
    """The step that a run says it goes on from; 0 where it says nothing."""
    found = re.findall(r"resuming from \S*/checkpoints/checkpoint-(\d+) at step (\d+)", output)
    assert len(found) <= 1, output
    assert all(name == step for name, step in found)
    return int(found[0][1]) if found else 0


def lines_until(text: str, step: int) -> list[str]:
    """Whole lines of the steps up to one; none before the first step, where everything begins anew."""
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in lines if step and json.loads(line)["step"] <= step]


def readable(job: Job) -> None:
    """TensorBoard's own reader sees each step of metrics.jsonl once, with its value."""
    events = EventAccumulator(str(job.run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    for phase, key in (("train", "loss"), ("eval", "loss")):
        lines = {line["step"]: line[key] for line in job.lines(phase)}
        seen = events.Scalars(f"{phase}/{key}") if lines else []
        steps = [event.step for event in seen]
        assert steps == list(lines), f"TensorBoard reads {phase}/{key} of {steps}"
        assert all(abs(event.value - lines[event.step]) <= 1e-6 * abs(lines[event.step]) for event in seen)
