"""Runs whose events the tests of the board read, and how they read them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EVERYTHING = {"scalars": 0, "tensors": 0, "images": 0, "histograms": 0}
PHASES = {"train", "eval", "final", "test", "summary"}


def events_of(folder: Path) -> Any:
    """All events of a run, by TensorBoard's own reader."""
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance=EVERYTHING)
    events.Reload()
    return events


def texts(folder: Path, tag: str) -> list[str]:
    """What stands under a tag of the Text tab."""
    return [event.tensor_proto.string_val[0].decode() for event in events_of(folder).Tensors(f"{tag}/text_summary")]


def shown(folder: Path) -> dict[str, Any]:
    """Everything that TensorBoard shows of a run, comparable."""
    events = events_of(folder)
    found: dict[str, Any] = {}
    for tag in events.Tags()["scalars"]:
        # Weights are drawn a moment before the line of their step.
        timed = tag.partition("/")[0].removeprefix("zoom_").removesuffix("_per_class") in PHASES
        found[tag] = [(event.step, event.wall_time if timed else 0, event.value) for event in events.Scalars(tag)]
    for tag in events.Tags()["tensors"]:
        found[tag] = [(event.step, event.tensor_proto.SerializeToString()) for event in events.Tensors(tag)]
    for tag in events.Tags()["images"]:
        found[f"image {tag}"] = [(event.step, event.encoded_image_string) for event in events.Images(tag)]
    for tag in events.Tags()["histograms"]:
        found[f"histogram {tag}"] = [(event.step, event.histogram_value) for event in events.Histograms(tag)]
    found["hparams"] = sorted(events.PluginTagToContent("hparams").items())
    projector = folder / "tensorboard" / "projector_config.pbtxt"
    found["projector"] = projector.read_text() if projector.exists() else ""
    return found


class Told(list[str]):
    """Warnings, and a disk that hangs."""

    @staticmethod
    def pipe(folder: Path) -> Callable[[], str]:
        """A file that nobody reads: whoever opens it to write waits."""
        os.mkfifo(folder / "fifo")
        return lambda: str(folder / "fifo")

    @staticmethod
    def read(folder: Path) -> None:
        """Read what comes, for a moment."""
        with (folder / "fifo").open("rb") as stream:
            stream.read(1)

    @staticmethod
    @contextmanager
    def within(seconds: float) -> Iterator[None]:
        """What happens inside takes less than so many seconds."""
        started = time.monotonic()
        yield
        assert time.monotonic() - started < seconds
