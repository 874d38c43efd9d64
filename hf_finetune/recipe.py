"""`Recipe`: one YAML file, one fine-tuning run. Load, override, dump, JSON Schema. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Self

import yaml
from pydantic import Field, SerializeAsAny, ValidationError, model_validator

from hf_finetune.adapters import Adapter
from hf_finetune.errors import Problem, RecipeError
from hf_finetune.plugins import Section, union
from hf_finetune.schema import complaints, yamlfile
from hf_finetune.schema.blocks import Checkpoints, Data, Model, Name, Training
from hf_finetune.tasks import Task

BELONGS_TO = {"model.name": ("model.revision",), "data.source": ("data.subset", "data.revision")}
"""Overriding the key on the left drops those on the right, unless they are overridden too: a commit of another
repository means nothing."""

_UNFOLDED = 1 << 20

if TYPE_CHECKING:
    AnyTask = Task
    AnyAdapter = Adapter
else:
    AnyTask = SerializeAsAny[union("hf_finetune.tasks", Task)]
    AnyAdapter = SerializeAsAny[union("hf_finetune.adapters", Adapter)]


class Recipe(Section):
    """One fine-tuning run."""

    version: Annotated[int, Field(ge=1, le=1)] = 1
    """Format of this file."""
    task: AnyTask
    """What the model learns."""
    model: Model
    """What it starts from."""
    data: Data
    """What it learns from."""
    adapter: AnyAdapter
    """Which of its weights are trained."""
    training: Training
    """How it learns."""
    checkpoints: Checkpoints = Checkpoints()
    """What is kept on the way."""
    output: Name
    """The run folder: everything this run writes."""

    @classmethod
    def load(cls, path: str, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe file and apply `key.path=value` overrides.

        Args:
            path: The YAML file.
            overrides: Each `key.path=value`, the value in YAML.

        Returns:
            The recipe, every default filled in.

        Raises:
            RecipeError: The file or an override is wrong; it carries every problem that was found.
        """
        document = yamlfile.read(path)
        tree, origin = document.value, complaints.Origin(path, document.lines)
        found = [*document.problems, *_apply(overrides, tree, origin)]
        try:
            recipe = cls.model_validate(tree, by_alias=True, by_name=False)
        except ValidationError as error:
            found += complaints.problems(error, cls, tree, origin)
        if found:
            raise RecipeError(complaints.in_order(found))
        return recipe

    def dump(self) -> str:
        """This recipe as YAML, with every default; `load` reads it back to an equal recipe."""
        text: str = yaml.dump(
            self.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=_UNFOLDED
        )
        return text

    @model_validator(mode="after")
    def _packing_fits_task(self) -> Self:
        if self.data.packing and not self.task.packable:
            raise ValueError(f"data.packing: {self.task.kind} rows can't share a sequence; set it to false")
        return self

    @model_validator(mode="after")
    def _streaming_ends(self) -> Self:
        if self.data.streaming and self.training.steps is None:
            raise ValueError("training.steps: streaming data have no known end; give steps instead of epochs")
        return self

    @model_validator(mode="after")
    def _selection_has_validation(self) -> Self:
        if self.training.best_metric and self.data.validation is None and self.data.validation_share is None:
            raise ValueError("training.best_metric: there is no validation split; set data.validation")
        return self

    @model_validator(mode="after")
    def _selection_has_metric(self) -> Self:
        best = self.training.best_metric
        if best is not None and best not in self.task.best_metrics:
            known = complaints.suggestion(best, list(self.task.best_metrics))
            raise ValueError(f"training.best_metric: {self.task.kind} has no metric {best!r}{known}")
        return self


class _Dumper(yaml.SafeDumper):
    """Quotes every text that `yamlfile` would read as something else, and writes floats that it reads back."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quoted = not isinstance(yamlfile.resolve_scalar(text), str)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'" if quoted else None)


_Dumper.add_representer(str, _represent_text)


def _apply(overrides: Sequence[str], tree: dict[str, Any], origin: complaints.Origin) -> list[Problem]:
    """Set every `key.path=value` in the tree, the last one of a key last; returns those that can't be set."""
    found: list[Problem] = []
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not all(key.split(".")):
            message = f"{override!r} is no override; write key.path=value"
            found.append(Problem(message, file=complaints.OVERRIDE))
            continue
        try:
            document = yamlfile.parse(text, complaints.OVERRIDE)
            _set(tree, key, document.value, origin)
        except RecipeError as error:
            found += (Problem(problem.message, key=key, file=complaints.OVERRIDE) for problem in error.problems)
        else:
            found += (Problem(p.message, key=f"{key}.{p.key}", file=p.file) for p in document.problems)
    given = {override.partition("=")[0] for override in overrides}
    for owner, keys in BELONGS_TO.items():
        for key in keys:
            if owner in given and key not in given:
                _remove(tree, key.split("."))
    return found


def _set(tree: dict[str, Any], key: str, value: Any, origin: complaints.Origin) -> None:
    """Set one key; blocks on the way are made where there are none."""
    *way, last = key.split(".")
    node: Any = tree
    path: yamlfile.KeyPath = ()
    for part in way:
        index = _index(node, part)
        child = node.get(index) if isinstance(node, dict) else node[index]
        if not isinstance(child, dict | list):
            child = node[index] = {}
        node, path = child, (*path, index)
    index = _index(node, last)
    node[index] = value
    origin.overridden.add((*path, index))


def _index(node: dict[str, Any] | list[Any], part: str) -> str | int:
    """The part of a key as an index of its block or list."""
    if isinstance(node, dict):
        return part
    if part.isdecimal() and len(part) < 10 and int(part) < len(node):
        return int(part)
    raise RecipeError(f"the list has {len(node)} entries, counted from 0; there is no entry {part!r}")


def _remove(tree: dict[str, Any], path: list[str]) -> None:
    for part in path[:-1]:
        child = tree.get(part)
        if not isinstance(child, dict):
            return
        tree = child
    tree.pop(path[-1], None)
