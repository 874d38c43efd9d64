"""Bodies of requests, and the keys of a recipe that a caller may set."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetPydanticSchema,
    JsonValue,
    ModelWrapValidatorHandler,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from hf_finetune.config.problems import Option, keys, options, shown
from hf_finetune.config.section import Key
from hf_finetune.config.suggestions import suggestion
from hf_finetune.recipe import Recipe

Json = Annotated[Any, GetPydanticSchema(lambda _, handler: handler(JsonValue))]
"""Anything that JSON can say, but not nested without end."""
UNKNOWN = "unknown_field"
"""Type of the error of a field that there is not."""


class Body(BaseModel):
    """A body: what it does not name is refused."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _can_be_written(cls, given: Any) -> Any:
        """Refuse halves of characters, which JSON can say and UTF-8 can't: in every name and text of the body."""
        with suppress(TypeError, RecursionError):  # refused by its field
            json.dumps(given, ensure_ascii=False).encode()
        return given

    @model_validator(mode="wrap")
    @classmethod
    def _knows(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """Say which field was probably meant by one that there is not."""
        try:
            return handler(given)
        except ValidationError as error:
            found: list[InitErrorDetails] = []
            for one in error.errors():
                detail = InitErrorDetails(type=one["type"], loc=one["loc"], input=one["input"], ctx=one.get("ctx", {}))
                if one["type"] == "extra_forbidden" and len(one["loc"]) == 1:
                    said = f"is no field here{suggestion(str(one['loc'][0])[:100], list(keys(cls)))}"
                    detail["type"] = PydanticCustomError(UNKNOWN, "{said}", {"said": said})
                elif one["type"] == UNKNOWN:  # of a body within this one
                    detail["type"] = PydanticCustomError(UNKNOWN, "{said}", one["ctx"])
                found.append(detail)
            raise ValidationError.from_exception_data(cls.__name__, found) from None


def faults(errors: Iterable[tuple[Sequence[Any], Mapping[str, Any]]]) -> dict[str, str]:
    """Put pydantic's errors into words, one sentence a field: each alternative of a union has an error of its own."""
    said: dict[str, dict[str, Any]] = {}
    for place, error in errors:
        # pydantic names the alternatives among the fields, e.g. `literal['auto']`.
        parts = [str(part) for part in place if not re.search(r"[\[(]|^constrained-|^(str|Chats)$", str(part))]
        message = (
            "is missing"
            if error["type"] == "missing"
            else error["msg"].partition(", unable to")[0].replace(" after validation", "")
        )
        given = error["input"]
        if error["type"] not in ("missing", UNKNOWN) and isinstance(given, str | int | float | None):
            message = f"{message}, not {shown(given)}"
        said.setdefault(".".join(parts), {})[message] = None
    return {field: _joined(list(messages)) for field, messages in said.items()}


def _joined(messages: Sequence[str]) -> str:
    """Make one sentence of what pydantic says of one value: `must be 'auto' or a valid integer, not 'three'`."""
    begin = "Input should be "
    wanted = [message.removeprefix(begin) for message in messages if message.startswith(begin)]
    others = [message[0].lower() + message[1:] for message in messages if not message.startswith(begin)]
    *first, last = wanted or [""]
    whole = " or ".join([*(one.rpartition(", not ")[0] or one for one in first), last])
    return "; ".join(filter(None, [f"must be {whole}" if whole else "", *others]))


class Hyperparameters(Body):
    """`auto` leaves the choice to the recipe's defaults."""

    n_epochs: Literal["auto"] | Annotated[int, Field(ge=1, le=50)] = "auto"
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=256)] = "auto"
    learning_rate_multiplier: Literal["auto"] | Annotated[float, Field(gt=0, le=1000)] = "auto"


class Supervised(Body):
    """Settings of the method."""

    hyperparameters: Hyperparameters = Hyperparameters()


class PreferenceHyperparameters(Hyperparameters):
    """Those of pairs of answers, too."""

    beta: Literal["auto"] | Annotated[float, Field(gt=0, le=2)] = "auto"


class Dpo(Body):
    """Settings of the method."""

    hyperparameters: PreferenceHyperparameters = PreferenceHyperparameters()


class Method(Body):
    """OpenAI's `method`."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised = Supervised()
    dpo: Dpo = Dpo()
    reinforcement: dict[str, Json] | None = None


class ClassifierTarget(Body):
    """Mistral's description of what a classifier tells."""

    name: Annotated[str, Field(min_length=1, max_length=1024)]
    labels: Annotated[list[Annotated[str, Field(min_length=1, max_length=1024)]], Field(min_length=2)] | None = None
    weight: float = 1.0
    loss_function: Literal["single_class", "multi_class"] | None = None

    def task(self) -> dict[str, Any]:
        """Give the same as keys of the block `task`."""
        found: dict[str, Any] = {"label": self.name}
        if self.labels is not None:
            found["labels"] = self.labels
        if self.loss_function is not None:
            found["problem"] = {"single_class": "single_label", "multi_class": "multi_label"}[self.loss_function]
        return found


PAIRS = 16
"""Of metadata, as at OpenAI."""
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=PAIRS)
]


class JobRequest(Body):
    """A new job; `recipe`, `job_type`, `classifier_targets`, `priority` and `devices` are not OpenAI's."""

    model: Annotated[str, Field(min_length=1, max_length=200)]
    training_file: str
    validation_file: str | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    suffix: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_. -]+$")] | None = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    metadata: Metadata | None = None
    integrations: list[dict[str, Json]] | None = None
    recipe: dict[str, Json] | None = None
    job_type: Literal["completion", "classifier"] | None = None
    classifier_targets: list[ClassifierTarget] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    devices: Annotated[int, Field(ge=1, le=64)] | None = None

    @property
    def asked(self) -> Hyperparameters:
        """The hyperparameters, wherever they stand."""
        if self.hyperparameters is not None or self.method is None:
            return self.hyperparameters or Hyperparameters()
        return (self.method.dpo if self.method.type == "dpo" else self.method.supervised).hyperparameters

    def refusals(self) -> Iterator[tuple[str, str]]:
        """Name the fields that ask for what there is not, each with the reason."""
        if self.method is not None and self.method.type == "reinforcement":
            yield "method", "reinforcement is not offered here; train with supervised or dpo"
        if self.integrations:
            yield "integrations", "are set up by the operator of this service; leave them out"
        targets = self.classifier_targets
        if targets is not None:
            if self.job_type != "classifier":
                yield "classifier_targets", "need job_type classifier"
            if len(targets) != 1:
                yield "classifier_targets", "must be one; train a model for each target"
            if any(target.weight != 1 for target in targets):
                yield "classifier_targets.0.weight", "weighs several targets, and one is trained; leave it out"
            task = (self.recipe or {}).get("task")
            if isinstance(task, dict) and task.keys() & {"label", "labels", "problem"}:
                yield "classifier_targets", "say the same as recipe.task; give one of both"
        yield from refused([Recipe], self.recipe or {}, "recipe.")


def refused(blocks: Sequence[type[BaseModel]], tree: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Name the keys of a recipe that a caller may not set, each with the reason.

    A key is open where its type says that it can name no path, account, code or machine, or where the field itself
    says so (`Key.caller`): one that somebody adds is closed until then, if it holds text.

    Args:
        blocks: Classes that the block may be.
        tree: What was given.
        before: The dotted key of the block, with a dot at its end.
    """
    for name, value in tree.items():
        infos = [keys(block)[name] for block in blocks if name in keys(block)]
        if not infos:
            known = dict.fromkeys(key for block in blocks for key in keys(block))
            yield before + name, f"is no key of a recipe{suggestion(name, list(known))}"
            continue
        found = [option for info in infos for option in options(info)]
        inner = [option.block for option in found if option.block is not None]
        if any(_said(info) is False for info in infos):
            yield before + name, "is set by this service"
        elif inner and isinstance(value, Mapping):
            yield from refused(inner, value, f"{before}{name}.")
        elif any(_said(info) is None and not _is_closed(info) for info in infos):
            yield before + name, "is set by this service"
        elif inner and not _is_short(value, found, infos):
            yield before + name, "must be a block of keys"


def may_set(dotted: str) -> bool:
    """Tell whether a caller may set a key of a recipe, e.g. `training.epochs`, or some key of a block."""
    tree: Any = {}
    for part in reversed(dotted.split(".")):
        tree = {part: tree}
    return not list(refused([Recipe], tree))


def _is_short(value: Any, found: Sequence[Option], infos: Sequence[FieldInfo]) -> bool:
    """Recognise what may stand for a block: a word such as `adapter: lora` or `checkpoints: off`, or null."""
    if value is None:
        return any(type(None) in get_args(info.annotation) for info in infos)
    return any(value in option.choices or value == option.tag for option in found)


def _said(info: FieldInfo) -> bool | None:
    said = [item.caller for item in info.metadata if isinstance(item, Key) and item.caller is not None]
    return said[-1] if said else None


def _is_closed(info: FieldInfo) -> bool:
    """Tell that a field holds nothing but numbers, truths, listed words, and blocks of such."""
    return all(option.choices or option.block or option.type in (bool, int, float) for option in options(info))
