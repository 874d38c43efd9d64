"""One split of a data set on the Hub; nothing of a repository is ever executed."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import datasets

from hf_finetune.data.diagnosis import READING_ERRORS, reading_error
from hf_finetune.data.faults import Wanted
from hf_finetune.errors import DataError, FinetuneError, Problem
from hf_finetune.hubreach import HTTP_ERROR
from hf_finetune.schema.complaints import suggestion
from hf_finetune.schema.paths import is_commit

REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")

_ERRORS = (*READING_ERRORS, HTTP_ERROR)


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set on the Hub."""

    key: str
    """The recipe key that names it, e.g. `data.train`."""
    source: str
    """`owner/name`."""
    subset: str | None
    revision: str | None
    split: str
    """Name of the split, or several joined by `+`; slices as in `train[:10%]` where rows are not streamed."""

    @property
    def place(self) -> str:
        """What messages call it."""
        return " ".join(part for part in (self.source, self.subset, self.split) if part)

    def identity(self, *, whole: bool) -> str:
        """Repository, subset, split and commit; the Hub is asked only where the recipe pins none."""
        return f"{self.source} {self.subset} {self.split} {self.commit}"

    @property
    def commit(self) -> str:
        """Of the data set; the Hub, or its cache, is asked only where the recipe pins none."""
        pinned = self.revision is not None and is_commit(self.revision)
        return str(self.revision if pinned else self._builder().hash)

    def stamps(self) -> list[tuple[str, int, int]]:
        """Nothing: a commit does not change."""
        return []

    def load(self, cache: str, wanted: Wanted) -> datasets.Dataset:
        """All rows; they stay in the cache of `datasets`, for offline use, whatever the arguments say.

        Raises:
            DataError: The Hub can't be reached, or lacks the data set, subset, revision or split.
        """
        builder = self._builder()
        try:
            builder.download_and_prepare()
            rows = builder.as_dataset(split=self._known_split(builder))
        except _ERRORS as error:
            raise self.explain(error) from error
        return rows

    def stream(self, wanted: Wanted) -> datasets.IterableDataset:
        """The rows, read lazily; raises like `load`."""
        builder = self._builder()
        try:
            return builder.as_streaming_dataset(split=self._known_split(builder))
        except _ERRORS as error:
            raise self.explain(error) from error

    def explain(self, error: Exception) -> FinetuneError:
        """What a user is told about an error of the libraries."""
        if isinstance(error, FinetuneError):
            return error
        known = re.search(r"(?:Should be one of|Available splits:) (\[.*\])", str(error))
        if known:
            return DataError(
                Problem(f"unknown split {self.split!r}; known: {known[1]}", key=self.key, file=self.source)
            )
        problem = reading_error((), "a data set", error).problems[0]
        return DataError(Problem(problem.message, key=self.key, file=self.place))

    def _builder(self) -> Any:
        try:
            builder = _builder(self.source, self.subset, self.revision)
        except (ConnectionError, HTTP_ERROR) as error:
            raise DataError(self._unreachable(error)) from error
        except READING_ERRORS as error:
            reason = str(error).strip().replace("\n", " ")
            raise DataError(Problem(reason, key="data.source", file=self.source)) from error
        if self.revision is not None and is_commit(self.revision) and builder.hash != self.revision:
            # Offline, `datasets` takes whatever commit it cached last.
            message = f"only commit {builder.hash} is cached, the recipe pins {self.revision}; connect to load it"
            raise DataError(Problem(message, key="data.revision", file=self.source))
        return builder

    def _unreachable(self, error: Exception) -> Problem:
        reason = str(error).strip().partition("\n")[0]
        message = f"{reason}; connect, or download it and set data.source to the folder and the splits to its files"
        return Problem(message, key="data.source", file=self.source)

    def _known_split(self, builder: Any) -> str:
        """The split, if the data set has it; some tell their splits only after they were downloaded."""
        known = list(builder.info.splits or {})
        for part in self.split.split("+"):
            name = part.partition("[")[0]
            if known and name not in known:
                message = f"unknown split {name!r}{suggestion(name, known)}; it has {', '.join(known)}"
                raise DataError(Problem(message, key=self.key, file=self.source))
        return self.split


@functools.cache
def _builder(source: str, subset: str | None, revision: str | None) -> Any:
    return datasets.load_dataset_builder(source, subset, revision=revision)
