"""`hf-finetune evaluate`: the metrics of a finished run on any labelled rows."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from hf_finetune import terminal

if TYPE_CHECKING:
    from hf_finetune.cli.parser import Parser, Verbs

DESCRIPTION = """\
The task's metrics with 95 % bootstrap intervals, on a split of the run's recipe (test, else validation) or on files.
What comes of it is kept in RUN/evaluations/.
"""


def add(verbs: Verbs, common: Parser) -> None:
    """Declare the verb."""
    help_verb = "the metrics of a finished run on any data, by slice, against its base or another run"
    parser = verbs.add_parser("evaluate", parents=[common], help=help_verb, description=DESCRIPTION)
    parser.add_argument("run_folder", metavar="RUN", help="run folder")
    help_overrides = "replaces a value of the run's recipe, e.g. task.generate_rows=100; the value in YAML"
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help=help_overrides)
    help_data = "labelled rows, or a glob; may be given several times"
    parser.add_argument("--data", metavar="FILE", action="append", default=[], help=help_data)
    parser.add_argument("--split", choices=("train", "validation", "test"), help="a split of the run's recipe")
    help_by = "metrics for each value of a column too; may be given several times"
    parser.add_argument("--by", metavar="COLUMN", action="append", default=[], help=help_by)
    help_against = "compare on the same rows with another run, or with `base`; may be given several times"
    parser.add_argument("--against", metavar="RUN|base", action="append", default=[], help=help_against)
    parser.add_argument("--format", choices=("text", "json", "markdown"), default="text", help="how to print it")
    parser.add_argument("--all", action="store_true", help="the metrics of each class too")
    help_harness = "tasks of lm-eval, e.g. arc_easy,hellaswag (needs the extra `harness`)"
    parser.add_argument("--lm-eval", metavar="TASK,...", help=help_harness)
    parser.add_argument("--lm-eval-tasks", metavar="DIR", help="folder with lm-eval tasks of your own")
    parser.add_argument("--lm-eval-limit", metavar="N", type=int, help="first N rows of each task of lm-eval")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Evaluate.

    Raises:
        FinetuneError: The run, the data or the command line is wrong.
    """
    if arguments.format != "text":  # what it does meanwhile is no part of the document
        terminal.open_for(arguments.log_format, quiet=True)
    from hf_finetune import opening

    overrides = tuple(arguments.overrides)
    others = [run for run in arguments.against if run != "base"]
    rows = opening.Rows(tuple(arguments.data), arguments.split, tuple(arguments.by))
    is_read = not arguments.lm_eval or arguments.data or arguments.split is not None
    opening.look(arguments.run_folder, overrides, others=others, rows=rows if is_read else None)
    if arguments.lm_eval:
        from hf_finetune.evaluating import harness

        wish = harness.Wish(tuple(arguments.lm_eval.split(",")), arguments.lm_eval_tasks, arguments.lm_eval_limit)
        harness.run(arguments.run_folder, overrides, wish, arguments.format)
        if not arguments.data and arguments.split is None:
            return
    from hf_finetune.evaluating import command

    options = command.Options(
        run=arguments.run_folder,
        overrides=overrides,
        files=tuple(arguments.data),
        split=arguments.split,
        by=tuple(arguments.by),
        against=tuple(arguments.against),
        form=arguments.format,
        everything=arguments.all,
    )
    command.run(options)
