"""Many clients at once against a server on the loopback: latency, errors, and memory of the server.

    python -m benchmarks.service_load [--clients 200] [--seconds 60] [--pause 1]

Each client uploads a file, creates a job and pauses it, so that none trains, and then lists and polls in turn, with a
pause between two requests as people's scripts have. Prints one JSON object, and exits with 1 where an answer was 5xx.
Client and server share the machine: the times hold the client's own part.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median, quantiles
from typing import Any

BOUNDARY = "a-boundary-of-this-benchmark"


class Client:
    """One connection, kept open."""

    def __init__(self, port: int, key: str) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        self.headers = {"authorization": f"Bearer {key}"}
        self.seen: list[tuple[str, int, float]] = []

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """Send a request, again where the server is busy, and remember how long each took."""
        headers = dict(self.headers)
        if isinstance(body, bytes):
            headers["content-type"] = f"multipart/form-data; boundary={BOUNDARY}"
        elif body is not None:
            body, headers["content-type"] = json.dumps(body).encode(), "application/json"
        for attempt in range(20):
            begun = time.perf_counter()
            self.connection.request(method, path, body, headers)
            answer = self.connection.getresponse()
            content = answer.read()
            self.seen.append((method, answer.status, time.perf_counter() - begun))
            if answer.status != 429:
                break
            time.sleep(min(4, 0.5 * 2**attempt) * random.uniform(0.75, 1))  # as OpenAI's client does
        return json.loads(content)

    def begin(self, model: str) -> str:
        """Upload, create and pause."""
        form = (
            f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="file"; filename="train.csv"\r\n\r\n'
            f"text,label\ngood,1\nbad,0\n\r\n--{BOUNDARY}--\r\n"
        )
        file = self.ask("POST", "/v1/files", form.encode())
        job = self.ask("POST", "/v1/fine_tuning/jobs", {"model": model, "training_file": file["id"]})
        self.ask("POST", f"/v1/fine_tuning/jobs/{job['id']}/pause")
        return str(job["id"])

    def work(self, until: float, pause: float, model: str) -> None:
        """List and poll until the time is over."""
        time.sleep(random.random() * pause * 3)  # they do not all begin at once
        job = self.begin(model)
        paths = (f"/v1/fine_tuning/jobs/{job}", "/v1/fine_tuning/jobs", f"/v1/fine_tuning/jobs/{job}/events")
        turn = 0
        while time.monotonic() < until:
            self.ask("GET", paths[turn % len(paths)])
            turn += 1
            time.sleep(pause * random.uniform(0.5, 1.5))


def serve(root: Path) -> tuple[subprocess.Popen[str], int, str]:
    """Start a server; returns it, its port and its key."""
    (root / "models.yaml").write_text("tiny: a-model-that-no-job-loads\n")
    command = [sys.executable, "-m", "hf_finetune", "serve", "--root", str(root), "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=(root / "requests.log").open("w"), text=True)
    assert server.stdout is not None
    said = server.stdout.readline() + server.stdout.readline()
    found = re.search(r"shown once: (hf-\S+)\n.*?http://127.0.0.1:(\d+)", said)
    assert found, said
    return server, int(found[2]), found[1]


def resident(pid: int) -> float:
    """MiB of memory that a process holds."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def processor(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(clients: int, seconds: float, pause: float) -> dict[str, Any]:
    """Run the clients; times in milliseconds, memory in MiB."""
    with tempfile.TemporaryDirectory() as scratch:
        server, port, key = serve(Path(scratch))
        try:
            asking = [Client(port, key) for _ in range(clients)]
            before, used = processor(server.pid), 0.0
            until = time.monotonic() + seconds
            threads = [threading.Thread(target=one.work, args=(until, pause, "tiny")) for one in asking]
            for thread in threads:
                thread.start()
            memory = list[tuple[int, float]]()
            while any(thread.is_alive() for thread in threads):
                time.sleep(1)
                memory.append((sum(len(one.seen) for one in asking), resident(server.pid)))
                used = processor(server.pid) - before
        finally:
            server.terminate()
            server.wait(60)
    seen = [one for client in asking for one in client.seen]
    gets = [1000 * took for method, _, took in seen if method == "GET"]
    posts = [1000 * took for method, _, took in seen if method == "POST"]
    # After the jobs are there and each path was asked often: what grows then grows for ever.
    settled = [(count, held) for count, held in memory if count >= len(seen) / 3] or memory
    return {
        "clients": clients,
        "requests": len(seen),
        "requests_per_second": round(len(seen) / seconds, 1),
        "server_errors": sum(status >= 500 for _, status, _ in seen),
        "refused": sum(400 <= status < 500 and status != 429 for _, status, _ in seen),
        "told_to_try_again": sum(status == 429 for _, status, _ in seen),
        "get_median_ms": round(median(gets), 1),
        "get_p95_ms": round(quantiles(gets, n=20)[18], 1),
        "get_p99_ms": round(quantiles(gets, n=100)[98], 1),
        "post_p95_ms": round(quantiles(posts, n=20)[18], 1),
        "server_cpu_ms_per_request": round(1000 * used / len(seen), 2),
        "memory_mib": round(settled[-1][1], 1),
        "memory_growth_mib": round(settled[-1][1] - settled[0][1], 1),
        "memory_over_requests": settled[-1][0] - settled[0][0],
    }


def main() -> None:
    """Measure as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--pause", type=float, default=1, help="seconds between two requests of a client, on average")
    arguments = parser.parse_args()
    found = measure(arguments.clients, arguments.seconds, arguments.pause)
    print(json.dumps(found, indent=1))
    sys.exit(1 if found["server_errors"] else 0)


if __name__ == "__main__":
    main()
