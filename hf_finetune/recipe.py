"""`Recipe`: one YAML file, one fine-tuning run. Load, override, dump, JSON Schema. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self

from pydantic import Field, SerializeAsAny, model_validator
from pydantic.fields import FieldInfo

from hf_finetune.adapters.base import Adapter
from hf_finetune.config import reading, yamlfile
from hf_finetune.config.blocks import (
    NO_CHECKPOINTS,
    Checkpoints,
    Data,
    Hub,
    Model,
    Name,
    Source,
    Speed,
    Tracking,
    Training,
    changed,
)
from hf_finetune.config.paths import NO_COMMIT, is_commit
from hf_finetune.config.reading import Reading
from hf_finetune.config.reference import markdown, schema
from hf_finetune.config.section import HOST, OUTSIDE, STUDY, Key, Section, discover, union
from hf_finetune.config.suggestions import suggestion
from hf_finetune.config.yamlfile import KeyPath
from hf_finetune.tasks._tokens import PACKED_ATTENTION
from hf_finetune.tasks.base import Task

# mypy can't see a union that is made of the files of a folder.
if TYPE_CHECKING:
    AnyTask = Task
    AnyAdapter = Adapter
else:
    # A dump would otherwise have only the fields of `Task`.
    AnyTask = SerializeAsAny[union("hf_finetune.tasks", Task)]
    AnyAdapter = SerializeAsAny[union("hf_finetune.adapters", Adapter)]


ADAPTERS: Mapping[str, type[Adapter]] = discover("hf_finetune.adapters", Adapter)  # type: ignore[assignment]
TASKS: Mapping[str, type[Task]] = discover("hf_finetune.tasks", Task)  # type: ignore[assignment]
DEFAULT_ADAPTER, DEFAULT_EPOCHS = "lora", 3
MOST_ROWS = 50_000
"""Training rows from which on the rules ask for no more."""
SMALL = 512
"""Hidden size below which a model takes a higher learning rate, as in `recipes/quickstart.yaml`."""
CONVOLUTIONS = 1e-3
"""Learning rate of a convolutional model that is trained whole."""
RECIPE, NUMBER = "{recipe}", "{n}"
"""Places in `output`: for the name of the recipe's file, and for a number that `run.folder.numbered` chooses."""


class Recipe(Section):
    """One fine-tuning run."""

    version: Annotated[int, Field(ge=1, le=1), Key(resume="free", lock="ignored"), HOST] = 1
    """Format of this file."""
    task: Annotated[AnyTask, Key(study=True, finished="free")]
    """The task that the model learns, and the columns of the data."""
    model: Annotated[Model, Key(study=True, finished="free")]
    """The pretrained model that is adapted."""
    data: Annotated[Data, Key(finished="free")]
    """The training, validation and test rows."""
    adapter: Annotated[AnyAdapter, STUDY] = Field(default_factory=lambda: ADAPTERS[DEFAULT_ADAPTER]())
    """The PEFT method, or full fine-tuning; LoRA by default. A kind alone is enough: `adapter: lora`."""
    training: Annotated[Training, STUDY] = Field(default_factory=lambda: Training(epochs=DEFAULT_EPOCHS))
    """The optimisation."""
    checkpoints: Annotated[Checkpoints | Literal["off"] | None, OUTSIDE] = Checkpoints()
    """Checkpoints on the way; `off` or null keeps only those for `training.best_metric`, and the state of a run that is
    stopped: a run that is killed starts again, and one that is done can't be extended."""
    speed: Annotated[Speed, Key(resume="ask", finished="free")] = Speed()
    """Faster ways to the same numbers."""
    tracking: Annotated[Tracking, OUTSIDE] = Tracking()
    """Pictures, examples and records of the run."""
    hub: Annotated[Hub | None, OUTSIDE, HOST] = None
    """Upload of the finished adapter; null uploads nothing."""
    output: Annotated[Name, OUTSIDE] = f"runs/{RECIPE}-{NUMBER}"
    """The run folder: everything this run writes. `{recipe}` is the name of the recipe's file; `{n}` is the number of
    the run: that of the latest run of this very recipe, which is resumed or finished, else the next free one."""
    require_pinned: Annotated[bool, Key(resume="free", lock="ignored"), HOST] = False
    """Refuse a model or a data set on the Hub whose `revision` is not a commit (40 digits): tags and branches move."""

    @property
    def title(self) -> str:
        """A name of the run, for people: the end of `output`, by default the name of the recipe's file."""
        return PurePath(self.output).name.removesuffix(f"-{NUMBER}")

    def summary(self) -> list[tuple[str, str]]:
        """Name the settings that decide about the data, for reports; those that are not used are left out."""
        data = self.data
        revision = f" at {self.model.revision}" if self.model.revision else ""

        def listed(files: str | Sequence[str]) -> str:
            return files if isinstance(files, str) else ", ".join(files)

        rows = [
            ("Task", self.task.title),
            ("Model", self.model.name + revision),
            ("Adapter", self.adapter.kind),
            ("Source", " ".join(part for part in (data.source, data.subset) if part) if data.source else ""),
            *((split.capitalize(), listed(getattr(data, split) or "")) for split in ("train", "validation", "test")),
            ("Mix", ", ".join(listed(source.train) for source in data.mix or [])),
            ("Validation", f"{data.validation_share:.1%} of train" if data.validation_share else ""),
            ("Limit", f"{data.limit:,} rows of each split" if data.limit else ""),
            ("Length", f"at most {data.max_length:,} tokens, over-long rows: {data.overlong}"),
            ("Rows share sequences", "yes, packed" if data.packing else ""),
            ("Reading", "streamed" if data.streaming else ""),
            ("Output", self.output),
        ]
        return [(name, value) for name, value in rows if value]

    @property
    def saving(self) -> Checkpoints:
        """Give the block `checkpoints`, also where it is off."""
        return self.checkpoints if isinstance(self.checkpoints, Checkpoints) else NO_CHECKPOINTS

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
        return read(path, overrides).checked()

    @classmethod
    def from_dict(cls, tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
        """Make a recipe of plain values, as a YAML file would hold them.

        Raises:
            RecipeError: A value or an override is wrong; it carries every problem that was found.
        """
        return read_dict(tree, overrides).checked()

    def dump(self) -> str:
        """Write this recipe as YAML, with every default; `load` reads it back to an equal recipe."""
        # Defaults too: another version may have others, and this run began with these.
        return yamlfile.document(self.model_dump(mode="json"))

    # Rules between blocks. One a method, because each runs alone where the fields of another can't be read.

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
    def _streamed_rows_are_whole(self) -> Self:
        if self.data.streaming and self.task.one_row_by is not None:
            what = f"rows with the same {self.task.one_row_by!r} make one row, which needs all of them"
            raise ValueError(f"data.streaming: {what}; set it to false, or write them as one row")
        return self

    @model_validator(mode="after")
    def _rows_have_others(self) -> Self:
        if changed(self.training, "batch_size") and self.training.batch_size < self.task.least_batch:
            reason = f"{self.task.kind} compares a row with others of its global batch; write {self.task.least_batch}"
            raise ValueError(f"training.batch_size: {reason} or more")
        return self

    @model_validator(mode="after")
    def _selection_has_validation(self) -> Self:
        if self.training.best_metric and not self.data.has_validation:
            raise ValueError("training.best_metric: there is no validation split; set data.validation")
        return self

    @model_validator(mode="after")
    def _selection_has_metric(self) -> Self:
        best = self.training.best_metric
        if best is not None and best not in self.task.best_metrics:
            known = suggestion(best, list(self.task.best_metrics))
            raise ValueError(f"training.best_metric: {self.task.kind} has no metric {best!r}{known}")
        return self

    @model_validator(mode="after")
    def _split_fits_task(self) -> Self:
        if self.data.overlong == "split" and not self.task.is_running_text:
            raise ValueError(f"data.overlong: {self.task.kind} rows can't be split; write truncate, drop or error")
        return self

    @model_validator(mode="after")
    def _start_needs_rows(self) -> Self:
        if self.data.streaming and self.task.needs_start:
            reason = f"{self.task.title} looks at all rows before training begins"
            raise ValueError(f"data.streaming: {reason}; set it to false")
        return self

    @model_validator(mode="after")
    def _packing_fits_attention(self) -> Self:
        attention = self.model.attention
        if self.data.packing and attention not in ("auto", *PACKED_ATTENTION):
            offered = " and ".join(PACKED_ATTENTION)
            raise ValueError(f"model.attention: packing is offered for {offered}; set one of them or auto")
        return self

    @model_validator(mode="after")
    def _adapter_fits_quantization(self) -> Self:
        refusal = self.adapter.why_not_quantized() if self.model.quantization is not None else None
        if refusal is not None:
            raise ValueError(f"model.quantization: {refusal}")
        return self

    @model_validator(mode="after")
    def _start_is_evaluated(self) -> Self:
        if self.training.eval_at_start and not self.data.has_validation:
            raise ValueError("training.eval_at_start: there is no validation split; set data.validation or remove it")
        return self

    @model_validator(mode="after")
    def _steps_are_evaluated(self) -> Self:
        # null asks for no evaluation, and gets none.
        if changed(self.training, "eval_every") and self.training.eval_every and not self.data.has_validation:
            raise ValueError("training.eval_every: there is no validation split; set data.validation or remove it")
        return self

    @model_validator(mode="after")
    def _evaluation_has_rows(self) -> Self:
        if changed(self.training, "eval_batch") and not self.data.has_validation and self.data.test is None:
            raise ValueError("training.eval_batch: there is no validation or test split; set one or remove it")
        return self

    @model_validator(mode="after")
    def _task_is_not_ignored(self) -> Self:
        ignored = self.task.ignored(validation=self.data.has_validation, test=self.data.test is not None)
        if ignored is not None:
            raise ValueError(f"task.{ignored}")
        return self

    @model_validator(mode="after")
    def _model_is_pinned(self) -> Self:
        if self.require_pinned and self.model.revision is not None and not is_commit(self.model.revision):
            raise ValueError(f"model.revision: {NO_COMMIT}")
        return self

    @model_validator(mode="after")
    def _data_are_pinned(self) -> Self:
        # Those that are missing are found with the paths: only there is it known what is a local folder.
        if self.require_pinned:
            parts: dict[str, Data | Source] = {
                "data": self.data,
                **{f"data.mix.{n}": part for n, part in enumerate(self.data.mix or ())},
            }
            for key, part in parts.items():
                if part.revision is not None and not is_commit(part.revision):
                    raise ValueError(f"{key}.revision: {NO_COMMIT}")
        return self

    @model_validator(mode="after")
    def _best_is_known(self) -> Self:
        if self.hub is not None and self.hub.every == "best" and self.training.best_metric is None:
            raise ValueError("hub.every: best needs training.best_metric, e.g. best_metric: loss")
        return self

    @model_validator(mode="after")
    def _something_is_kept(self) -> Self:
        # best_metric keeps checkpoints of its own.
        nothing = self.saving.is_off and self.training.best_metric is None
        if nothing and changed(self.saving, "keep"):
            raise ValueError("checkpoints.keep: no checkpoints are written; set checkpoints.every_minutes or remove it")
        return self


class Seen(NamedTuple):
    """Facts that the rules for defaults ask for, as far as they are known; None where they are not."""

    rows: int | None = None
    """Training rows."""
    hidden_size: int | None = None
    """Of the model."""
    positions: int | None = None
    """Most tokens that the model takes."""
    has_linear: bool = True
    """It has linear layers besides its heads."""
    architecture: str | None = None
    """Class of the model, as its config names it."""

    @property
    def counted(self) -> str:
        """The rows, as a reason."""
        return f"{MOST_ROWS:,} rows or more" if (self.rows or 0) >= MOST_ROWS else f"{self.rows:,} rows"


Look = Callable[[Mapping[str, Any]], Seen]
"""Tells what can be known of the data and the model that a recipe's tree names."""


def unseen(tree: Mapping[str, Any]) -> Seen:
    """Look at nothing."""
    return Seen()


def usual_adapter(seen: Seen) -> tuple[str, str]:
    """Choose the adapter, and say why."""
    if not seen.has_linear:
        return "full", "no linear layers for LoRA"
    return DEFAULT_ADAPTER, ""


def usual_batch(seen: Seen) -> tuple[int, str]:
    """Choose the global batch, and say why."""
    if seen.rows is None:
        return Training.model_fields["batch_size"].default, ""
    return 8 if seen.rows < 1_000 else 16 if seen.rows < 10_000 else 32, seen.counted


def usual_epochs(seen: Seen) -> tuple[int, str]:
    """Choose the passes over the training rows, and say why."""
    if seen.rows is None:
        return DEFAULT_EPOCHS, ""
    epochs = 10 if seen.rows < 500 else 5 if seen.rows < 5_000 else 3 if seen.rows < MOST_ROWS else 1
    return epochs, seen.counted


def usual_rate(seen: Seen, adapter: str, task: str) -> tuple[float, str]:
    """Choose the learning rate by the kinds of adapter and task, and say why."""
    if not seen.has_linear and not ADAPTERS[adapter].freezes_base:
        return CONVOLUTIONS, "a convolutional model, trained whole"
    rates, is_new_head = ADAPTERS[adapter].default_rates, not TASKS[task].made_for
    if seen.hidden_size is not None and seen.hidden_size < SMALL:
        return rates[2], f"{adapter}, small model: hidden size {seen.hidden_size}"
    return rates[is_new_head], f"{adapter}, {task}"


def fill(tree: dict[str, Any], unread: Container[KeyPath], file: str, look: Look = unseen) -> dict[str, str]:
    """Fill in the defaults that depend on other keys, so that the recipe that is kept has their values.

    None depends on the machine: the same recipe on the same data is the same training everywhere.

    Args:
        tree: A recipe as its files and overrides say it; is changed.
        unread: Keys that are given, but with nothing that can be used.
        file: The recipe's file, which gives the run folder its name.
        look: Tells what can be known of data and model; is asked only where a default depends on them.

    Returns:
        Each key that the training depends on, with value and reason.
    """
    filled: dict[str, str] = {}
    training, data = tree.setdefault("training", {}), tree.get("data")
    is_readable = isinstance(training, dict) and ("training",) not in unread
    lacking = [f"training.{key}" for key in ("batch_size", "learning_rate") if is_readable and key not in training]
    # A stream has no known end: the rule about it says what to write.
    is_stream = isinstance(data, dict) and data.get("streaming") is True
    lengths = ("steps", "epochs")
    if is_readable and not is_stream and not any(training.get(key) is not None for key in lengths):
        lacking += ["training.epochs"] if ("training", "steps") not in unread else []
    lacking += ["adapter"] if "adapter" not in tree else []
    lacking = [key for key in lacking if tuple(key.split(".")) not in unread]
    seen = look(tree) if lacking else Seen()

    def say(key: str, value: float | str, why: str) -> None:
        text = value if isinstance(value, str) else f"{value:g}".replace("e-0", "e-")
        filled[key] = f"{text} ({why})" if why else text

    if "adapter" in lacking:
        kind, why = usual_adapter(seen)
        tree["adapter"] = {"kind": kind}
        say("adapter", kind, why)
    adapter, task = _kind(tree, "adapter"), _kind(tree, "task")
    rules: dict[str, Callable[[], tuple[float, str]]] = {
        "training.batch_size": partial(usual_batch, seen),
        "training.epochs": partial(usual_epochs, seen),
    }
    if adapter in ADAPTERS and task in TASKS:
        rules["training.learning_rate"] = partial(usual_rate, seen, adapter, task)
    for key, rule in rules.items():
        if key in lacking:
            value, why = rule()
            training[key.partition(".")[2]] = value
            say(key, value, why)
    output = tree.get("output", Recipe.model_fields["output"].default)
    if is_readable and isinstance(output, str) and ("output",) not in unread:
        tree["output"] = output.replace(RECIPE, Path(file).stem)
    return filled


def _kind(tree: Mapping[str, Any], block: str) -> str:
    """Give the kind of a block; empty where it has none that is text."""
    kind = tree[block].get("kind") if isinstance(tree.get(block), dict) else None
    return kind if isinstance(kind, str) else ""


def read(path: str, overrides: Sequence[str] = (), look: Look = unseen) -> Reading[Recipe]:
    """Read a recipe file, what it extends, and `key.path=value` overrides; problems are part of the result.

    Args:
        path: The YAML file.
        overrides: Each `key.path=value`, the value in YAML.
        look: See `fill`.
    """
    return reading.read(Recipe, path, overrides, fill=partial(fill, look=look))


def read_text(text: str, file: str, overrides: Sequence[str] = (), look: Look = unseen) -> Reading[Recipe]:
    """Read a recipe that stands inside another file, `file`; like `read`."""
    return reading.read(Recipe, file, overrides, text, fill=partial(fill, look=look))


def read_dict(tree: Mapping[str, Any], overrides: Sequence[str] = (), look: Look = unseen) -> Reading[Recipe]:
    """Read a recipe of plain values, as a YAML file would hold them; like `read`."""
    # JSON is YAML: so a dict goes the way of a file, and its mistakes are reported in the same words.
    return read_text(json.dumps(tree, ensure_ascii=False, default=str), "recipe", overrides, look)


def json_schema() -> dict[str, Any]:
    """Make the JSON Schema (2020-12) of a recipe file; where `extends` is given, nothing else is required."""
    whole = Recipe.model_json_schema()
    # A kind alone is enough where its block requires nothing.
    for name, kinds in (("task", TASKS), ("adapter", ADAPTERS)):
        field = whole["properties"][name]
        short = [
            kind for kind, block in kinds.items() if not any(map(FieldInfo.is_required, block.model_fields.values()))
        ]
        if short:
            whole["properties"][name] = {
                "anyOf": [{k: v for k, v in field.items() if k != "description"}, {"enum": short}],
                "description": field.get("description", ""),
            }
    return schema(whole)


def reference() -> str:
    """Write `docs/recipe.md`: every key of a recipe, for people."""
    return markdown(Recipe)
