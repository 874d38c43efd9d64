"""Finds out where each split comes from: local files, or splits of a data set on the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_finetune.data import files
from hf_finetune.data.files import LocalFiles
from hf_finetune.data.hub import REPOSITORY, HubSplit
from hf_finetune.errors import DataError, Problem, RecipeError
from hf_finetune.schema.blocks import Data, Source

Origin = LocalFiles | HubSplit
"""Where rows come from."""


@dataclass(frozen=True)
class Origins:
    """Where the rows of every split come from."""

    train: tuple[Origin, ...]
    """One, or those that are mixed."""
    weights: tuple[float, ...]
    """How often each is drawn from; 1 in all."""
    validation: Origin | None
    test: Origin | None


def locate(data: Data) -> Origins:
    """Find every file and name every split; reads no row.

    Raises:
        DataError: A file does not exist or has an unknown format, or the source is neither folder nor repository.
        RecipeError: A folder is given a `subset` or a `revision`, which only a data set on the Hub has.
    """
    parts: Sequence[Source] = data.mix or ()
    if data.train is not None:
        train = [_origin(data.train, data, "data.train")]
    else:
        train = [_origin(part.train, part, f"data.mix.{index}.train") for index, part in enumerate(parts)]
    total = sum(part.weight for part in parts)
    return Origins(
        train=tuple(train),
        weights=tuple(part.weight / total for part in parts) or (1.0,),
        validation=None if data.validation is None else _origin(data.validation, data, "data.validation"),
        test=None if data.test is None else _origin(data.test, data, "data.test"),
    )


def _origin(names: str | list[str], where: Data | Source, key: str) -> Origin:
    """The origin of one split.

    Args:
        names: Files or splits.
        where: The block with `source`, `subset` and `revision`.
        key: Recipe key of `names`, for messages.
    """
    source = where.source
    if source is None:
        return files.find(names, None, key)
    if Path(source).expanduser().is_dir():
        _refuse_hub_fields(where, key)
        return files.find(names, source, key)
    if not REPOSITORY.fullmatch(source):
        message = f"{source!r} is no folder here, and no data set on the Hub (owner/name)"
        raise DataError(Problem(message, key=f"{key.rpartition('.')[0]}.source"))
    split = names if isinstance(names, str) else "+".join(names)
    return HubSplit(key, source, where.subset, where.revision, split)


def _refuse_hub_fields(where: Data | Source, key: str) -> None:
    block = key.rpartition(".")[0]
    given = [name for name in ("subset", "revision") if getattr(where, name) is not None]
    if given:
        reason = f"belongs to a Hub id, and {where.source} is a folder; remove it"
        raise RecipeError(Problem(reason, key=f"{block}.{name}") for name in given)
