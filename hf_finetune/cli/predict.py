"""`hf-finetune predict`: labels, numbers or generated text for any rows, as a Unix tool."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hf_finetune import terminal

if TYPE_CHECKING:
    from hf_finetune.cli.parser import Parser, Verbs

DESCRIPTION = """\
Predict every row of a csv, tsv, json, jsonl or parquet file, or every line of a text: the same rows come out, in order,
with label, score and probabilities, a value, or generated text. A call with --output that was killed goes on where it
was.
"""


def add(verbs: Verbs, common: Parser) -> None:
    """Declare the verb."""
    help_verb = "labels, numbers or generated text for rows of a file or a pipe"
    parser = verbs.add_parser("predict", parents=[common], help=help_verb, description=DESCRIPTION)
    parser.add_argument("run_folder", metavar="RUN", help="run folder")
    help_overrides = "replaces a value of the run's recipe, e.g. training.eval_batch=8; the value in YAML"
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help=help_overrides)
    parser.add_argument("--input", metavar="FILE|-", default="-", help="rows; by default standard input")
    parser.add_argument("--output", metavar="FILE|-", default="-", help="by default standard output")
    formats = ("csv", "tsv", "jsonl", "parquet")
    help_input = (
        "where suffix or first line do not tell; of standard input: a header, JSON, or else `lines`, a text each"
    )
    parser.add_argument("--input-format", choices=(*formats, "json", "lines"), help=help_input)
    help_format = "by default that of the output's suffix, else of the input; jsonl for lines"
    parser.add_argument("--format", choices=formats, help=help_format)
    help_bad = "end with 3 (default), leave the row out, or write it without a prediction; counted in every case"
    parser.add_argument("--on-bad-row", choices=("error", "skip", "null"), default="error", help=help_bad)
    parser.add_argument("--max-new-tokens", metavar="N", type=_count, help="most tokens of a generated answer")
    help_prefix = "put before the names of output columns; by default `predicted_` where one is taken, else nothing"
    parser.add_argument("--prefix", metavar="TEXT", help=help_prefix)
    parser.add_argument("--restart", action="store_true", help="begin anew, and replace a finished output")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Predict.

    Raises:
        FinetuneError: The run, the data or the command line is wrong.
    """
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


def _count(word: str) -> int:
    """A number of tokens."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of tokens, not {word!r}")
    return int(word)
