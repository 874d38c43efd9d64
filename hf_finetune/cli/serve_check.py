"""The verb `serve-check`."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

from hf_finetune.cli.arguments import add_run, count, number
from hf_finetune.errors import Problem, RecipeError

HELP = "compare the answers of a server, e.g. vLLM, with those of the run that it should serve"
DESCRIPTION = """\
Ask any server with OpenAI's API the test or validation rows of a run, and compare answers and log-probabilities of
their tokens with those of the run itself (of a classifier: probabilities). Exit code 4 where they differ beyond the
tolerance. Where an answer parts from the run's, it counts as equal if the run holds both tokens for equally likely,
within the tolerance.
"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add_run(parser, "model.name=where/the/base/is")
    add("--url", required=True, help="of the server, e.g. http://127.0.0.1:8000/v1")
    add("--model", metavar="NAME", help="of the model on the server; default: the name of the run folder")
    add("--rows", type=count("rows"), default=32, help="rows to ask; default 32")
    text = "in nats, of classifiers in probability; default 0.05"
    add("--tolerance", type=number("of nats"), default=0.05, help=text)
    add("--max-new-tokens", type=count("tokens"), help="tokens of an answer; default: as the recipe says")
    add("--api-key-env", metavar="NAME", default="OPENAI_API_KEY", help="variable that holds the key of the server")


def run(arguments: argparse.Namespace) -> None:
    """Compare."""
    from hf_finetune.inference import opening

    if not arguments.url.startswith(("http://", "https://")):
        raise RecipeError(Problem("must begin with http:// or https://", key="--url"))
    if not importlib.util.find_spec("httpx2"):
        raise RecipeError("serve-check needs httpx2; pip install 'hf-finetune[service]'")
    opening.look(arguments.run_folder, arguments.overrides)
    from hf_finetune.service import parity

    options = parity.Options(
        run=arguments.run_folder,
        url=arguments.url,
        model=arguments.model or Path(arguments.run_folder).absolute().name,
        key=os.environ.get(arguments.api_key_env, ""),
        rows=arguments.rows,
        tolerance=arguments.tolerance,
        max_new_tokens=arguments.max_new_tokens,
    )
    parity.check(options, arguments.overrides)
