"""`hf-finetune schema`: the JSON Schema of a recipe for editors, or its reference for readers."""

from __future__ import annotations

import argparse
import json

HELP = "print the JSON Schema of a recipe, for editors"
DESCRIPTION = """\
Print the JSON Schema of a recipe. Editors complete and check a recipe that begins with
# yaml-language-server: $schema=recipe.schema.json
With --format markdown, print the same as a page to read: docs/recipe.md.
"""


def declare(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("--format", choices=("json", "markdown"), default="json", help="markdown: a page to read")


def run(arguments: argparse.Namespace) -> None:
    """Print it."""
    from hf_finetune.recipe import json_schema, reference
    from hf_finetune.terminal import show

    show(reference() if arguments.format == "markdown" else json.dumps(json_schema(), indent=2))
