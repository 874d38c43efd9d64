"""One reading of a recipe: its files, the overrides, the block, every problem, and where each value came from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from hf_finetune.errors import Problem, RecipeError
from hf_finetune.schema import complaints, overrides, yamlwriter
from hf_finetune.schema.credentials import redacted
from hf_finetune.schema.layers import Layer, load, of_text
from hf_finetune.schema.origin import Origin
from hf_finetune.schema.partial import assemble
from hf_finetune.schema.replaced import Dropped
from hf_finetune.schema.yamlfile import KeyPath

Block = TypeVar("Block", bound=BaseModel)

DEFAULT = "default"


@dataclass(frozen=True)
class Reading(Generic[Block]):
    """What a recipe file and the overrides say."""

    recipe: Block | None
    """None where there are problems."""
    problems: list[Problem]
    """All that is wrong with the recipe in itself, by file and line."""
    partial: Any
    """The recipe as far as it could be read; a wrong or missing field raises AttributeError when it is read. None
    where the file could not be parsed."""
    origin: Origin
    gone: list[Dropped]
    """What the recipe gives and an override makes meaningless."""

    @property
    def dropped(self) -> list[str]:
        """Keys that an override makes meaningless, each once."""
        return list(dict.fromkeys(key for key, _ in self.gone))

    @property
    def notes(self) -> list[str]:
        """A sentence for each key of `dropped`, with the key that was overridden."""
        return [str(dropped) for dropped in self.gone]

    def locate(self, problem: Problem) -> Problem:
        """A problem with the file and line of the key that it names; one that has a file or no key stays as it is."""
        return self.origin.locate(problem)

    def explain(self) -> list[tuple[str, str, str]]:
        """Every value of the resolved recipe.

        Returns:
            Dotted key, value as YAML, and `file:line`, `command line` or `default`.

        Raises:
            RecipeError: There are problems.
        """
        return list(_leaves(self.checked().model_dump(mode="json"), (), self.origin))

    def checked(self) -> Block:
        """The recipe.

        Raises:
            RecipeError: There are problems; it carries them all.
        """
        if self.recipe is None:
            raise RecipeError(self.problems)
        return self.recipe


def read(model: type[Block], path: str, given: Sequence[str]) -> Reading[Block]:
    """Read a recipe file, what it extends, and `key.path=value` overrides; never raises for what they say.

    Args:
        model: Class of the recipe.
        path: The YAML file.
        given: Each `key.path=value`, the value in YAML.
    """
    return _read(model, lambda: load(path), path, given)


def read_text(model: type[Block], text: str, file: str, given: Sequence[str]) -> Reading[Block]:
    """Read a recipe that stands inside another file; like `read`.

    Args:
        model: Class of the recipe.
        text: Its YAML.
        file: What holds it.
        given: Each `key.path=value`, the value in YAML.
    """
    return _read(model, lambda: of_text(text, file), file, given)


def _read(model: type[Block], load_layer: Callable[[], Layer], file: str, given: Sequence[str]) -> Reading[Block]:
    try:
        layer = load_layer()
    except RecipeError as error:
        return Reading(None, [_hidden(problem) for problem in error.problems], None, Origin(file), [])
    gone = overrides.apply(given, layer)
    recipe, found, partial = _validate(model, layer)
    layer.problems += found
    problems = complaints.in_order(map(_hidden, layer.problems), layer.files)
    return Reading(None if problems else recipe, problems, recipe or partial, layer.origin, gone)


def _validate(model: type[Block], layer: Layer) -> tuple[Block | None, list[Problem], Any]:
    """The block, or what is wrong with it and what could be read of it."""
    unread, tree = set(layer.unread), layer.tree
    try:
        recipe = model.model_validate(layer.tree, by_alias=True, by_name=False)
    except ValidationError as error:
        unread |= complaints.misspelt(error, model)
        context = complaints.Context(model, layer.origin, unread, layer.complete)
        found = complaints.problems(error, context)
        likely = complaints.with_likely_kinds(error, model, tree)
        if likely is not None:
            tree = likely
            found += _below_likely_kinds(model, tree, context)
    else:
        if layer.complete and not unread:
            return recipe, [], None
        found = []
    partial = assemble(model, tree, unread if layer.complete else _Everything())
    return None, [*found, *complaints.rules(partial, layer.origin)], partial


def _below_likely_kinds(model: type[BaseModel], tree: dict[str, Any], context: complaints.Context) -> list[Problem]:
    """What is wrong besides a kind that is not known, once another one is put in its place."""
    try:
        model.model_validate(tree, by_alias=True, by_name=False)
    except ValidationError as error:
        context.unread |= complaints.misspelt(error, model)
        return complaints.problems(error, context)
    return []


class _Everything:
    """Holds whatever is asked for."""

    def __contains__(self, item: object) -> bool:
        return True


def _hidden(problem: Problem) -> Problem:
    """The same problem without anything that looks like a credential: YAML's own messages may quote the text."""
    return replace(problem, message=redacted(problem.message), key=redacted(problem.key))


def _leaves(value: Any, path: KeyPath, origin: Origin) -> Iterator[tuple[str, str, str]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key), origin)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, (*path, index), origin)
    else:
        place = origin.given(path)
        key = ".".join(str(part) for part in path)
        yield key, yamlwriter.inline(value), DEFAULT if place is None else str(place)
