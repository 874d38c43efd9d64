"""From the order of a job to its first optimiser step: the service against the command line, in pairs.

    python -m benchmarks.service_latency MODEL DATA [--pairs 5] [key.path=value ...]

The service gets the data and makes a recipe of them; the command line trains that very recipe. Both log each step, and
the first line of `metrics.jsonl` is the first step. Every start is a process of its own, as for a user.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from hf_finetune.config.yamlfile import parse


def main() -> None:
    """Measure, and print a line for each pair, and the medians."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("model", help="Hub id or folder")
    parser.add_argument("data", type=Path, help="rows, as an upload")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="of the recipe of both")
    given = parser.parse_args()
    pairs = []
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Path(folder), given.model, blocks(given.overrides))
        file = service.upload(given.data)
        for number in range(1, given.pairs + 1):
            began = time.time()
            job = service.train(file, seed=number)
            served = first_step(service.root / "runs" / job / "run") - began
            service.until_done(job)
            recipe = service.root / "runs" / job / "recipe.yaml"
            began = time.time()
            run = service.root / f"line-{number}"
            command = [sys.executable, "-m", "hf_finetune", "train", recipe.name, f"output={run}"]
            subprocess.run(command, cwd=recipe.parent, check=True, stdout=subprocess.DEVNULL)
            line = first_step(run) - began
            pairs.append((served, line))
            print(
                f"pair {number}: service {served:.2f} s, command line {line:.2f} s, {served / line:.2f} x", flush=True
            )
        service.close()
    served, line = (statistics.median(values) for values in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"medians of {len(pairs)} pairs: service {served:.2f} s, command line {line:.2f} s, {ratio:.2f} x")


class Service:
    """A server of its own, asked as any client asks it."""

    def __init__(self, folder: Path, model: str, recipe: dict[str, Any]) -> None:
        self.root = folder / "root"
        self.root.mkdir()
        (self.root / "models.yaml").write_text(json.dumps({"base": {"name": model, "recipe": recipe}}))
        command = [sys.executable, "-m", "hf_finetune", "serve", "--root", str(self.root), "--port", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        said = ""
        while (found := re.search(r"(http://\S+/v1)", said)) is None:
            said += next(iter(self._process.stdout or ()))
        self._url, self._key = found[1], re.findall(r"shown once: (\S+)", said)[0]

    def upload(self, data: Path) -> str:
        """Upload rows; returns the id of the file."""
        line = "-" * 20
        head = f'--{line}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--{line}\r\n'
        head += f'Content-Disposition: form-data; name="file"; filename="{data.name}"\r\n\r\n'
        body = head.encode() + data.read_bytes() + f"\r\n--{line}--\r\n".encode()
        return str(self._ask("/files", body, f"multipart/form-data; boundary={line}")["id"])

    def train(self, file: str, seed: int) -> str:
        """Make a job; returns its id."""
        body = json.dumps({"model": "base", "training_file": file, "seed": seed}).encode()
        return str(self._ask("/fine_tuning/jobs", body, "application/json")["id"])

    def until_done(self, job: str) -> None:
        """Wait for the end of a job."""
        while (found := self._ask(f"/fine_tuning/jobs/{job}"))["status"] != "succeeded":
            if found["status"] == "failed":
                raise RuntimeError(found["error"]["message"])
            time.sleep(0.2)

    def close(self) -> None:
        """End the server."""
        self._process.terminate()
        self._process.wait()

    def _ask(self, path: str, body: bytes | None = None, kind: str = "") -> dict[str, Any]:
        headers = {"Authorization": f"Bearer {self._key}", **({"Content-Type": kind} if body else {})}
        with urllib.request.urlopen(urllib.request.Request(self._url + path, body, headers)) as answer:
            found: dict[str, Any] = json.load(answer)
            return found


def first_step(run: Path) -> float:
    """Wait for the first step of a run; returns its time."""
    file = run / "metrics.jsonl"
    while not file.exists() or '"train"' not in file.read_text():
        time.sleep(0.01)
    first = next(json.loads(line) for line in file.read_text().splitlines() if '"train"' in line)
    return float(first["time"])


def blocks(overrides: list[str]) -> dict[str, Any]:
    """Make blocks of a recipe from `key.path=value`."""
    tree: dict[str, Any] = {"training": {"steps": 20, "log_every": 1}}
    for given in overrides:
        *path, last = (words := given.partition("="))[0].split(".")
        block = tree
        for name in path:
            block = block.setdefault(name, {})
        block[last] = parse(f"value: {words[2]}", given).value["value"]
    return tree


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
