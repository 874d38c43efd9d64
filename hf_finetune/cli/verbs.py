"""The verbs of the command line: the arguments of each, and the function that it runs."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from hf_finetune import log
from hf_finetune.cli import checking, serve_check, serving
from hf_finetune.cli.arguments import add_recipe, add_run, count, given, is_worker, number, processes, top
from hf_finetune.errors import RecipeError
from hf_finetune.log import say, show
from hf_finetune.run.processes import Node

# hf-finetune init

HELP_INIT = "write a first recipe for a file, a folder of images or sounds, or a data set of the Hub"
DESCRIPTION_INIT = """\
Write a first recipe: the task is recognised by the columns and their values, and each choice comes with its reason.
It reads csv, tsv, json, jsonl, parquet and txt files, also packed (gz, bz2, xz, zip), folders with a training file,
folders or zip files with a folder of images or sounds for each label, and data sets of the Hub.
"""


def declare_init(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("place", metavar="DATA", help="file, folder, or data set of the Hub: owner/name or owner/name:subset")
    add("--task", metavar="KIND", help="task, e.g. text_classification; by default the likeliest")
    add("--model", metavar="NAME", help="Hub id or folder; by default a small one for the task")
    add("-o", "--output", metavar="RECIPE", help="by default named after the data")
    add("--overwrite", action="store_true", help="replace another recipe that is there")


def run_init(arguments: argparse.Namespace) -> None:
    """Write it."""
    from hf_finetune.pipeline.init import init

    given = {"kind": arguments.task, "model": arguments.model, "output": arguments.output}
    recipe, says = init(arguments.place, **given, overwrite=arguments.overwrite)
    _say_next(recipe, says)


def _say_next(recipe: str, says: Sequence[str]) -> None:
    named = shlex.quote(recipe)
    for sentence in [*says, f"wrote {recipe}", f"next: hf-finetune check {named}, then: hf-finetune train {named}"]:
        say(sentence)


# hf-finetune recipes

HELP_RECIPES = "list recipes to begin with, print one, or copy one to edit"
DESCRIPTION_RECIPES = """\
The gallery: recipes for every task and method, each tested. `list` names them, `show NAME` prints one, and
`copy NAME` writes it as a file for you to edit.
"""


def declare_recipes(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("action", choices=("list", "show", "copy"), help="list if not given", nargs="?", default="list")
    add("name", metavar="NAME", nargs="?", help="of a recipe: for show and copy")
    add("--task", metavar="KIND", help="list only recipes of this task")
    add("-o", "--output", metavar="RECIPE", help="file to write; by default NAME.yaml")
    add("--overwrite", action="store_true", help="replace another recipe that is there")


def run_recipes(arguments: argparse.Namespace) -> None:
    """List, print or copy."""
    from hf_finetune.pipeline import gallery

    action, name = arguments.action, arguments.name
    if (name is None) != (action == "list"):
        what = f"takes no name; print the recipe with: show {name}" if name else "needs the NAME of a recipe"
        raise RecipeError(f"recipes {action} {what}")
    if action == "show":
        show(gallery.find(name).read_text(encoding="utf-8").rstrip())
    elif action == "copy":
        _say_next(*gallery.copy(name, arguments.output, overwrite=arguments.overwrite))
    else:
        show(gallery.shown(arguments.task))


# hf-finetune train

HELP_TRAIN = "fine-tune"
DESCRIPTION_TRAIN = """\
Fine-tune. The same command resumes a run that was stopped, and does nothing where it is finished.
Without a recipe, --model NAME --data FILE writes one as `init` does.
On several devices: hf-finetune train --processes auto RECIPE ...
With --locked a run is repeated bit for bit, or refused with all that differs.
"""


def declare_train(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_recipe(parser)
    add = parser.add_argument
    add("--data", metavar="DATA", help="make the recipe for these data, as `init` does")
    add("--model", metavar="NAME", help="with --data: Hub id or folder")
    add("--task", metavar="KIND", help="with --data: the task; by default the likeliest")
    add("--processes", metavar="N|auto", type=processes, help="on this machine; auto: one a visible GPU, one on a CPU")


def run_train(arguments: argparse.Namespace) -> None:
    """Train."""
    from hf_finetune.pipeline.check import check, look, read

    recipe, overrides = given(arguments)
    reading, repeat = read(recipe, overrides, arguments.locked, arguments.allow_change, anew=arguments.restart)
    # Another process may have taken the run folder already.
    is_late = reading.recipe is not None and is_worker()
    found = look(reading, folder=not is_late, restart=arguments.restart, allowed=arguments.allow_change)
    if found.exit_code and reading.recipe is not None and repeat is None and not is_worker():
        # One report has all that is wrong, also what only the libraries can tell.
        found = check(reading, restart=arguments.restart, allow_change=arguments.allow_change).findings
    if reading.recipe is None or repeat is None:  # a repeat is refused with all that differs from its lock
        found.located(reading.locate).raise_errors()
    if reading.recipe is None:
        raise AssertionError("a recipe that can't be read has a problem")
    several = arguments.processes is not None and not is_worker()
    if several and Node.of(os.environ, arguments.processes).needs_launcher:
        log.close()  # the live display belongs to the processes
        command = [sys.executable, "-m", "hf_finetune.launch", *arguments.words]
        os.execv(sys.executable, command)  # noqa: S606, no shell is the point
    for note in reading.notes:
        log.say(f"note: {note}")
    if repeat is not None:
        log.say(f"note: repeats the run of {repeat.file} in {reading.recipe.output}")
    # Imported after the recipe is known to be right: this takes seconds.
    with log.phase("loading libraries"):
        from hf_finetune.pipeline.train import train

    train(reading, restart=arguments.restart, allow_change=arguments.allow_change, locked=repeat)


# hf-finetune evaluate

HELP_EVALUATE = "the metrics of a finished run on any data, by slice, against its base or another run"
DESCRIPTION_EVALUATE = """\
The task's metrics with 95 % bootstrap intervals, on a split of the run's recipe (test, else validation) or on files.
What comes of it is kept in RUN/evaluations/.
"""


def declare_evaluate(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_run(parser, "task.generate_rows=100")
    add = parser.add_argument
    text = "labelled rows, or a glob; may be given several times"
    add("--data", metavar="FILE", action="append", default=[], help=text)
    add("--split", choices=("train", "validation", "test"), help="a split of the run's recipe")
    text = "metrics for each value of a column too; may be given several times"
    add("--by", metavar="COLUMN", action="append", default=[], help=text)
    text = "compare on the same rows with another run, `base`, or `bm25` (rankings); may be given several times"
    add("--against", metavar="RUN|base|bm25", action="append", default=[], help=text)
    add("--format", choices=("text", "json", "markdown"), default="text", help="how to print it")
    add("--all", action="store_true", help="the metrics of each class too")
    text = "tasks of lm-eval, e.g. arc_easy,hellaswag (needs the extra `harness`)"
    add("--lm-eval", metavar="TASK,...", help=text)
    add("--lm-eval-tasks", metavar="DIR", help="folder with lm-eval tasks of your own")
    add("--lm-eval-limit", metavar="N", type=count("rows"), help="first N rows of each task of lm-eval")


def run_evaluate(arguments: argparse.Namespace) -> None:
    """Evaluate."""
    if arguments.format != "text":  # what it does meanwhile is no part of the document
        log.open_for(arguments.log_format, quiet=True)
    from hf_finetune.inference import opening

    overrides = tuple(arguments.overrides)
    # Given lm-eval alone, no rows of the run are read.
    is_read = not arguments.lm_eval or arguments.data or arguments.split is not None
    opening.look(
        arguments.run_folder,
        overrides,
        others=arguments.against,
        files=arguments.data,
        split=(arguments.split or opening.HELD_OUT) if is_read else None,
        columns=arguments.by,
    )
    with log.phase("loading libraries"):
        from hf_finetune.inference import evaluate

    if arguments.lm_eval:
        evaluate.run_lm_eval(
            arguments.run_folder,
            overrides,
            arguments.lm_eval.split(","),
            folder=arguments.lm_eval_tasks,
            limit=arguments.lm_eval_limit,
            form=arguments.format,
        )
        if not is_read:
            return
    evaluate.evaluate(
        arguments.run_folder,
        overrides,
        files=arguments.data,
        split=arguments.split,
        by=arguments.by,
        against=arguments.against,
        form=arguments.format,
        everything=arguments.all,
    )


# hf-finetune predict

HELP_PREDICT = "labels, numbers or generated text for rows of a file or a pipe"
DESCRIPTION_PREDICT = """\
Predict every row of a csv, tsv, json, jsonl or parquet file, or every line of a text: the same rows come out, in order,
with label, score and probabilities, a value, or generated text. A call with --output that was killed continues where
it stopped.
"""


def declare_predict(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_run(parser, "training.eval_batch=8")
    add = parser.add_argument
    add("--input", metavar="FILE|-", default="-", help="rows; by default standard input")
    add("--output", metavar="FILE|-", default="-", help="by default standard output")
    formats = ("csv", "tsv", "jsonl", "parquet")
    text = "where suffix or first line do not tell; of standard input: a header, JSON, or else `lines`, a text each"
    add("--input-format", choices=(*formats, "json", "lines"), help=text)
    text = "by default that of the output's suffix, else of the input; jsonl for lines"
    add("--format", choices=formats, help=text)
    text = "end with 3 (default), leave the row out, or write it without a prediction; counted in every case"
    add("--on-bad-row", choices=("error", "skip", "null"), default="error", help=text)
    add("--max-new-tokens", metavar="N", type=count("tokens"), help="most tokens of a generated answer")
    text = "put before the names of output columns; by default `predicted_` where one is taken, else nothing"
    add("--prefix", metavar="TEXT", help=text)
    text = "likeliest labels of a row; by default all in a file, and 3 on standard output where there are more than 5"
    add("--top", metavar="N|all", type=top, help=text)
    add("--restart", action="store_true", help="begin anew, and replace a finished output")


def run_predict(arguments: argparse.Namespace) -> None:
    """Predict."""
    if arguments.output == "-":  # what it does meanwhile is no part of the rows
        log.open_for(arguments.log_format, quiet=True)
    from hf_finetune.config.paths import refuse_outside
    from hf_finetune.inference import opening, rows

    named = (("--input", arguments.input), ("--output", arguments.output))
    refuse_outside((option, path) for option, path in named if path != "-")  # before it is said whether it is there
    opening.look(arguments.run_folder, arguments.overrides)
    rows.find(arguments.input, arguments.input_format)
    if arguments.output != "-":
        opening.refuse_output(arguments.output, restart=arguments.restart)
    with log.phase("loading libraries"):
        from hf_finetune.inference import predict

    options = predict.Options(
        run=arguments.run_folder,
        overrides=tuple(arguments.overrides),
        input=arguments.input,
        output=arguments.output,
        input_format=arguments.input_format,
        form=arguments.format,
        on_bad_row=arguments.on_bad_row,
        max_new_tokens=arguments.max_new_tokens,
        prefix=arguments.prefix,
        top=arguments.top,
        restart=arguments.restart,
    )
    predict.run(options)


# hf-finetune chat

HELP_CHAT = "talk to a finished run; a classifier labels what you type"
DESCRIPTION_CHAT = """\
A language model answers what is typed, as it writes; a classifier labels each line. Input that comes from a pipe is
answered line by line, with nothing around the answers.
"""


def declare_chat(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_run(parser, "training.precision=fp32")
    parser.add_argument("--max-new-tokens", metavar="N", type=count("tokens"), help="most tokens of an answer")
    text = "draw tokens; by default the likeliest is taken"
    parser.add_argument("--temperature", metavar="T", type=number("from 0 to 100", 100), help=text)
    parser.add_argument("--system", metavar="TEXT", help="system turn; by default that of the recipe")


def run_chat(arguments: argparse.Namespace) -> None:
    """Chat."""
    from hf_finetune.inference import opening

    opening.look(arguments.run_folder, arguments.overrides)
    with log.phase("loading libraries"):
        from hf_finetune.inference import chat

    chat.run(
        arguments.run_folder,
        arguments.overrides,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        system=arguments.system,
    )


# hf-finetune merge

HELP_MERGE = "write a run as a plain model folder; quantise it, or export it to ONNX"
DESCRIPTION_MERGE = """\
Merge the adapter of a finished run, or the LoRAs of several runs on one base, into full weights and write a plain
Hugging Face model folder. It is loaded back by
transformers, compared with the run on real rows, and refused (exit code 4) where it says something else; it appears
whole or not at all. DIR/export.json has what was compared.
"""


def declare_merge(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_run(parser, "model.name=path/of/the/base; without `=`, a further run whose adapter is joined with the first")
    add = parser.add_argument
    text = "one for each run, e.g. 0.7 0.3 (equal ones that sum to 1)"
    add("--weights", metavar="W", nargs="+", type=number("of at least 0"), default=[], help=text)
    text = "how runs are joined: cat sums what they add to the weights, the others are PEFT's (cat)"
    add("--combine", choices=("cat", "linear", "ties", "dare_linear", "dare_ties"), default="cat", help=text)
    add(
        "--density",
        metavar="X",
        type=number("from 0 to 1", 1.0),
        default=0.5,
        help="share that ties and dare_* keep of a matrix (0.5)",
    )
    add("--to", metavar="DIR", required=True, help="the folder to make")
    text = "of the weights; as the base's checkpoint has them if not given"
    add("--dtype", choices=("fp32", "bf16", "fp16"), help=text)
    add("--shard-size", metavar="SIZE", default="5GB", help="most bytes of a weight file (5GB)")
    text = "most that logits may differ from the run's, as a share of the largest; by dtype if not given"
    add("--tolerance", metavar="X", type=number("of at least 0"), help=text)
    add("--overwrite", action="store_true", help="replace a folder that `merge` wrote")
    text = "compare on the rows of this file, not on the run's own; may be given several times"
    add("--data", metavar="FILE", action="append", default=[], help=text)
    add("--rows", metavar="N", type=count("rows"), default=1000, help="rows for metrics, at most (1000)")
    add("--quantize", choices=("int8", "int4"), help="also write DIR/int8 or DIR/int4, quantised by torchao")
    add("--onnx", action="store_true", help="also write DIR/onnx/model.onnx")


def run_merge(arguments: argparse.Namespace) -> None:
    """Merge."""
    from hf_finetune.inference import opening

    others = tuple(word for word in arguments.overrides if "=" not in word)
    overrides = [word for word in arguments.overrides if "=" in word]
    opening.look(arguments.run_folder, overrides, files=arguments.data)
    for run in others:
        opening.look(run)
    with log.phase("loading libraries"):
        from hf_finetune.inference import merge

    options = merge.Options(
        to=arguments.to,
        dtype=arguments.dtype,
        shard_size=arguments.shard_size,
        tolerance=arguments.tolerance,
        overwrite=arguments.overwrite,
        data=tuple(arguments.data),
        rows=arguments.rows,
        quantize=arguments.quantize,
        onnx=arguments.onnx,
        others=others,
        weights=tuple(arguments.weights),
        method=arguments.combine,
        density=arguments.density,
    )
    merge.merge(arguments.run_folder, options, overrides)


# hf-finetune push

HELP_PUSH = "upload the adapter of a finished run to the Hub"
DESCRIPTION_PUSH = """\
Upload adapter/ of a finished run to the Hub: weights, tokenizer, labels, card and charts, nothing else. Private unless
you say --public. The token is taken from HF_TOKEN or `hf auth login`. The same content twice makes no second commit.
Options replace the `hub` block of the run's recipe.
"""


def declare_push(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("run_folder", metavar="RUN", help="run folder")
    add("--repo", metavar="OWNER/NAME", help="repository; it is made where it is not there")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--private", dest="private", action="store_true", default=None, help="for you alone (default)")
    who.add_argument("--public", dest="private", action="store_false", default=None, help="for everybody")
    add("--as-pr", action="store_true", default=None, help="open a pull request instead of a commit")
    add("--tag", help="tag of this version; else run- and the id of the run")
    add("--timeout", metavar="SECONDS", type=float, help="of the whole upload; else 600")


def run_push(arguments: argparse.Namespace) -> None:
    """Upload."""
    from hf_finetune.hub import push

    names = ("repo", "private", "as_pr", "tag", "timeout")
    push.run(
        arguments.run_folder,
        {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None},
    )


# hf-finetune compare

HELP_COMPARE = "two runs side by side, or a leaderboard of many"
DESCRIPTION_COMPARE = """\
Compare runs by their folders. Two runs stand side by side: keys of the recipe that differ, metrics (the best is
marked), steps, time, speed, state. Three or more, or a folder of runs, make a leaderboard: one line a run, the best
first, with the keys that differ; what does not fit the terminal is left out and named.
A run that is not finished is shown with its last evaluation; in a folder, a run that can't be read is listed as broken.
"""


def declare_compare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("runs", metavar="RUN|FOLDER", nargs="+", help="run folder, or a folder of runs")
    text = "sort a leaderboard by this, e.g. loss or test_accuracy; by default what the runs were selected by"
    parser.add_argument("--sort", metavar="METRIC", help=text)
    text = "csv, json and md have every column; markdown is md"
    forms = ("text", "csv", "json", "md", "markdown")
    parser.add_argument("--format", choices=forms, default="text", help=text)
    text = "every metric, e.g. those of each class; not the main ones only"
    parser.add_argument("--all", action="store_true", help=text)


def run_compare(arguments: argparse.Namespace) -> None:
    """Print the comparison."""
    from hf_finetune.reports import compare

    compared = compare.compare(arguments.runs, everything=arguments.all, sort=arguments.sort)
    show(compare.render(compared, arguments.format.replace("markdown", "md")))


# hf-finetune tensorboard

HELP_TENSORBOARD = "watch a run in TensorBoard, or make its events again"
DESCRIPTION_TENSORBOARD = """\
Start TensorBoard on a run, or on a folder of runs; Ctrl-C ends it. With --rebuild, show nothing, but write the
run's events anew from metrics.jsonl, samples.jsonl and observations/: after a kill, a full disk, or where
`tracking.tensorboard` was false.
"""


def declare_tensorboard(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("run_folder", metavar="RUN", help="run folder; without --rebuild, also a folder of several")
    parser.add_argument("--rebuild", action="store_true", help="write the events anew from what the run folder holds")
    text = "by default 6006, or the next that is free; 0 takes any"
    parser.add_argument("--port", metavar="N", type=int, help=text)
    text = "address to listen on, e.g. 0.0.0.0 for all of this machine; by default only this machine can look"
    parser.add_argument("--host", metavar="ADDRESS", help=text)


def run_tensorboard(arguments: argparse.Namespace) -> None:
    """Show a run, or a folder of runs; or write the events of a run again."""
    from hf_finetune.tracking.logdir import watch

    options = [f"--{name}={value}" for name in ("port", "host") if (value := getattr(arguments, name)) is not None]
    watch(arguments.run_folder, options, rebuild=arguments.rebuild)


# hf-finetune schema

HELP_SCHEMA = "print the JSON Schema of a recipe, for editors"
DESCRIPTION_SCHEMA = """\
Print the JSON Schema of a recipe. Editors complete and check a recipe that begins with
# yaml-language-server: $schema=recipe.schema.json
With --format markdown, print the same as a page to read: docs/recipe.md.
"""


def declare_schema(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--format", choices=("json", "markdown"), default="json", help="markdown: a page to read")


def run_schema(arguments: argparse.Namespace) -> None:
    """Print it."""
    from hf_finetune.recipe import json_schema, reference

    show(reference() if arguments.format == "markdown" else json.dumps(json_schema(), indent=2))


class Verb(NamedTuple):
    """One verb of the command line."""

    name: str
    help: str
    description: str
    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


VERBS = (
    Verb("init", HELP_INIT, DESCRIPTION_INIT, declare_init, run_init),
    Verb("recipes", HELP_RECIPES, DESCRIPTION_RECIPES, declare_recipes, run_recipes),
    Verb("train", HELP_TRAIN, DESCRIPTION_TRAIN, declare_train, run_train),
    Verb("check", checking.HELP, checking.DESCRIPTION, checking.declare, checking.run),
    Verb("evaluate", HELP_EVALUATE, DESCRIPTION_EVALUATE, declare_evaluate, run_evaluate),
    Verb("predict", HELP_PREDICT, DESCRIPTION_PREDICT, declare_predict, run_predict),
    Verb("chat", HELP_CHAT, DESCRIPTION_CHAT, declare_chat, run_chat),
    Verb("merge", HELP_MERGE, DESCRIPTION_MERGE, declare_merge, run_merge),
    Verb("push", HELP_PUSH, DESCRIPTION_PUSH, declare_push, run_push),
    Verb("compare", HELP_COMPARE, DESCRIPTION_COMPARE, declare_compare, run_compare),
    Verb("tensorboard", HELP_TENSORBOARD, DESCRIPTION_TENSORBOARD, declare_tensorboard, run_tensorboard),
    Verb("serve", serving.HELP_SERVE, serving.DESCRIPTION_SERVE, serving.declare_serve, serving.run_serve),
    Verb("serve-check", serve_check.HELP, serve_check.DESCRIPTION, serve_check.declare, serve_check.run),
    Verb("keys", serving.HELP_KEYS, serving.DESCRIPTION_KEYS, serving.declare_keys, serving.run_keys),
    Verb("schema", HELP_SCHEMA, DESCRIPTION_SCHEMA, declare_schema, run_schema),
)
