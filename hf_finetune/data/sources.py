"""Finds out where each split comes from: local files, or splits of a data set on the Hub."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
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
    problems: tuple[Problem, ...] = ()
    """What is wrong with those that are missing here."""

    def __iter__(self) -> Iterator[Origin]:
        """Every origin."""
        yield from self.train
        yield from (origin for origin in (self.validation, self.test) if origin is not None)

    @property
    def places(self) -> dict[str, str]:
        """What messages call each split; a validation split that is cut off is called like the training rows."""
        train = ", ".join(origin.place for origin in self.train)
        held = {"validation": self.validation, "test": self.test}
        return {"train": train, **{name: train if origin is None else origin.place for name, origin in held.items()}}

    def stamps(self) -> list[tuple[str, int, int]]:
        """Name, size and time of change of every local file.

        Raises:
            DataError: One is gone.
        """
        try:
            return [stamp for origin in self for stamp in origin.stamps()]
        except OSError as error:
            raise DataError(Problem("is gone since the run began", file=str(error.filename))) from error

    def check_unchanged(self, before: list[tuple[str, int, int]]) -> None:
        """Make sure that no file changed since `stamps` gave `before`.

        Raises:
            DataError: A file did; all that did are named.
        """
        changed = [old[0] for old, new in zip(before, self.stamps(), strict=True) if old != new]
        if changed:
            reason = "changed while it was read; wait until it is written, then start again"
            raise DataError(Problem(reason, file=file) for file in changed)


def locate(data: Data) -> Origins:
    """Find every file and name every split; reads no row.

    Returns:
        The origins that were found, and what is wrong with the others: a file does not exist or has an unknown format,
        or the source is neither folder nor repository.

    Raises:
        RecipeError: A folder is given a `subset` or a `revision`, which only a data set on the Hub has.
    """
    problems: list[Problem] = []

    def found(names: str | list[str], where: Data | Source, key: str) -> Iterator[Origin]:
        try:
            origin = _origin(names, where, key)
            yield replace(origin, cache=data.cache) if isinstance(origin, LocalFiles) else origin
        except DataError as error:
            problems.extend(error.problems)

    parts: Sequence[Source] = data.mix or ()
    train: list[Origin] = []
    if data.train is not None:
        train += found(data.train, data, "data.train")
    for index, part in enumerate(parts):
        train += found(part.train, part, f"data.mix.{index}.train")
    held = {
        name: next(found(names, data, f"data.{name}"), None)
        for name, names in (("validation", data.validation), ("test", data.test))
        if names is not None
    }
    total = sum(part.weight for part in parts)
    weights = tuple(part.weight / total for part in parts) or (1.0,)
    return Origins(tuple(train), weights, held.get("validation"), held.get("test"), tuple(problems))


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
