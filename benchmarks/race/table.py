"""The table: what was measured, as markdown for people and as JSON for programs."""

from __future__ import annotations

from typing import Any

from benchmarks.race import goals
from benchmarks.race.goals import Goal
from benchmarks.race.measure import Prepared
from benchmarks.race.results import OURS, Result
from benchmarks.race.summary import Spread, ratio
from benchmarks.race.systems import SYSTEMS

NUMBERS = ("samples_per_second", "tokens_per_second", "first_step", "wall", "memory", "quality", "time_to_target")
HEAD = (
    "| system | seeds | samples/s | tokens/s | share of peak | memory | first step | whole command | {quality} "
    "| hf_finetune is |\n|---|---|---|---|---|---|---|---|---|---|\n"
)


def head(facts: dict[str, Any], results: list[Result]) -> str:
    """The machine, and how to read the numbers."""
    packages = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    peaks = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in facts["peaks"].items())
    loads = Spread.of(result.get("load") for result in results)
    others = Spread.of(result.get("others") for result in results)
    return (
        f"{facts['cpu']}; {facts['cores']} cores, {facts['memory_gb']:.0f} GB; GPU: {facts['gpu'] or 'none'}; "
        f"{facts['system']}; Python {facts['python']}; {packages}; commit {facts['commit']}.\n\n"
        f"Largest square matrix product, all threads: {peaks} TFLOP/s; shares are of the greater one. Load average "
        f"before the runs: {_spread(loads, '.1f')}; share of the cores that other processes took meanwhile: "
        f"{_spread(others, '.0%')}. Numbers are medians over the seeds, with (least..most); ratios are medians of the "
        "ratios round by round. Rates hold training, with what a system tries out and compiles for it; `whole "
        "command` also imports, loading, tokenisation and saving. Tokens are those of the data, without padding. "
        "Memory is the peak of resident memory above what the imports take; it is compared where micro-batches are "
        "equal. Quality is measured by one evaluator, in "
        "fp32, from the saved adapter.\n"
    )


def rows(prepared: Prepared, results: dict[str, list[Result]], peak: float) -> list[dict[str, Any]]:
    """One entry a system: spreads of everything, and ratios."""
    ours = _well(results.get(OURS, []))
    found = []
    for system, measured in results.items():
        well = _well(measured)
        row: dict[str, Any] = {"workload": prepared.workload.name, "system": system, "seeds": len(well)}
        row["failed"] = next((result["failed"] for result in measured if result["failed"]), None)
        row |= {key: Spread.of(result.get(key) for result in well) for key in NUMBERS}
        row["cpu_seconds"] = Spread.of(result.get("cpu") for result in well)
        row["share"] = Spread.of(result["flops_per_second"] / peak for result in well)
        row["quality_problem"] = next((r["quality_problem"] for r in well if r.get("quality_problem")), None)
        if system != OURS:
            row["times_faster"] = ratio(ours, well, "samples_per_second")
            is_equal = len({result.get("micro_batch") for result in [*ours, *well]}) == 1
            row["times_less_memory"] = ratio(ours, well, "memory", less_is_better=True) if is_equal else None
            row["times_less_cpu"] = ratio(ours, well, "cpu", less_is_better=True)
            row["times_faster_whole"] = ratio(ours, well, "wall", less_is_better=True)
            row["times_faster_to_target"] = ratio(ours, well, "time_to_target", less_is_better=True)
        row["differs"] = _differs(prepared, well)
        row["micro_batch"] = sorted({result.get("micro_batch") or 0 for result in well})
        found.append(row)
    return found


def markdown(prepared: Prepared, entries: list[dict[str, Any]], aims: list[Goal]) -> str:
    """One workload's part of the table."""
    workload = prepared.workload
    size = f"{prepared.rows:,} rows x {workload.epochs:g} epochs, {prepared.tokens:,} tokens an epoch"
    facts = f"{size}; batch {workload.batch_size}, at most {workload.max_length} tokens a row"
    notes = "".join(f" **{note}.**" for note in prepared.notes)
    quality = "accuracy" if workload.kind == "classification" else "eval loss"
    if workload.target is not None:
        quality += f" | to {quality} {workload.target.value}"
    text = f"\n### {workload.title}\n\n`{workload.name}`: {facts}.{notes}\n\n"
    top = HEAD.format(quality=quality)
    if workload.target is not None:
        top = top.rstrip("\n") + "---|\n"
    return text + top + "".join(_line(entry, aims, has_target=workload.target is not None) for entry in entries)


def missing(title: str, name: str, reason: str) -> str:
    """A workload that can't be measured here."""
    return f"\n### {title}\n\n`{name}`: not measured: {reason}.\n"


def _line(entry: dict[str, Any], aims: list[Goal], *, has_target: bool) -> str:
    title = SYSTEMS[entry["system"]].title
    if not entry["seeds"]:
        cells = [
            "0",
            f"did not run: `{entry['failed'].replace('|', '/')}`" if entry["failed"] else "not measured: no time",
            *[""] * (7 + has_target),
        ]
        return f"| {title} | {' | '.join(cells)} |\n"
    quality = _spread(entry["quality"], ".4f") if entry["quality"] else f"({entry['quality_problem']})"
    cells = [
        f"{entry['seeds']}" + (" (others failed)" if entry["failed"] else ""),
        _spread(entry["samples_per_second"], ",.1f"),
        _spread(entry["tokens_per_second"], ",.0f"),
        f"{entry['share'].median:.1%}",
        f"{entry['memory'].median / 1e6:,.0f} MB" if entry["memory"] else "-",
        _spread(entry["first_step"], ".1f", " s"),
        _spread(entry["wall"], ".1f", " s"),
        quality,
    ]
    if has_target:
        cells.append(_spread(entry["time_to_target"], ".0f", " s") if entry["time_to_target"] else "not reached")
    cells.append(_ratios(entry, aims))
    note = f"<br>{entry['differs']}" if entry["differs"] else ""
    return f"| {title}{note} | {' | '.join(cells)} |\n"


def _ratios(entry: dict[str, Any], aims: list[Goal]) -> str:
    system = entry["system"]
    if system == OURS:
        return f"share of peak{_aim(aims, 'share of the peak', '')}" if goals.of(aims, "share of the peak", "") else "-"
    parts = []
    if entry["times_faster_to_target"]:
        spread = _spread(entry["times_faster_to_target"], ".2f")
        parts.append(f"{spread} x faster to the target{_aim(aims, 'time to the target', system)}")
    if entry["times_faster"]:
        parts.append(f"{_spread(entry['times_faster'], '.2f')} x faster{_aim(aims, 'rate', system)}")
    if entry["times_less_memory"]:
        parts.append(f"memory x {1 / entry['times_less_memory'].median:.2f}{_aim(aims, 'memory', system)}")
    return ", ".join(parts) or "-"


def _aim(aims: list[Goal], what: str, system: str) -> str:
    """What was aimed at in a cell, and whether it was met."""
    goal = goals.of(aims, what, system)
    return f" (goal {goal.aim}: {goal.verdict})" if goal else ""


def _well(results: list[Result]) -> list[Result]:
    return [result for result in results if not result["failed"]]


def _spread(spread: Spread | None, form: str, unit: str = "") -> str:
    if spread is None:
        return "-"
    if spread.count == 1:
        return f"{spread.median:{form}}{unit}"
    return f"{spread.median:{form}}{unit} ({spread.low:{form}}..{spread.high:{form}})"


def _differs(prepared: Prepared, results: list[Result]) -> str:
    """Where a system counts other tokens than the benchmark does: then it did other work."""
    counted = next((result["own"]["tokens"] for result in results), None)
    if counted is None or abs(counted / prepared.tokens - 1) < 0.005:
        return ""
    return f"has {counted / prepared.tokens:.1%} of the tokens"
