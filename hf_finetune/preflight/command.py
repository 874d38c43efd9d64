"""`hf-finetune check`: look at everything, say everything, load nothing."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_finetune.preflight import light
from hf_finetune.terminal import Message, say, show, tell
from hf_finetune.terminal.message import Level, printable

if TYPE_CHECKING:
    from hf_finetune.findings import Findings
    from hf_finetune.preflight.heavy import Examined
    from hf_finetune.recipe import Recipe
    from hf_finetune.runlock.repeating import Repeat
    from hf_finetune.schema.reading import Reading

Origins = list[tuple[str, str, str]]
"""Key, value, and where it came from."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for besides the recipe."""

    restart: bool = False
    """An earlier run in the folder would be moved aside."""
    allow_change: tuple[str, ...] = ()
    """Keys that may differ from those of an earlier run."""
    repeat: Repeat | None = None
    """The locked run that this one is to repeat."""
    explain: bool = False
    """Say where each value came from."""
    show: int = 0
    """Training rows to print as the model will see them."""
    report: str | None = None
    """HTML file to write the data report to."""
    as_json: bool = False


@dataclass(frozen=True)
class Result:
    """What a check came to."""

    reading: Reading[Recipe]
    findings: Findings
    notes: list[str]
    plan: list[tuple[str, str]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    """What the plan says in sentences, for machines; the unit ends each name."""
    seen: Examined | None = None
    """None where the recipe, or a path in it, is wrong: then nothing else was looked at."""


def run(reading: Reading[Recipe], options: Options) -> int:
    """Check a recipe and print what was found.

    Args:
        reading: The recipe, as it was read.
        options: What to print.

    Returns:
        The exit code: 0, or that of the gravest kind of finding (2, 3, 4 or 5).
    """
    result = check(reading, options)
    origins = _origins(result.reading) if options.explain else []
    rows = []
    # First of all, as a row of a stream may be unreadable: what is found then belongs to the findings.
    with result.findings.collect():
        rows = _rows(result, options) if options.show else []
    if options.report is not None:
        with result.findings.collect():
            _write_report(result, options.report)
    _print_json(result, origins, rows) if options.as_json else _print(result, origins, rows)
    return result.findings.exit_code


def check(reading: Reading[Recipe], options: Options) -> Result:
    """Find everything that can be known to be wrong before weights load.

    Mistakes of the recipe, and names and paths that lead nowhere, import neither torch nor transformers.

    Args:
        reading: The recipe, as it was read.
        options: What is done about an earlier run, and which run this repeats.
    """
    findings = light.look_at_reading(reading, restart=options.restart, allowed=options.allow_change)
    repeat, notes = options.repeat, list[str]()
    plan = None
    seen = None
    # What is wrong already is answered at once: the libraries take seconds to import. But a repeat is refused with all
    # that differs from its lock, which they are needed to tell.
    if reading.recipe is not None and (repeat is not None or not findings.exit_code):
        from hf_finetune import hardware, quiet
        from hf_finetune.preflight import fitting, heavy
        from hf_finetune.preflight.plan import make

        quiet.hush()
        machine = hardware.alone(reading.recipe)
        if repeat is not None:
            machine = repeat.as_locked(machine, reading.recipe)
            notes = repeat.told(reading.recipe, machine, findings)
        seen = heavy.examine(reading.recipe, machine, findings)
        if repeat is not None and seen.prepared is not None and not findings.exit_code:
            with findings.collect():
                notes += repeat.notes_on_rows(seen.prepared.fingerprint)
        if not findings.exit_code:
            with findings.collect():
                plan = make(fitting.ahead(heavy.complete(seen)), findings)
    lines, numbers = ([], {}) if plan is None else (plan.lines, plan.numbers)
    return Result(reading, findings.located(reading.locate), [*reading.notes, *notes], lines, numbers, seen)


def _print(result: Result, origins: Origins, rows: list[str]) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # texts may hold what the terminal's encoding lacks
    for finding in result.findings:
        level: Level = "error" if finding.kind else "warning"
        tell(Message(str(finding.problem), "finding", level, "stderr", finding.as_json()))
    for note in result.notes:
        say(f"note: {note}")
    width = max((len(name) for name, _ in result.plan), default=0)
    for name, text in result.plan:
        tell(Message(f"{name}: {text}", "plan", fields={name: text}, line=printable(f"  {name:<{width}}  {text}")))
    counts = {"errors": len(result.findings.errors), "warnings": len(result.findings.warnings)}
    tell(Message(_verdict(result), "verdict", fields={"exit_code": result.findings.exit_code, **counts}))
    _print_origins(origins)
    for line in rows:
        tell(Message(line, "row", line=line, is_asked_for=True))


def _print_origins(origins: Origins) -> None:
    keys = max((len(key) for key, _, _ in origins), default=0)
    values = min(24, max((len(value) for _, value, _ in origins), default=0))
    for key, value, origin in origins:
        line = printable(f"{key:<{keys}}  {value:<{values}}  # {origin}")
        fields = {"key": key, "value": value, "origin": origin}
        tell(Message(f"{key}: {value}", "origin", fields=fields, line=line, is_asked_for=True))


def _answer(text: str) -> None:
    """What becomes of something that was asked for."""
    tell(Message(text, stream="stderr", line=f"hf_finetune: {printable(text)}", is_asked_for=True))


def _verdict(result: Result) -> str:
    errors, warnings = len(result.findings.errors), len(result.findings.warnings)
    told = [f"{count} {word}{'' if count == 1 else 's'}" for count, word in ((errors, "error"), (warnings, "warning"))]
    looked = None if result.seen is None else result.seen.looked
    later = ""
    if looked is not None and not looked.whole:
        later = f"; training rows after the first {looked.report.rows:,} are checked as they are read"
    return ", ".join(told) + ("" if errors else f": this recipe can run{later}")


def _print_json(result: Result, origins: Origins, rows: list[str]) -> None:
    told = {
        "exit_code": result.findings.exit_code,
        "findings": [finding.as_json() for finding in result.findings],
        "notes": result.notes,
        "plan": dict(result.plan),
        "numbers": result.numbers,
        "origins": [{"key": key, "value": value, "origin": origin} for key, value, origin in origins],
        "rows": rows,
    }
    show(json.dumps(told, indent=2))


def _origins(reading: Reading[Recipe]) -> Origins:
    """Where each value came from."""
    if reading.recipe is not None:
        return reading.explain()
    _answer("no values to explain: mend the errors first")
    return []


def _rows(result: Result, options: Options) -> list[str]:
    """Rows as the model will see them, as lines of text.

    Raises:
        DataError: A streamed row can't be read.
    """
    from hf_finetune.datareport import show as rows

    seen = result.seen
    if seen is None or seen.prepared is None:
        _answer("no rows to show: mend the errors first")
        return []
    colour = sys.stdout.isatty() and not options.as_json
    return rows.lines(seen.recipe, seen.prepared, seen.tokenizer, options.show, colour=colour)


def _write_report(result: Result, file: str) -> None:
    """Also of data with mistakes: that is when it is needed most."""
    from hf_finetune import datareport

    seen = result.seen
    if seen is None or seen.prepared is None:
        _answer(f"{file} is not written: the data could not be read; mend the errors first")
        return
    page = datareport.Page(seen.recipe, seen.prepared, seen.tokenizer, result.findings, result.plan)
    datareport.write(file, page)
    tell(Message(f"data report: {file}", "report", stream="stderr", fields={"file": file}, is_asked_for=True))
