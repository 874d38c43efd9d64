"""`hf-finetune push`: uploads the adapter of a finished run."""

from __future__ import annotations

import argparse

HELP = "upload the adapter of a finished run to the Hub"
DESCRIPTION = """\
Upload adapter/ of a finished run to the Hub: weights, tokenizer, labels, card and charts, nothing else. Private unless
you say --public. The token is taken from HF_TOKEN or `hf auth login`. The same content twice makes no second commit.
Options replace the `hub` block of the run's recipe.
"""


def declare(parser: argparse.ArgumentParser) -> None:
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


def run(arguments: argparse.Namespace) -> None:
    """Upload."""
    from hf_finetune.hub import push

    names = ("repo", "private", "as_pr", "tag", "timeout")
    push.run(
        arguments.run_folder,
        {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None},
    )
