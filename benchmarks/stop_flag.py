"""The price of the agreed stop flag: `StopRequest.agreed()`, an all-reduce of one int, with gloo processes on a CPU.

    python benchmarks/stop_flag.py

Every rank calls it again and again, as at the end of each step. Prints one JSON line: the median of the calls in
milliseconds, for each repetition, on rank 0.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import distributed

from hf_finetune.training.callbacks import StopRequest


def parse() -> argparse.Namespace:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--repetitions", type=int, default=5)
    return parser.parse_args()


def measure(rank: int, options: argparse.Namespace, store: str) -> None:
    """What one rank does; rank 0 prints."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.processes)
    request = StopRequest()
    medians = []
    for _ in range(options.repetitions + 1):  # the first one warms up
        times = []
        for _ in range(options.calls):
            began = time.perf_counter()
            request.agreed()
            times.append(time.perf_counter() - began)
        medians.append(round(1000 * statistics.median(times), 4))
    if rank == 0:
        result = {"median_ms": statistics.median(medians[1:]), "medians_ms": medians[1:]}
        print(json.dumps({**result, **vars(options)}))
    distributed.destroy_process_group()


def main() -> None:
    """Measure and print."""
    options = parse()
    with tempfile.TemporaryDirectory() as folder:
        context, store = multiprocessing.get_context("spawn"), str(Path(folder, "store"))
        ranks = [context.Process(target=measure, args=(rank, options, store)) for rank in range(options.processes)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
    if any(process.exitcode for process in ranks):
        raise SystemExit("a process failed; see above")


if __name__ == "__main__":
    main()
