"""Arguments of the verbs that take a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_finetune.cli.parser import Parser


def add_recipe(parser: Parser) -> None:
    """The recipe, what replaces its values, and what is done about an earlier run."""
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file")
    help_overrides = "replaces a value of the recipe, e.g. training.learning_rate=1e-4; the value in YAML"
    parser.add_argument("overrides", metavar="key.path=value", nargs="*", help=help_overrides)
    parser.add_argument("--restart", action="store_true", help="move an earlier run in the same folder aside")
    help_allow = "go on with an earlier run though this key was changed; may be given several times"
    parser.add_argument("--allow-change", metavar="KEY", action="append", default=[], help=help_allow)
