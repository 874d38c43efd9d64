"""`hf-finetune schema`: the JSON Schema of a recipe for editors, or its reference for readers."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_finetune.cli.parser import Parser, Verbs

DESCRIPTION = """\
Print the JSON Schema of a recipe. Editors complete and check a recipe that begins with
# yaml-language-server: $schema=recipe.schema.json
With --format markdown, print the same as a page to read: docs/recipe.md.
"""


def add(verbs: Verbs, common: Parser) -> None:
    """Declare the verb."""
    help_schema = "print the JSON Schema of a recipe, for editors"
    parser = verbs.add_parser("schema", parents=[common], help=help_schema, description=DESCRIPTION)
    parser.add_argument("--format", choices=("json", "markdown"), default="json", help="markdown: a page to read")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print it."""
    from hf_finetune.recipe import json_schema, reference
    from hf_finetune.terminal import show

    show(reference() if arguments.format == "markdown" else json.dumps(json_schema(), indent=2))
