"""The price of a commit: a checkpoint of 100 MB against plain write + fsync + SHA-256 of the same bytes.

    python benchmarks/checkpoint_commit.py --folder runs/commit

Both are timed in turn, in pairs whose order alternates, on the disk of `--folder`. The commit is all that `Store.write`
does: free space, staging, files, hashes, fsync, manifest, rename, and the removal of the checkpoint before. Prints one
JSON line: medians in seconds, and the median over the pairs of commit / plain.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hf_finetune.run.ranks import Ranks
from hf_finetune.run.store import Facts, Store

FACTS = Facts(recipe="", data="", model="")


def parse() -> argparse.Namespace:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="on the disk to measure")
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--files", type=int, default=10)
    parser.add_argument("--pairs", type=int, default=7)
    return parser.parse_args()


def plain(folder: Path, contents: dict[str, bytes]) -> None:
    """Write, fsync and hash each file, one after the other, into a new folder."""
    folder.mkdir()
    for name, content in contents.items():
        with (folder / name).open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        hashlib.sha256(content).hexdigest()


def commit(store: Store, step: int, contents: dict[str, bytes]) -> None:
    """Write the same files as a checkpoint."""

    def body(folder: Path) -> None:
        for name, content in contents.items():
            (folder / name).write_bytes(content)

    store.write(step, body, FACTS)


def seconds(work: Callable[[], None]) -> float:
    """How long something takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    """Measure and print."""
    options = parse()
    size = options.megabytes * 1_000_000 // options.files
    contents = {f"file_{number}.bin": random.Random(number).randbytes(size) for number in range(options.files)}
    options.folder.mkdir(parents=True, exist_ok=True)
    times: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        place = Path(name, "plain")
        store = Store(Path(name, "checkpoints"), Ranks(), keep=1)
        for step in range(options.pairs + 1):
            os.sync()
            if step % 2:
                ours = seconds(partial(commit, store, step, contents))
                os.sync()
            theirs = seconds(partial(plain, place, contents))
            if not step % 2:
                os.sync()
                ours = seconds(partial(commit, store, step, contents))
            times.append((ours, theirs))
            shutil.rmtree(place)
    del times[0]  # nothing to rotate there
    result = {
        "commit_s": round(statistics.median(ours for ours, _ in times), 3),
        "plain_s": round(statistics.median(theirs for _, theirs in times), 3),
        "ratio": round(statistics.median(ours / theirs for ours, theirs in times), 2),
        "ratios": [round(ours / theirs, 2) for ours, theirs in times],
    }
    print(json.dumps({**result, **vars(options)}, default=str))


if __name__ == "__main__":
    main()
