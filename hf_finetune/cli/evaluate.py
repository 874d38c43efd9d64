"""`hf-finetune evaluate`: the metrics of a finished run on any labelled rows."""

from __future__ import annotations

import argparse

from hf_finetune import terminal
from hf_finetune.cli.arguments import add_run, count

HELP = "the metrics of a finished run on any data, by slice, against its base or another run"
DESCRIPTION = """\
The task's metrics with 95 % bootstrap intervals, on a split of the run's recipe (test, else validation) or on files.
What comes of it is kept in RUN/evaluations/.
"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_run(parser, "task.generate_rows=100")
    add = parser.add_argument
    told = "labelled rows, or a glob; may be given several times"
    add("--data", metavar="FILE", action="append", default=[], help=told)
    add("--split", choices=("train", "validation", "test"), help="a split of the run's recipe")
    told = "metrics for each value of a column too; may be given several times"
    add("--by", metavar="COLUMN", action="append", default=[], help=told)
    told = "compare on the same rows with another run, or with `base`; may be given several times"
    add("--against", metavar="RUN|base", action="append", default=[], help=told)
    add("--format", choices=("text", "json", "markdown"), default="text", help="how to print it")
    add("--all", action="store_true", help="the metrics of each class too")
    told = "tasks of lm-eval, e.g. arc_easy,hellaswag (needs the extra `harness`)"
    add("--lm-eval", metavar="TASK,...", help=told)
    add("--lm-eval-tasks", metavar="DIR", help="folder with lm-eval tasks of your own")
    add("--lm-eval-limit", metavar="N", type=count("rows"), help="first N rows of each task of lm-eval")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate."""
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
