"""`hf-finetune check`: its arguments, and how its findings, its plan and its views are printed."""

from __future__ import annotations

import argparse
import io
import json
import sys
from typing import TYPE_CHECKING

from hf_finetune import log
from hf_finetune.cli.arguments import add_recipe, count, given
from hf_finetune.log import say, show, tell
from hf_finetune.log.lines import Level, Message, printable

if TYPE_CHECKING:
    from hf_finetune.pipeline.check import CheckResult

HELP = "say everything that is wrong with a recipe, its data and its model; load no weights, need no GPU"
DESCRIPTION = f"{HELP[0].upper()}{HELP[1:]}."


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_recipe(parser)
    parser.add_argument("--explain", action="store_true", help="say where each value came from")
    text = "N training rows as the model sees them"
    parser.add_argument("--show", metavar="N", type=count("rows", 0), default=0, help=text)
    parser.add_argument("--report", metavar="FILE.html", help="write a page about the data")
    text = "json: one JSON document with everything"
    parser.add_argument("--format", choices=("text", "json"), default="text", help=text)


def run(arguments: argparse.Namespace) -> None:
    """Check; exits with the code of the gravest finding."""
    if log.rank():
        return  # one look is enough, and one report
    from hf_finetune.pipeline.check import check, read

    recipe, overrides = given(arguments)
    reading, repeat = read(recipe, overrides, arguments.locked, arguments.allow_change, anew=arguments.restart)
    is_json = arguments.format == "json"
    if is_json:  # what it does meanwhile is no part of the document
        log.open_for(arguments.log_format, quiet=True)
    result = check(reading, restart=arguments.restart, allow_change=arguments.allow_change, locked=repeat)
    origins, rows = list[tuple[str, str, str]](), list[str]()
    if arguments.explain and reading.recipe is not None:
        origins = reading.explain()
    elif arguments.explain:
        log.answer("no values to explain: correct the errors first")
    # Before anything is printed, as a row of a stream may be unreadable: what is found then belongs to the findings.
    if arguments.show:
        with result.findings.collect():
            rows = _rows(result, arguments.show, colour=sys.stdout.isatty() and not is_json)
    if arguments.report is not None:
        with result.findings.collect():
            _write_report(result, arguments.report)
    if is_json:
        explained = [{"key": key, "value": value, "origin": origin} for key, value, origin in origins]
        show(json.dumps({**result.as_json(), "origins": explained, "rows": rows}, indent=2))
    else:
        _print(result, origins, rows)
    if result.exit_code:
        sys.exit(result.exit_code)


def _print(result: CheckResult, origins: list[tuple[str, str, str]], rows: list[str]) -> None:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # texts may hold what the terminal's encoding lacks
    for finding in result.findings:
        level: Level = "error" if finding.kind else "warning"
        tell(Message(str(finding.problem), "finding", level, "stderr", finding.as_json()))
    for note in result.notes:
        say(f"note: {note}")
    width = max(map(len, result.plan), default=0)
    for name, text in result.plan.items():
        shown = printable(f"  {name:<{width}}  {text}")
        print_it = log.detail if name == "chosen" else tell
        print_it(Message(f"{name}: {text}", "plan", fields={name: text}, line=shown))
    counts = {"errors": len(result.problems), "warnings": len(result.warnings)}
    tell(Message(result.verdict, "verdict", fields={"exit_code": result.exit_code, **counts}))
    keys = max((len(key) for key, _, _ in origins), default=0)
    # Few values are longer than that; their origins just begin further right.
    values = min(24, max((len(value) for _, value, _ in origins), default=0))
    for key, value, origin in origins:
        line = printable(f"{key:<{keys}}  {value:<{values}}  # {origin}")
        fields = {"key": key, "value": value, "origin": origin}
        tell(Message(f"{key}: {value}", "origin", fields=fields, line=line, is_asked_for=True))
    for row in rows:
        tell(Message(row, "row", line=row, is_asked_for=True))


def _rows(result: CheckResult, count: int, *, colour: bool) -> list[str]:
    """Give rows as the model will see them, as lines of text; a streamed row may be unreadable: a DataError."""
    parts = result.parts
    if parts is None or parts.prepared is None:
        log.answer("no rows to show: correct the errors first")
        return []
    from hf_finetune.reports import data

    return data.lines(parts.recipe, parts.prepared, parts.tokenizer, count, colour=colour)


def _write_report(result: CheckResult, file: str) -> None:
    """Write the page also of data with mistakes: that is when it is needed most."""
    parts = result.parts
    if parts is None or parts.prepared is None:
        log.answer(f"{file} is not written: the data could not be read; correct the errors first")
        return
    from hf_finetune.reports import data

    plan = list(result.plan.items())
    data.write(file, parts.recipe, parts.prepared, tokenizer=parts.tokenizer, findings=result.findings, plan=plan)
    tell(Message(f"data report: {file}", "report", stream="stderr", fields={"file": file}, is_asked_for=True))
