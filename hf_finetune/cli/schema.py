"""`hf-finetune schema`: the JSON Schema of a recipe, for editors."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_finetune.cli.parser import Parser, Verbs

DESCRIPTION = """\
Print the JSON Schema of a recipe. Editors complete and check a recipe that begins with
# yaml-language-server: $schema=recipe.schema.json
"""


def add(verbs: Verbs, common: Parser) -> None:
    """Declare the verb."""
    help_schema = "print the JSON Schema of a recipe, for editors"
    parser = verbs.add_parser("schema", parents=[common], help=help_schema, description=DESCRIPTION)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print it."""
    from hf_finetune.recipe import json_schema
    from hf_finetune.terminal import show

    show(json.dumps(json_schema(), indent=2))
