"""The race: which runs there are, in which order, within which time; and the table of what came of them."""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from benchmarks.race import environments, goals, machine, measure, table
from benchmarks.race.environments import InstallError, OutOfTimeError
from benchmarks.race.results import OURS, Measurement, Result, Store, plan
from benchmarks.race.systems import SYSTEMS
from benchmarks.race.workloads import Workload

LEAST = 15.0
"""Seconds without which no run is begun: nobody ends earlier."""
SOURCES = ("sst2", "gsm8k", "llama")


class Race:
    """All that is to be measured, and what was."""

    def __init__(self, options: argparse.Namespace, folder: Path, workloads: list[Workload]) -> None:
        self.options, self.folder, self.store, self.workloads = options, folder, Store(folder), workloads
        self.deadline = (options.began or time.time()) + options.budget
        self.seeds = options.seeds or (2 if options.quick else 3)
        folder.mkdir(parents=True, exist_ok=True)
        self.facts = self._machine()
        self.prepared: list[measure.Prepared] = []
        self.missing: list[tuple[Workload, str]] = []
        self.refused: dict[str, str] = {}
        """Environment -> why it can't be had."""

    @property
    def left(self) -> float:
        """Seconds until everything must have ended."""
        return float(self.deadline - time.time())

    def _machine(self) -> dict[str, Any]:
        """What the machine is; where nothing is measured, what it was when the last run was."""
        file = self.folder / "machine.json"
        if self.options.table and file.exists():
            return dict(json.loads(file.read_text()))
        return self._kept(machine.describe())

    def _kept(self, facts: dict[str, Any]) -> dict[str, Any]:
        """Take the best that was ever measured here: who is disturbed measures too little, and flatters all shares."""
        file = self.folder / "machine.json"
        known = json.loads(file.read_text())["peaks"] if file.exists() else {}
        facts["peaks"] = {name: max(rate, known.get(name, 0.0)) for name, rate in facts["peaks"].items()}
        file.write_text(json.dumps(facts, indent=1) + "\n")
        return facts

    def _sources(self) -> measure.Sources:
        """The folders that the command line names; with `--table` alone those of the last run."""
        file = self.folder / "sources.json"
        named = {name: getattr(self.options, name) for name in SOURCES}
        if self.options.table and not any(named.values()) and file.exists():
            known = json.loads(file.read_text())
            named = {name: Path(known[name]) if known[name] else None for name in SOURCES}
        else:
            file.write_text(json.dumps({name: str(path.resolve()) if path else None for name, path in named.items()}))
        return measure.Sources(**named)

    def prepare(self) -> None:
        """Write the data of every workload that can be measured here."""
        sources = self._sources()
        for workload in self.workloads:
            reason = impossible(workload, sources)
            if reason:
                self.missing.append((workload, reason))
            else:
                self.prepared.append(measure.prepare(workload, sources, self.folder))

    def plan(self) -> list[tuple[measure.Prepared, Measurement]]:
        """Round after round. Workloads take turns where time may run out; else each is measured in one go."""
        named = {prepared.workload.name: prepared for prepared in self.prepared}
        told = [(name, prepared.digest, prepared.workload.systems) for name, prepared in named.items()]
        groups = [told] if self.options.quick else [[one] for one in told]
        found = [measurement for group in groups for measurement in plan(group, self.seeds)]
        return [(named[one.workload], one) for one in sorted(found, key=lambda one: one.seed)]

    def run(self) -> None:
        """Measure what is not there yet, until the time is up."""
        everything = self.plan()
        for _, measurement in everything:
            if measurement.system in self.options.again:
                self.store.forget(measurement)
        for number, (prepared, measurement) in enumerate(everything, start=1):
            if self.store.get(measurement) is not None:
                continue
            where = f"{number}/{len(everything)} {measurement.workload}: {measurement.system}, seed {measurement.seed}"
            if not self.has_time_for(measurement):
                _tell(f"{where}: left out, {max(self.left, 0):.0f} s are left")
                continue
            _tell(where)
            self.measure(prepared, measurement)
            self.write()
        if self.left > LEAST:
            self.facts = self._kept({**self.facts, "peaks": machine.peaks()})

    def has_time_for(self, measurement: Measurement) -> bool:
        """Whether a run may end in time: it takes `LEAST` seconds, and as long as with the seeds before."""
        known = [self.store.get(Measurement(measurement.workload, measurement.digest, measurement.system, seed))
                 for seed in range(1, measurement.seed)]  # fmt: skip
        took: list[float] = [result["wall"] for result in known if result and "wall" in result]
        return self.left > max([LEAST, *took])

    def measure(self, prepared: measure.Prepared, measurement: Measurement) -> None:
        """Install the system, run it; a result that the end of the time has cut short is none."""
        limit, refused = self.options.timeout, self.install(SYSTEMS[measurement.system].environment)
        if refused is not None:
            result: Result = {**asdict(measurement), "failed": f"pip: {refused}"}
        elif not self.has_time_for(measurement):
            _tell(f"    left out: installing has used up the time, {max(self.left, 0):.0f} s are left")
            return
        else:
            limit, is_evaluated = min(self.options.timeout, self.left), not self.options.no_quality
            result = measure.measure(prepared, measurement, self.store, limit, is_evaluated=is_evaluated)
        if result.get("timed_out") and limit < self.options.timeout:
            _tell("    left out: the time was up")
            return
        self.store.put(measurement, result)
        _tell(f"    {_short(result)}")

    def install(self, environment: environments.Environment) -> str | None:
        """Make an environment, once; returns why it can't be had."""
        if environment.name not in self.refused:
            try:
                environments.install(environment, self.options.torch_index, self.left)
            except OutOfTimeError as error:
                _tell(f"    {environment.name}: {error}")
            except InstallError as error:
                self.refused[environment.name] = str(error)
        return self.refused.get(environment.name)

    def found(self) -> list[Result]:
        """All results of the plan that there are."""
        results = [self.store.get(measurement) for _, measurement in self.plan()]
        return [result for result in results if result is not None]

    def problems(self) -> list[str]:
        """Where hf_finetune itself has failed, or was never run."""
        found = []
        results = [result for result in self.found() if result["system"] == OURS]
        for prepared in self.prepared:
            name = prepared.workload.name
            own = [result for result in results if result["workload"] == name]
            found += [f"{name}: hf_finetune failed: {r['failed']}" for r in own if r["failed"]]
            if not own and OURS in prepared.workload.systems:
                found.append(f"{name}: hf_finetune was not measured")
        return found

    def write(self) -> str:
        """Write table.md and table.json of what there is; returns the former."""
        results, parts = self.found(), []
        aims: list[goals.Goal] = []
        entries: list[dict[str, Any]] = []
        for prepared in self.prepared:
            own = [result for result in results if result["workload"] == prepared.workload.name]
            by_system = {name: [r for r in own if r["system"] == name] for name in prepared.workload.systems}
            rows = table.rows(prepared, by_system, max(self.facts["peaks"].values()))
            checked = goals.check(prepared.workload, rows)
            parts.append(table.markdown(prepared, rows, checked))
            aims += checked
            entries += rows
        parts += [table.missing(workload.title, workload.name, reason) for workload, reason in self.missing]
        text = table.head(self.facts, results) + goals.markdown(aims) + "".join(parts)
        (self.folder / "table.md").write_text(text, encoding="utf-8")
        absent = [{"workload": workload.name, "reason": reason} for workload, reason in self.missing]
        verdicts = [{**asdict(goal), "verdict": goal.verdict} for goal in aims]
        whole = {"machine": self.facts, "goals": verdicts, "rows": entries, "not_measured": absent}
        (self.folder / "table.json").write_text(json.dumps(whole, indent=1, default=_plain) + "\n", encoding="utf-8")
        return text


def impossible(workload: Workload, sources: measure.Sources) -> str:
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
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
