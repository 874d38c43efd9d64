"""Finds everything that is wrong with a recipe, key by key, in words that say what to write instead.

pydantic runs the rules between the fields of a block only when each field is right, and its locations mix keys with the
names of union members. So each key is validated by itself here. The fields that are right make up blocks, on which each
rule runs whose fields could be read: one report then has all problems.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from hf_finetune.config.credentials import redacted
from hf_finetune.config.suggestions import nearest, suggestion
from hf_finetune.config.yamlfile import KeyPath, Origin, resolve_scalar
from hf_finetune.errors import Problem

# Names that pydantic and `annotated-types` give to bounds.
_LIMITS = ("ge", "gt", "le", "lt", "min_length", "max_length")
_LONGEST = 60  # characters of a value that a message shows


@dataclass(frozen=True)
class Option:
    """One type that a value may have, with its bounds."""

    type: Any
    bounds: dict[str, Any] = field(default_factory=dict)

    @property
    def block(self) -> type[BaseModel] | None:
        """The class, where the value is a block of keys."""
        return self.type if isinstance(self.type, type) and issubclass(self.type, BaseModel) else None

    @property
    def tag(self) -> str | None:
        """The plugin's kind, where the block is a plugin."""
        name = getattr(self.block, "name", None)
        return str(name()) if callable(name) else None

    @property
    def choices(self) -> tuple[Any, ...]:
        """The allowed values, where they are listed."""
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    def __str__(self) -> str:
        """E.g. `a whole number (at least 1)`."""
        if self.choices:
            return alternatives(shown(choice) for choice in self.choices)
        if self.block is not None:
            required = [key for key, info in keys(self.block).items() if info.is_required()]
            return "a block of keys" + (f" with {', '.join(required)}" if required else "")
        if get_origin(self.type) is list:
            entry = describe(options(get_args(self.type)[0]))
            return f"a list of {entry}" if entry == "text" else f"a list, each entry {entry}"
        if get_origin(self.type) is dict:
            key, value = (describe(options(argument)) for argument in get_args(self.type))
            return f"a block of {key}: {value}"
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
        limits = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
        # A limit of millions only keeps numbers finite; it would tell nobody anything.
        small = [name for name in limits if abs(self.bounds.get(name, math.inf)) < 1_000_000]
        limited = [f"{limits[name]} {shown(self.bounds[name])}" for name in small]
        return words.get(self.type, "another value") + (f" ({' and '.join(limited)})" if limited else "")


def options(annotation: Any, metadata: Iterable[Any] = ()) -> Sequence[Option]:
    """List every type that an annotation or a field admits, `None` left out."""
    if isinstance(annotation, FieldInfo):
        return options(annotation.annotation, annotation.metadata)
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        return options(inner, [*metadata, *more])
    if get_origin(annotation) in (Union, types.UnionType):
        return [option for member in get_args(annotation) for option in options(member)]
    return [] if annotation is type(None) else [Option(annotation, _bounds(metadata))]


def _bounds(metadata: Iterable[Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in metadata:
        if isinstance(item, FieldInfo):
            found |= _bounds(item.metadata)
        found |= {name: getattr(item, name) for name in _LIMITS if getattr(item, name, None) is not None}
    return found


def keys(block: type[BaseModel]) -> dict[str, FieldInfo]:
    """Map the YAML keys of a block to its fields."""
    return {info.alias or name: info for name, info in block.model_fields.items()}


def describe(expected: Sequence[Option]) -> str:
    """Say what is expected, e.g. `text or a list of text`."""
    if sum(option.tag is not None for option in expected) > 1:
        return "a block of keys with a kind"
    return alternatives(dict.fromkeys(str(option) for option in expected))


def alternatives(words: Iterable[str]) -> str:
    """Join words as `a, b or c`."""
    *most, last = list(words) or ["another value"]
    return f"{', '.join(most)} or {last}" if most else last


def shown(value: Any, *, plain: bool = False) -> str:
    """Show a value as YAML writes it, shortened and without credentials; `plain` leaves out the quotes."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "a block of keys"
    if isinstance(value, float) and not math.isfinite(value):
        return ".nan" if math.isnan(value) else f"{'-' if value < 0 else ''}.inf"
    # A second net: the tree holds no credential by now, but not every value comes from there.
    if isinstance(value, str):
        value = redacted(value)
    text = str(value) if plain and str(value).isprintable() else repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


# Our keys, and the same in transformers, TRL, PEFT and Axolotl.
_OURS = {
    "adapter.alpha": "lora_alpha",
    "adapter.dora": "use_dora",
    "adapter.dropout": "lora_dropout",
    "adapter.init": "init_lora_weights",
    "adapter.kind": "peft_type",
    "adapter.modules_to_save": "lora_modules_to_save",
    "adapter.r": "lora_r lora_rank rank",
    "adapter.rslora": "use_rslora",
    "adapter.target_modules": "lora_target_modules",
    "checkpoints.every": "save_steps save_strategy",
    "checkpoints.keep": "save_total_limit",
    "data.limit": "max_train_samples",
    "data.max_length": "max_seq_length max_seq_len sequence_len model_max_length",
    "data.packing": "sample_packing",
    "data.source": "dataset datasets dataset_name dataset_path",
    "data.subset": "dataset_config_name",
    "data.test": "test_file",
    "data.train": "data_files train_file train_split",
    "data.validation": "validation_file eval_dataset",
    "data.validation_share": "val_set_size",
    "data.workers": "preprocessing_num_workers dataset_num_proc",
    "hub.private": "hub_private_repo",
    "hub.repo": "hub_model_id",
    "model.attention": "attn_implementation",
    "model.name": "model_name_or_path base_model model_id pretrained_model_name_or_path",
    "model.revision": "model_revision",
    "output": "output_dir",
    "task.kind": "task_type",
    "task.label": "label_column",
    "task.label_smoothing": "label_smoothing_factor",
    "task.text": "dataset_text_field text_column",
    "training.activation_checkpointing": "gradient_checkpointing",
    "training.batch_size": "train_batch_size global_batch_size per_device_train_batch_size micro_batch_size",
    "training.best_metric": "metric_for_best_model",
    "training.beta1": "adam_beta1",
    "training.beta2": "adam_beta2",
    "training.early_stopping.patience": "early_stopping_patience",
    "training.epochs": "num_train_epochs num_epochs",
    "training.eval_at_start": "eval_on_start",
    "training.eval_batch": "per_device_eval_batch_size eval_batch_size",
    "training.eval_every": "eval_steps eval_strategy evaluation_strategy",
    "training.learning_rate": "lr",
    "training.log_every": "logging_steps",
    "training.max_grad_norm": "gradient_clipping",
    "training.optimizer": "optim",
    "training.schedule": "lr_scheduler lr_scheduler_type",
    "training.steps": "max_steps max_train_steps",
    "training.warmup_steps": "num_warmup_steps",
}
KEYS = {theirs: ours for ours, words in _OURS.items() for theirs in words.split()}

_BATCH = "write training.batch_size, the global batch; training.micro_batch is what one device takes at once"
_EVAL = "write training.eval_every: N, epoch or null"
_EXTENDS = "write extends: FILE in the first line of the file"
_LABELS = "list the labels in task.labels, in the order of their ids"
_LAUNCHER = "choose it at the launcher (accelerate launch --config_file FILE); remove it"
# Where a key of another tool has no counterpart, or one of other values. A hint goes before a name in `KEYS`.
HINTS = {
    "assistant_only_loss": "write task.train_on: assistant",
    "bf16": "write training.precision: bf16",
    "completion_only_loss": "write task.train_on: assistant",
    "dataloader_num_workers": "not needed, rows are tokenised beforehand (data.workers); remove it",
    "deepspeed": _LAUNCHER,
    "defaults": _EXTENDS,
    "device_map": "follows from the machine; remove it",
    "do_eval": "give data.validation to evaluate, and remove it",
    "do_train": "the recipe says what is done; remove it",
    "dtype": "write training.precision",
    "eval_strategy": _EVAL,
    "evaluation_strategy": _EVAL,
    "extend": _EXTENDS,
    "fp16": "write training.precision: fp16",
    "fsdp": _LAUNCHER,
    "gradient_accumulation_steps": "accumulation follows from training.batch_size (the global batch) and "
    "training.micro_batch; remove it",
    "greater_is_better": "known for every metric; remove it",
    "hub_strategy": "the finished adapter is uploaded; write hub.every: best to upload the best so far, too",
    "id2label": _LABELS,
    "include": _EXTENDS,
    "label2id": _LABELS,
    "load_best_model_at_end": "training.best_metric: NAME keeps the best checkpoint; remove it",
    "load_in_4bit": "write model.quantization: nf4",
    "load_in_8bit": "write model.quantization: int8",
    "logging_dir": "TensorBoard files are written to the folder tensorboard of the run; remove it",
    "micro_batch_size": _BATCH,
    "num_labels": "the labels are counted in the data, or listed in task.labels; remove it",
    "num_processes": "the launcher sets it (accelerate launch --num_processes N); remove it",
    "overwrite_output_dir": "give --restart on the command line to move an earlier run aside",
    "peft_type": "write adapter.kind: lora (or another one)",
    "per_device_train_batch_size": _BATCH,
    "push_to_hub": "write hub: {repo: OWNER/NAME}, or upload a finished run with hf-finetune push RUN",
    "remove_unused_columns": "only the columns that the task names are read; remove it",
    "report_to": "TensorBoard files and metrics.jsonl are always written; remove it, or name others in tracking.also",
    "resume_from_checkpoint": "not part of a recipe; to go on training an adapter, name its run in adapter.from",
    "save_strategy": "write checkpoints.every: N, epoch or auto, or checkpoints: off",
    "task_type": "write task.kind, e.g. causal_lm or text_classification",
    "torch_dtype": "write training.precision",
    "train_on_inputs": "write task.train_on: all, or assistant",
    "trust_remote_code": "code from a repository is never run; remove it",
    "warmup": "write training.warmup_ratio or training.warmup_steps",
}

UNREAD = object()
"""In place of a value that is missing or wrong."""

_BOUNDS = {
    "greater_than_equal": ("ge", "be at least", ""),
    "greater_than": ("gt", "be more than", ""),
    "less_than_equal": ("le", "be at most", ""),
    "less_than": ("lt", "be less than", ""),
    "string_too_long": ("max_length", "have at most", " characters"),
    "too_short": ("min_length", "have at least", " entries"),
    "too_long": ("max_length", "have at most", " entries"),
}
_TRUTH = {"yes": "true", "on": "true", "no": "false", "off": "false"}
_GROUPED = re.compile(r"[-+]?[0-9][0-9_,]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?", re.ASCII)
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]*)?) ?%", re.ASCII)
_DECIMAL_COMMA = re.compile(r"[-+]?[0-9]+,[0-9]+", re.ASCII)
_TIME = re.compile(r"[0-9]+(?::[0-5]?[0-9])+", re.ASCII)


class Examination:
    """Examines a tree of plain values against the class of a recipe.

    Args:
        root: Class of the outermost block.
        tree: As the files and the command line say it.
        origin: Tells where each key is given.
        unread: Keys that are given with nothing that can be used, which other problems say.
        complete: False where a file could not be read, so that an absent key may be given there.
    """

    def __init__(
        self, root: type[BaseModel], tree: Mapping[str, Any], origin: Origin, *, unread: set[KeyPath], complete: bool
    ) -> None:
        self._root, self._origin, self._complete = root, origin, complete
        self.unread = set(unread)
        """Keys that are given, but illegibly, or under a name that is not theirs."""
        self._found: list[tuple[KeyPath, str]] = []
        self._missing: list[tuple[KeyPath, KeyPath, str]] = []  # blamed key, needed key, message
        self._defaults: list[tuple[KeyPath, BaseModel, str]] = []
        self._blocks: list[tuple[KeyPath, BaseModel]] = []
        self.partial: Any = self._block(root, tree, ())
        """The outermost block with the fields that are right: reading another one raises AttributeError."""
        for path, block, name in self._defaults:
            if not complete or path in self.unread:  # it is given, only not legibly, so its default says nothing
                block.__dict__.pop(name, None)

    def problems(self) -> list[Problem]:
        """List what is wrong, each once: values, keys, and rules between fields."""
        for path, needed, message in self._missing:
            if self._complete and not any(given[: len(needed)] == needed for given in self.unread):
                self._found.append((path, message))
        for path, block in self._blocks:
            for decorator in type(block).__pydantic_decorators__.model_validators.values():
                if decorator.info.mode == "after":
                    try:
                        getattr(block, decorator.cls_var_name)()
                    except ValueError as error:
                        # The message begins with the key to blame: `steps: ...` or `steps is ...`.
                        message = str(error)
                        blamed = message.split(" ", 1)[0].rstrip(":,")
                        if blamed.split(".")[0] in keys(type(block)):
                            message = message.removeprefix(f"{blamed}: ")
                            self._found.append(((*path, *blamed.split(".")), message))
                        else:
                            self._found.append((path, message))
                    except AttributeError:
                        continue  # the rule needs a field that could not be read, which is a problem of its own
        return [
            Problem(message, ".".join(shown(part, plain=True) for part in path), *self._origin.place(path))
            for path, message in dict.fromkeys(self._found)
        ]

    def _block(
        self, cls: type[BaseModel], tree: Mapping[str, Any], path: KeyPath, variants: Sequence[Option] = ()
    ) -> BaseModel:
        """Read a block; `variants` are all that the plugin may be, for keys that belong to another kind."""
        # Without validation: fields are put in one by one as they turn out to be right.
        block = cls.model_construct()
        for name, info in cls.model_fields.items():
            key = info.alias or name
            here = (*path, key)
            if key not in tree and not info.is_required():
                self._defaults.append((here, block, name))
                continue
            if key in tree:
                value = self._value(info, tree[key], here)
                for decorator in cls.__pydantic_decorators__.field_validators.values():
                    if value is not UNREAD and name in decorator.info.fields:
                        try:
                            value = getattr(cls, decorator.cls_var_name)(value)
                        except ValueError as error:
                            self._found.append((here, str(error)))
                            value = UNREAD
            else:
                value = UNREAD
                self._missing.append((here, here, f"is missing; add {describe(options(info))}"))
            # Past pydantic, whose blocks are frozen. A rule that reads a field that is gone gets an AttributeError.
            block.__dict__.pop(name, None)
            if value is not UNREAD:
                block.__dict__[name] = value
        for key in tree:
            if key not in keys(cls):
                self._found.append(((*path, key), "unknown key" + self._unknown(key, path, cls, variants)))
        self._blocks.append((path, block))
        return block

    def _value(self, info: FieldInfo, value: Any, path: KeyPath) -> Any:
        expected = options(info)
        plugins = [option for option in expected if option.tag is not None]
        if plugins:
            return self._plugin(plugins, value, path)
        blocks = [option.block for option in expected if option.block is not None]
        if blocks and isinstance(value, Mapping):
            return self._block(blocks[0], value, path)
        lists = [option for option in expected if get_origin(option.type) is list and _entry(option).block]
        if lists and isinstance(value, list) and len(value) >= lists[0].bounds.get("min_length", 0):
            entry, items = _entry(lists[0]), list[Any]()
            for index, item in enumerate(value):
                here = (*path, index)
                if entry.block is not None and isinstance(item, Mapping):
                    items.append(self._block(entry.block, item, here))
                else:
                    self._found.append((here, _wrong_type([entry], item, self._origin.written.get(here))))
            return items if len(items) == len(value) else UNREAD
        # Nothing with keys of its own: pydantic alone decides.
        try:
            return _adapter(info).validate_python(value)
        except ValidationError as error:
            self._found += _wrong(expected, value, path, error, self._origin.written)
            return UNREAD

    def _plugin(self, variants: Sequence[Option], value: Any, path: KeyPath) -> Any:
        """Read a block with a kind; below an unknown kind, read on as the one that was probably meant."""
        kinds = {str(option.tag): option.block for option in variants if option.block is not None}
        known = ", ".join(kinds)
        if not isinstance(value, Mapping):
            message = f"must be a block of keys with a kind, not {shown(value)}; known kinds: {known}"
            self._found.append((path, message))
            return UNREAD
        words = [key for key in value if isinstance(key, str)]
        misnamed = None
        if "kind" not in value:
            # Another key has the name of a kind (`type: lora`), or is `kind` misspelt.
            misnamed = next((key for key in words if value[key] in list(kinds)), None) or nearest("kind", words)
        written = value.get(misnamed or "kind")
        if misnamed is not None:
            self.unread.add((*path, "kind"))
            self._found.append(((*path, misnamed), "unknown key; did you mean 'kind'?"))
        elif written is None:
            self._missing.append((path, (*path, "kind"), f"needs a kind; known: {known}"))
        elif not isinstance(written, str):
            self._found.append(((*path, "kind"), f"must be text, not {shown(written)}; known: {known}"))
        elif written not in kinds:
            self._found.append(((*path, "kind"), f"unknown kind {shown(written)}" + suggestion(written, list(kinds))))
        kind = nearest(written, kinds) if isinstance(written, str) else None
        if kind is None:
            # The only one that knows most of the keys that are given, misspelt ones included.
            given = {*words, "kind"}
            fitting = {
                kind: sum(nearest(word, keys(block), 0.8) is not None for word in given)
                for kind, block in kinds.items()
            }
            most = [kind for kind, count in fitting.items() if count == max(fitting.values()) > 1]
            kind = most[0] if len(most) == 1 else None
        block = kinds.get(str(kind))
        if block is None:
            return UNREAD
        kept = {key: inner for key, inner in value.items() if key != misnamed}
        return self._block(block, kept | {"kind": kind}, path, variants)

    def _unknown(self, key: str, path: KeyPath, cls: type[BaseModel], variants: Sequence[Option]) -> str:
        """Say what another tool's key is called here, else the same key elsewhere, else the nearest one."""
        if key in KEYS:
            # The value is given, only under another name: the key that was meant is not reported as missing, too.
            self.unread.add(tuple(KEYS[key].split(".")))
        if key in HINTS or key in KEYS:
            return f"; {HINTS.get(key) or f'write {KEYS[key]}'}"
        # Keys at the top, and of all other blocks than this one, by their dotted names.
        others = {name: name for name in keys(self._root)} if path else {}
        for name, info in keys(self._root).items():
            if path[:1] != (name,):
                blocks = [option.block for option in options(info) if option.block is not None]
                others |= {inner: f"{name}.{inner}" for block in blocks for inner in keys(block) if inner not in others}
        if key in others:
            return f"; did you mean {others[key]!r}?"
        known = list(keys(cls))
        near = nearest(key, known)
        if near is not None:
            self.unread.add((*path, near))
        if kinds := [str(option.tag) for option in variants if option.block and key in keys(option.block)]:
            return f"; it is for kind {alternatives(kinds)}"
        # Among so many keys something is always a little like the word: only what is much like it is meant.
        if near is None and (far := nearest(key, others, 0.8)) is not None:
            return f"; did you mean {others[far]!r}?"
        return suggestion(key, known)


def _entry(option: Option) -> Option:
    """Give what a list is to hold."""
    return options(get_args(option.type)[0])[0]


# Cached, because pydantic compiles a validator for each.
@functools.cache
def _adapter(info: FieldInfo) -> TypeAdapter[Any]:
    # pydantic refuses a config for the type of a block, which has its own.
    declared: Any = Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    is_block = isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel)
    return TypeAdapter(declared, config=None if is_block else {"strict": True, "allow_inf_nan": False})


def _wrong(
    expected: Sequence[Option], value: Any, path: KeyPath, error: ValidationError, written: Mapping[KeyPath, str]
) -> list[tuple[KeyPath, str]]:
    """Put pydantic's errors about one value into words.

    Of a value that may have several types, only the errors of the type that it has count; where it has none of them,
    one line says all of them.
    """
    found: list[tuple[KeyPath, str]] = []
    for detail in error.errors(include_url=False):
        location = list(detail["loc"])
        # pydantic puts the names of union members before the keys.
        while len(expected) > 1 and location and isinstance(location[0], str):
            if isinstance(value, Mapping) and location[0] in value:
                break
            location.pop(0)
        here, inner = path, expected
        for part in location:
            if part != "[key]":  # pydantic's mark where the key itself is wrong
                holder = next((option for option in inner if get_origin(option.type) in (list, dict)), None)
                inner = [] if holder is None else options(get_args(holder.type)[-1])
                here = (*here, part)
        kind = detail["type"]
        is_type = kind == "literal_error" or kind.endswith("_type")
        if is_type and not location:  # about the whole value, whose type the last line tells of
            continue
        if is_type:
            message = _wrong_type(inner, detail["input"], written.get(here))
        elif kind == "value_error":
            message = str(detail["ctx"]["error"])
        elif kind in _BOUNDS:
            name, bound, unit = _BOUNDS[kind]
            actual = detail["input"]
            actual = shown(len(actual) if isinstance(actual, str | list | dict) else actual)
            message = f"must {bound} {shown(detail['ctx'][name])}{unit}, not {actual}"
        else:
            words = {"finite_number": "must be a finite number", "string_too_short": "must not be empty text"}
            message = f"{words.get(kind, detail['msg'])}, not {shown(detail['input'])}"
        found.append((here, message))
    return found or [(path, _wrong_type(expected, value, written.get(path)))]


def _wrong_type(expected: Sequence[Option], value: Any, written: str | None) -> str:
    """Say what a value of the wrong type should be, and how to write it where another habit is behind it.

    Args:
        expected: The types that a value may have there.
        value: As it was read.
        written: As the file writes it, where it is not text.
    """
    wants_text = any(option.type is str for option in expected)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    actual = shown(written or value, plain=True) if wants_text and is_number else shown(value)
    message = f"must be {describe(expected)}, not {actual}"
    if isinstance(value, str):
        choices = [choice for option in expected for choice in option.choices if isinstance(choice, str)]
        # `bf16-mixed` means bf16, and `cosine_with_restarts` cosine: the longest choice that the word begins with.
        begins = sorted((choice for choice in choices if value.lower().startswith(choice)), key=len)
        near = begins[-1:] or difflib.get_close_matches(value, choices, n=1)
        hint = f"did you mean {near[0]!r}?" if near else _hint(value, {option.type for option in expected})
    else:
        hint = "put it in quotes" if wants_text and isinstance(value, int | float) else ""
    return f"{message}; {hint}" if hint else message


def _hint(text: str, types: set[Any]) -> str:
    """Say how to write a text that was meant as a number or a truth value."""
    kind = type(resolve_scalar(text))
    if kind in types or (kind is int and float in types):
        return "remove the quotes"
    if bool in types:
        return f"write {_TRUTH.get(text.lower(), 'true or false')}"
    if not types & {int, float}:
        return ""
    # Spellings of other tools and other countries.
    if percent := _PERCENT.fullmatch(text):
        return f"write {float(percent[1]) / 100:g}"
    if _TIME.fullmatch(text):
        return "a number with colons is a time; write it as one number"
    # `1,5` and `0,001` are decimals, `1,000` is a thousand.
    if _DECIMAL_COMMA.fullmatch(text) and not re.fullmatch(r"[-+]?[1-9][0-9]{0,2},[0-9]{3}", text, re.ASCII):
        return f"decimals take a point; write {text.replace(',', '.')}"
    return f"write {text.replace('_', '').replace(',', '')}" if _GROUPED.fullmatch(text) else ""
