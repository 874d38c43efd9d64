"""`hf-finetune push`: uploads the adapter of a finished run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_finetune.cli.parser import Parser, Verbs

DESCRIPTION = """\
Upload adapter/ of a finished run to the Hub: weights, tokenizer, labels, card and charts, nothing else. Private unless
you say --public. The token is taken from HF_TOKEN or `hf auth login`. The same content twice makes no second commit.
Options replace the `hub` block of the run's recipe.
"""


def add(verbs: Verbs, common: Parser) -> None:
    """Declare the verb."""
    help_verb = "upload the adapter of a finished run to the Hub"
    parser = verbs.add_parser("push", parents=[common], help=help_verb, description=DESCRIPTION)
    parser.add_argument("run_folder", metavar="RUN", help="run folder")
    parser.add_argument("--repo", metavar="OWNER/NAME", help="repository; it is made where it is not there")
    who = parser.add_mutually_exclusive_group()
    who.add_argument("--private", dest="private", action="store_true", default=None, help="for you alone (default)")
    who.add_argument("--public", dest="private", action="store_false", default=None, help="for everybody")
    parser.add_argument("--as-pr", action="store_true", default=None, help="open a pull request instead of a commit")
    parser.add_argument("--tag", help="tag of this version; else run- and the id of the run")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, help="of the whole upload; else 600")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Upload.

    Raises:
        RecipeError: There is no finished run, or nothing says where to.
        PushError: It was not uploaded.
    """
    from hf_finetune.hub import push

    names = ("repo", "private", "as_pr", "tag", "timeout")
    push.run(
        arguments.run_folder,
        {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None},
    )
