"""Resident memory of `hf-finetune predict` while it labels many rows.

python -m benchmarks.predict_memory RUN --rows 100000 [--input FILE.jsonl]

Rows are texts of 3 to 80 words, in any order, or those of a file over and over. Prints one JSON object: rows, seconds,
rows a second, the peak of the resident memory, and that after the first tenth of the rows.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

WORDS = [
    "the",
    "a",
    "film",
    "movie",
    "story",
    "plot",
    "acting",
    "cast",
    "scene",
    "music",
    "is",
    "was",
    "good",
    "great",
    "fine",
    "bad",
    "poor",
    "dull",
    "weak",
    "not",
    "very",
    "so",
]
POLL_S = 0.05


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_folder", metavar="RUN")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--input", help="jsonl whose rows are repeated; by default texts are made up")
    parser.add_argument("--column", default="text")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in.jsonl", Path(folder) / "out.jsonl"
        write(source, arguments.rows, arguments.input, arguments.column)
        print(json.dumps(measure(arguments.run_folder, source, target)))


def write(file: Path, count: int, given: str | None, column: str) -> None:
    """Write so many rows."""
    texts = made_up() if given is None else repeated(Path(given), column)
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            stream.write(json.dumps({"id": number, column: next(texts)}) + "\n")


def made_up() -> Iterator[str]:
    """Texts of 3 to 80 words, the same each time."""
    draw = random.Random(0)
    while True:
        yield " ".join(draw.choices(WORDS, k=draw.randint(3, 80)))


def repeated(file: Path, column: str) -> Iterator[str]:
    """The texts of a file, over and over."""
    texts = [json.loads(line)[column] for line in file.read_text(encoding="utf-8").splitlines()]
    while True:
        yield from texts


def measure(run: str, source: Path, target: Path) -> dict[str, float]:
    """Predict in a process of its own and watch it; memory in bytes.

    Raises:
        CalledProcessError: It failed.
    """
    command = [sys.executable, "-m", "hf_finetune", "--quiet", "predict", run]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "--input", str(source), "--output", str(target)])
    peak, early, state = 0, 0, target.with_name(f"{target.name}.partial.json")
    rows = sum(1 for _ in source.open("rb"))
    while process.poll() is None:
        peak = max(peak, resident(process.pid))
        if not early and done(state) >= rows // 10:
            early = peak
        time.sleep(POLL_S)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    seconds = time.perf_counter() - began
    return {
        "rows": rows,
        "written": sum(1 for _ in target.open("rb")),
        "seconds": round(seconds, 1),
        "rows_per_second": round(rows / seconds, 1),
        "peak_bytes": peak,
        "peak_bytes_after_a_tenth": early,
    }


def resident(pid: int) -> int:
    """Bytes of a process in memory; 0 once it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    found = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    return int(found[0]) * 1024 if found else 0


def done(state: Path) -> int:
    """Rows that are written."""
    try:
        return int(json.loads(state.read_text())["progress"]["rows"])
    except (OSError, ValueError, KeyError):
        return 0


if __name__ == "__main__":
    main()
