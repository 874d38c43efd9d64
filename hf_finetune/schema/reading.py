"""One reading of a recipe: the values, every problem, and where each value came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from hf_finetune.errors import Problem, RecipeError
from hf_finetune.schema import complaints, layers, yamlwriter
from hf_finetune.schema.credentials import redacted
from hf_finetune.schema.layers import Layer
from hf_finetune.schema.origin import Origin
from hf_finetune.schema.yamlfile import KeyPath

Block = TypeVar("Block", bound=BaseModel)


@dataclass(frozen=True)
class Reading(Generic[Block]):
    """A recipe as its files and the overrides say it."""

    recipe: Block | None
    """None where there are problems."""
    problems: list[Problem]
    """All that is wrong with the recipe in itself, by file and line."""
    partial: Any
    """The recipe as far as it could be read: a wrong or missing field raises AttributeError. None where the file could
    not be parsed."""
    origin: Origin
    dropped: dict[str, str] = field(default_factory=dict)
    """Keys that an override made meaningless, each with the key that was overridden."""

    @property
    def notes(self) -> list[str]:
        """A sentence for each dropped key."""
        return [
            f"{key} of the recipe is not used, because {owner} was overridden" for key, owner in self.dropped.items()
        ]

    def locate(self, problem: Problem) -> Problem:
        """Add the file and line of the key that a problem names; one that has a file or no key stays as it is."""
        return self.origin.locate(problem)

    def checked(self) -> Block:
        """Give the recipe.

        Raises:
            RecipeError: There are problems; it carries them all.
        """
        if self.recipe is None:
            raise RecipeError(self.problems)
        return self.recipe

    def explain(self) -> list[tuple[str, str, str]]:
        """List every value of the resolved recipe: dotted key, YAML, and `file:line`, `command line` or `default`.

        Raises:
            RecipeError: There are problems.
        """

        def leaves(value: Any, path: KeyPath) -> Iterator[tuple[str, str, str]]:
            if isinstance(value, dict) and value:
                for key, inner in value.items():
                    yield from leaves(inner, (*path, key))
            elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
                for index, item in enumerate(value):
                    yield from leaves(item, (*path, index))
            else:
                place = self.origin.places.get(path, "default")
                yield ".".join(map(str, path)), yamlwriter.inline(value), str(place)

        return list(leaves(self.checked().model_dump(mode="json"), ()))


def read(model: type[Block], path: str, given: Sequence[str]) -> Reading[Block]:
    """Read a recipe file, what it extends, and `key.path=value` overrides; problems are part of the result.

    Args:
        model: Class of the recipe.
        path: The YAML file.
        given: Each `key.path=value`, the value in YAML.
    """
    return _read(model, lambda: layers.load(path, model), path, given)


def read_text(model: type[Block], text: str, file: str, given: Sequence[str]) -> Reading[Block]:
    """Read a recipe that stands inside another file, `file`; like `read`."""
    return _read(model, lambda: layers.of_text(text, file, model), file, given)


def _read(model: type[Block], load: Callable[[], Layer], file: str, given: Sequence[str]) -> Reading[Block]:
    def hidden(problem: Problem) -> Problem:
        # YAML's own messages may quote the text, with whatever secret stands in it.
        return replace(problem, message=redacted(problem.message), key=redacted(problem.key))

    try:
        layer = load()
    except RecipeError as error:
        return Reading(None, list(map(hidden, error.problems)), None, Origin(file))
    layers.override(given, layer)
    recipe: Block | None = None
    try:
        recipe = model.model_validate(layer.tree, by_alias=True, by_name=False)
    except ValidationError as error:
        mistakes = [Problem(detail["msg"], ".".join(map(str, detail["loc"]))) for detail in error.errors()]
    else:
        mistakes = []
    partial: Any = recipe
    if recipe is None or layer.unread or not layer.complete:
        examined = complaints.Examination(model, layer.tree, layer.origin, unread=layer.unread, complete=layer.complete)
        partial = examined.partial
        layer.problems += examined.problems()
        if not layer.problems:
            # pydantic sees more than the examination does; better in its words than not at all.
            layer.problems += mistakes
    problems = complaints.in_order(map(hidden, layer.problems), layer.files)
    return Reading(None if problems else recipe, problems, partial, layer.origin, layer.dropped)
