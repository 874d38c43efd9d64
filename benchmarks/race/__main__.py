"""The command line: prepare each workload, run each system on it in turn, print the table.

Results are kept in the folder of `--results`: what is there is not measured again, so a benchmark that was stopped goes
on where it was. The table is written there, too: table.md and table.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks.race import environments, machine, measure, table
from benchmarks.race.environments import InstallError
from benchmarks.race.results import Measurement, Result, Store, plan
from benchmarks.race.summary import Spread
from benchmarks.race.systems import SYSTEMS
from benchmarks.race.workloads import FULL, QUICK, Workload


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
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no run is begun")
    parser.add_argument("--torch-index", help="a further package index, for a build of torch")
    parser.add_argument("--no-quality", action="store_true", help="do not evaluate what was trained, for a trial")
    parser.add_argument("--table", action="store_true", help="measure nothing, print what is there")
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
    """Measure, print; fails where hf_finetune itself has failed."""
    options = parse()
    race = Race(options, options.results or Path("runs", "bench-quick" if options.quick else "bench"))
    race.prepare()
    if not options.table:
        race.run()
    sys.stdout.write(race.write())
    if any(result["failed"] for result in race.found() if result["system"] == table.OURS):
        raise SystemExit("hf_finetune failed; its log is next to the results")


class Race:
    """All that is to be measured, and what was."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.store = options, folder, Store(folder)
        self.deadline = time.monotonic() + options.budget
        self.seeds = options.seeds or (2 if options.quick else 3)
        self.facts = machine.describe()
        self.keep_peaks()
        self.prepared: list[measure.Prepared] = []
        self.missing: list[tuple[Workload, str]] = []

    def keep_peaks(self) -> None:
        """Take the best that was ever measured here: who is disturbed measures too little, and flatters all shares."""
        file = self.folder / "peaks.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        best = {name: max(rate, known.get(name, 0.0)) for name, rate in self.facts["peaks"].items()}
        self.facts["peaks"] = best
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(best) + "\n")

    def prepare(self) -> None:
        """Write the data of every workload that can be measured here."""
        sources = measure.Sources(self.options.sst2, self.options.gsm8k, self.options.llama)
        for workload in chosen(self.options):
            reason = _impossible(workload, sources)
            if reason:
                self.missing.append((workload, reason))
            else:
                self.prepared.append(measure.prepare(workload, sources, self.folder))

    def plan(self) -> list[tuple[measure.Prepared, Measurement]]:
        """Round after round, each through all workloads; every second one backwards."""
        everything = [
            (prepared, measurement)
            for prepared in self.prepared
            for measurement in plan(prepared.workload.name, prepared.digest, prepared.workload.systems, self.seeds)
        ]
        return sorted(everything, key=lambda pair: pair[1].seed)

    def run(self) -> None:
        """Measure what is not there yet, until the time is up."""
        everything = self.plan()
        for _, measurement in everything:
            if measurement.system in self.options.again:
                self.store.forget(measurement)
        for number, (prepared, measurement) in enumerate(everything, start=1):
            if self.store.get(measurement) is not None:
                continue
            if time.monotonic() > self.deadline:
                _tell(f"the time is up: {measurement.name} and what comes after it are left out")
                break
            _tell(f"{number}/{len(everything)} {measurement.workload}: {measurement.system}, seed {measurement.seed}")
            self.measure(prepared, measurement)
            self.write()
        self.facts["peaks"] = machine.peaks()
        self.keep_peaks()

    def measure(self, prepared: measure.Prepared, measurement: Measurement) -> None:
        """Install the system, run it."""
        environment = SYSTEMS[measurement.system].environment
        try:
            environments.install(environment, self.options.torch_index)
        except InstallError as error:
            result: Result = {**asdict(measurement), "failed": f"pip: {error}"}
            self.store.put(measurement, result)
        else:
            is_evaluated, timeout = not self.options.no_quality, self.options.timeout
            result = measure.measure(prepared, measurement, self.store, timeout, is_evaluated=is_evaluated)
        _tell(f"    {_short(result)}")

    def found(self) -> list[Result]:
        """All results of the plan that there are."""
        results = [self.store.get(measurement) for _, measurement in self.plan()]
        return [result for result in results if result is not None]

    def write(self) -> str:
        """Write table.md and table.json of what there is; returns the former."""
        found = self.found()
        text, entries = table.head(self.facts, found), []
        for prepared in self.prepared:
            own = [result for result in found if result["workload"] == prepared.workload.name]
            results = {
                system: [result for result in own if result["system"] == system] for system in prepared.workload.systems
            }
            rows = table.rows(prepared, results, max(self.facts["peaks"].values()))
            text += table.markdown(prepared, rows)
            entries += rows
        text += "".join(table.missing(workload.title, workload.name, reason) for workload, reason in self.missing)
        (self.folder / "table.md").write_text(text, encoding="utf-8")
        facts = {"machine": self.facts, "rows": entries}
        (self.folder / "table.json").write_text(json.dumps(facts, indent=1, default=_plain) + "\n", encoding="utf-8")
        return text


def _impossible(workload: Workload, sources: measure.Sources) -> str:
    """Why a workload can't be measured here; nothing where it can."""
    if workload.needs_gpu and not machine.has_gpu():
        return "no GPU here"
    needed = [workload.data, "llama"] if workload.model == "llama" else [workload.data]
    absent = [f"--{name}" for name in needed if getattr(sources, name) is None]
    if workload.target is not None and absent:
        return f"its target is for the real data; give {' and '.join(absent)}"
    return ""


def _short(result: Result) -> str:
    if result["failed"]:
        return f"failed: {result['failed']}"
    rate = f"{result['samples_per_second']:.1f} samples/s, {result['tokens_per_second']:.0f} tokens/s"
    return f"{rate}, {result['wall']:.1f} s in all, quality {result.get('quality')}"


def _plain(value: Any) -> Any:
    return asdict(value) if isinstance(value, Spread) else str(value)


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
