"""`hf-finetune predict`: labels, numbers or generated text for any rows, as a Unix tool."""

from __future__ import annotations

import argparse

from hf_finetune import terminal
from hf_finetune.cli.arguments import add_run, count

HELP = "labels, numbers or generated text for rows of a file or a pipe"
DESCRIPTION = """\
Predict every row of a csv, tsv, json, jsonl or parquet file, or every line of a text: the same rows come out, in order,
with label, score and probabilities, a value, or generated text. A call with --output that was killed goes on where it
was.
"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_run(parser, "training.eval_batch=8")
    add = parser.add_argument
    add("--input", metavar="FILE|-", default="-", help="rows; by default standard input")
    add("--output", metavar="FILE|-", default="-", help="by default standard output")
    formats = ("csv", "tsv", "jsonl", "parquet")
    told = "where suffix or first line do not tell; of standard input: a header, JSON, or else `lines`, a text each"
    add("--input-format", choices=(*formats, "json", "lines"), help=told)
    told = "by default that of the output's suffix, else of the input; jsonl for lines"
    add("--format", choices=formats, help=told)
    told = "end with 3 (default), leave the row out, or write it without a prediction; counted in every case"
    add("--on-bad-row", choices=("error", "skip", "null"), default="error", help=told)
    add("--max-new-tokens", metavar="N", type=count("tokens"), help="most tokens of a generated answer")
    told = "put before the names of output columns; by default `predicted_` where one is taken, else nothing"
    add("--prefix", metavar="TEXT", help=told)
    add("--restart", action="store_true", help="begin anew, and replace a finished output")


def run(arguments: argparse.Namespace) -> None:
    """Predict."""
    if arguments.output == "-":  # what it does meanwhile is no part of the rows
        terminal.open_for(arguments.log_format, quiet=True)
    from hf_finetune import opening
    from hf_finetune.predicting import output, rows
    from hf_finetune.schema.roots import refuse_outside

    named = (("--input", arguments.input), ("--output", arguments.output))
    refuse_outside((option, path) for option, path in named if path != "-")  # before it is said whether it is there
    opening.look(arguments.run_folder, arguments.overrides)
    rows.find(arguments.input, arguments.input_format)
    if arguments.output != "-":
        output.refuse(arguments.output, restart=arguments.restart)
    from hf_finetune.predicting import command

    options = command.Options(
        run=arguments.run_folder,
        overrides=tuple(arguments.overrides),
        input=arguments.input,
        output=arguments.output,
        input_format=arguments.input_format,
        form=arguments.format,
        on_bad_row=arguments.on_bad_row,
        max_new_tokens=arguments.max_new_tokens,
        prefix=arguments.prefix,
        restart=arguments.restart,
    )
    command.run(options)
