"""The command line: prepare each workload, run each system on it in turn, print the table.

Results are kept in the folder of `--results`: what is there is not measured again, so a benchmark that was stopped goes
on where it was. The table is written there, too: table.md and table.json.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import marked
from benchmarks.race.race import Race
from benchmarks.race.systems import SYSTEMS
from benchmarks.race.workloads import FULL, QUICK, Workload

MARK = "results"
LOUD_IMPORTS = ("torchao", "torch.utils._pytree")
"""Loggers that tell, while transformers imports what is installed, of GPU kernels that are not there."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Settings from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small models and generated data, ten minutes at most")
    parser.add_argument("--sst2", type=Path, help="folder with train.tsv and dev.tsv; default: stand-in data")
    parser.add_argument("--gsm8k", type=Path, help="folder with train.jsonl and test.jsonl; default: stand-in data")
    parser.add_argument("--llama", type=Path, help="folder of reviews-llama-12m; default: random weights")
    parser.add_argument("--only", nargs="+", metavar="WORKLOAD", default=[], help="these workloads")
    parser.add_argument("--systems", nargs="+", metavar="SYSTEM", choices=sorted(SYSTEMS), help="these systems")
    parser.add_argument("--seeds", type=int, help="rounds; default: 3, with --quick 2")
    parser.add_argument("--rows", type=int, help="train on so many rows, for a trial")
    parser.add_argument("--again", nargs="+", metavar="SYSTEM", default=[], help="measure these anew")
    parser.add_argument("--results", type=Path, help="default: runs/bench, with --quick runs/bench-quick")
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds for one run")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which everything has ended")
    parser.add_argument("--began", type=float, help="when the budget began to run, in seconds since 1970; default: now")
    parser.add_argument("--torch-index", help="a further package index, for a build of torch")
    parser.add_argument("--no-quality", action="store_true", help="do not evaluate what was trained, for a trial")
    parser.add_argument("--table", action="store_true", help="measure nothing, print what is there")
    parser.add_argument("--into", type=Path, help="also put the table between the marks of this file")
    return parser.parse_args(arguments)


def chosen(options: argparse.Namespace) -> list[Workload]:
    """Workloads, with what the command line changes of them."""
    known = QUICK if options.quick else FULL
    names = {workload.name for workload in known}
    if unknown := set(options.only) - names:
        raise SystemExit(f"no workload {', '.join(sorted(unknown))}; there are {', '.join(sorted(names))}")
    found = [workload for workload in known if not options.only or workload.name in options.only]
    if options.systems:
        picked = [tuple(name for name in workload.systems if name in options.systems) for workload in found]
        found = [replace(workload, systems=systems) for workload, systems in zip(found, picked, strict=True)]
    return [replace(workload, rows=options.rows) if options.rows else workload for workload in found]


def main() -> None:
    """Measure, print; fails where hf_finetune itself has failed or was not measured."""
    options = parse()
    for name in LOUD_IMPORTS:
        logging.getLogger(name).setLevel(logging.ERROR)
    folder = options.results or Path("runs", "bench-quick" if options.quick else "bench")
    race = Race(options, folder, chosen(options))
    race.prepare()
    if not options.table:
        race.run()
    text = race.write()
    sys.stdout.write(text)
    if options.into:
        marked.put(options.into, MARK, text)
    if not options.table and (problems := race.problems()):
        raise SystemExit("\n".join([*problems, f"logs are next to the results in {folder}"]))


if __name__ == "__main__":
    main()
