"""The sources of each split: local files, or a split of a data set on the Hub, whose code is never executed."""

from __future__ import annotations

import errno
import functools
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
from datasets.exceptions import DatasetsError
from huggingface_hub import constants, get_session

from hf_finetune.config.blocks import Data, Source
from hf_finetune.config.paths import PACKAGE, cache_folder, http_error, is_commit
from hf_finetune.config.suggestions import suggestion
from hf_finetune.data import loading, parquet
from hf_finetune.data.loading import Wanted
from hf_finetune.data.readers import find
from hf_finetune.errors import DataError, FinetuneError, Problem, RecipeError, StorageError
from hf_finetune.log import warn
from hf_finetune.recipe import Recipe
from hf_finetune.run import files as run_files

HTTP_ERROR = http_error()
SECONDS = 10.0  # time that the Hub may take to answer


def settle(named: Recipe | Sequence[str]) -> None:
    """Go on with what is cached, as with HF_HUB_OFFLINE=1, if the Hub is needed and can't be reached.

    It is asked once a process, since each of many requests would wait for itself.

    Args:
        named: Models and data sets; those of a recipe.
    """
    if isinstance(named, Recipe):
        parts = (named.data, *(named.data.mix or ()))
        sources = [part.source for part in parts]
        named = [name for name in (named.model.name, getattr(named.adapter, "continue_from", None), *sources) if name]
    local = (Path(os.path.expanduser(name)) for name in named if not name.startswith(PACKAGE))  # noqa: PTH111 (any user)
    if constants.HF_HUB_OFFLINE or all(place.exists() for place in local):
        return
    try:
        # huggingface_hub 2.4 tries a refused connection five more times in 23 seconds when it lists files, and
        # transformers 5.23 has files listed whenever it loads a tokenizer, though all of it is cached.
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except (HTTP_ERROR, OSError) as error:
        # Both libraries read the variable only as they are imported.
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
        huggingface_hub.close_session()
        reason = str(error) or type(error).__name__
        warn(f"{constants.ENDPOINT} can't be reached ({reason}): going on with what is cached")


# pyarrow's errors are ValueErrors; an empty file of a data set gives a bare StopIteration.
READING_ERRORS = (DatasetsError, OSError, ValueError, TypeError, KeyError, RuntimeError, StopIteration)
SAMPLE_BYTES = 1 << 20  # bytes of each end of a streamed file that go into its identity


def _reading_error(error: BaseException, form: str, file: str) -> FinetuneError:
    """Return a `DataError` about what made reading fail, or a `StorageError` for a full disk."""
    # The libraries wrap what a reader raised in errors of their own, and these once more.
    causes = [error]
    while following := causes[-1].__cause__ or (None if causes[-1].__suppress_context__ else causes[-1].__context__):
        causes.append(following)
    for cause in causes:
        if isinstance(cause, FinetuneError):
            return cause
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in {errno.ENOSPC, errno.EDQUOT, errno.EROFS}:
            return StorageError(f"can't cache the data: {cause.strerror}; free space or set data.cache")
    deepest = str(causes[-1]).strip().partition("\n")[0] or type(causes[-1]).__name__
    return DataError(Problem(f"can't be read as {form}: {deepest}; write it anew", file=file))


@dataclass(frozen=True)
class LocalFiles:
    """The files of one split, all of one format."""

    key: str  # the recipe key that names them, e.g. `data.train`
    files: tuple[str, ...]
    cache: str | None = None  # the recipe's `data.cache`: beside it stands what is known about the content of files

    @property
    def suffix(self) -> str:
        """Their format: `.csv`, `.tsv`, ..."""
        return Path(self.files[0]).suffix.lower()

    @property
    def place(self) -> str:
        """Their name in messages."""
        more = len(self.files) - 1
        return self.files[0] + (f" (and {more} more, rows counted through)" if more else "")

    def identity(self, *, whole: bool) -> str:
        """Return SHA-256 of suffix and contents, wherever the files lie; see `digests`."""
        digest = hashlib.sha256(self.suffix.encode())
        for one in self.digests(whole=whole):
            digest.update(one)
        return digest.hexdigest()

    def digests(self, *, whole: bool) -> list[bytes]:
        """Return SHA-256 of each file, read once as long as it does not change.

        If not of the `whole`, then of its size and both ends, for streams that are too large to read twice.
        """
        root = cache_folder(self.cache) if whole else None
        return [_digest(*stamp, root) for stamp in self.stamps()]

    def stamps(self) -> list[tuple[str, int, int]]:
        """Return name, size in bytes and time of change in ns of each file."""
        return [(file, (state := Path(file).stat()).st_size, state.st_mtime_ns) for file in self.files]

    def load(self, folder: Path, wanted: Wanted) -> datasets.Dataset:
        """Return all rows, with the wanted columns, mapped from an Arrow file in the folder.

        Raises:
            DataError: Everything that is wrong with the files, each fault with its line where it has one.
            StorageError: The folder can't be written.
        """
        target = folder / f"{self.key}.arrow"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self.suffix == ".parquet":
                return parquet.load(self.files, wanted, target)
            return loading.load(self.files, self.suffix[1:], wanted, target)
        except READING_ERRORS as error:
            raise self.explain(error) from error

    def stream(self, wanted: Wanted) -> datasets.IterableDataset:
        """Return the rows, read lazily; the first rows of every file are checked now, like `load`."""
        # `datasets` takes a list among the arguments for shards, and shuffles their order, too.
        settings = {"files": list(self.files), "form": self.suffix[1:], "wanted": wanted, "key": self.key}
        try:
            features, settings["kinds"] = None, {}
            if self.suffix == ".parquet":
                features = parquet.types(self.files, wanted)
            else:
                settings["kinds"] = loading.first_kinds(self.files, self.suffix[1:], wanted)
            return datasets.IterableDataset.from_generator(_streamed, features=features, gen_kwargs=settings)
        except READING_ERRORS as error:
            raise self.explain(error) from error

    def explain(self, error: Exception) -> FinetuneError:
        """Return the error to raise for one that surfaced while the files were read."""
        explained = _reading_error(error, self.suffix[1:], ", ".join(self.files[:3]))
        if not isinstance(explained, DataError):
            return explained
        if isinstance(explained, loading.UnreadError):
            return explained
        return DataError(problem if problem.key else replace(problem, key=self.key) for problem in explained.problems)


def _streamed(files: list[str], form: str, wanted: Wanted, key: str, kinds: loading.Kinds) -> Iterator[dict[str, Any]]:
    try:
        if form == "parquet":
            yield from parquet.rows(files, wanted)
        else:
            yield from loading.rows(files, form, wanted, kinds)
    except DataError as error:
        raise DataError(replace(problem, key=key) for problem in error.problems) from None


@functools.cache
def _digest(file: str, size: int, changed: int, root: Path | None) -> bytes:
    # While size and time of change are the same, an earlier answer holds.
    if root is not None:
        return run_files.sha256(file, root)
    with Path(file).open("rb") as stream:
        digest = hashlib.sha256(str(size).encode())
        digest.update(stream.read(SAMPLE_BYTES))
        stream.seek(max(0, size - SAMPLE_BYTES))
        digest.update(stream.read(SAMPLE_BYTES))
        return digest.digest()


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set on the Hub."""

    key: str  # the recipe key that names it, e.g. `data.train`
    source: str  # `owner/name`
    subset: str | None
    revision: str | None
    split: str  # name of the split, or several joined by `+`; slices as in `train[:10%]` where rows are not streamed

    @property
    def place(self) -> str:
        """Its name in messages."""
        return " ".join(part for part in (self.source, self.subset, self.split) if part)

    def identity(self, *, whole: bool) -> str:
        """Return repository, subset, split and commit."""
        return f"{self.source} {self.subset} {self.split} {self.commit}"

    @property
    def commit(self) -> str:
        """Of the data set; the Hub, or its cache, is asked only where the recipe pins none."""
        pinned = self.revision is not None and is_commit(self.revision)
        return str(self.revision if pinned else self._builder().hash)

    def stamps(self) -> list[tuple[str, int, int]]:
        """Nothing: a commit does not change."""
        return []

    def load(self, folder: Path, wanted: Wanted) -> datasets.Dataset:
        """Return all rows; they stay in the cache of `datasets`, for offline use, whatever the arguments say.

        Raises:
            DataError: The Hub can't be reached, or lacks the data set, subset, revision or split.
        """
        builder = self._builder()
        try:
            builder.download_and_prepare()
            return builder.as_dataset(split=self._known_split(builder))
        except (*READING_ERRORS, HTTP_ERROR) as error:
            raise self.explain(error) from error

    def stream(self, wanted: Wanted) -> datasets.IterableDataset:
        """Return the rows, read lazily; raise like `load`."""
        builder = self._builder()
        try:
            return builder.as_streaming_dataset(split=self._known_split(builder))
        except (*READING_ERRORS, HTTP_ERROR) as error:
            raise self.explain(error) from error

    def explain(self, error: Exception) -> FinetuneError:
        """Return the error to raise for one of the libraries."""
        if isinstance(error, FinetuneError):
            return error
        known = re.search(r"(?:Should be one of|Available splits:) (\[.*\])", str(error))
        if known:
            what = f"unknown split {self.split!r}; known: {known[1]}"
            return DataError(Problem(what, key=self.key, file=self.source))
        explained = _reading_error(error, "a data set", self.place)
        return type(explained)(replace(explained.problems[0], key=self.key))

    def _builder(self) -> Any:
        try:
            builder = _builder(self.source, self.subset, self.revision)
        except (ConnectionError, HTTP_ERROR) as error:
            reason = str(error).strip().partition("\n")[0]
            remedy = "connect, or download it and set data.source to the folder and the splits to its files"
            raise DataError(Problem(f"{reason}; {remedy}", key="data.source", file=self.source)) from error
        except READING_ERRORS as error:
            reason = str(error).strip().replace("\n", " ")
            raise DataError(Problem(reason, key="data.source", file=self.source)) from error
        if self.revision is not None and is_commit(self.revision) and builder.hash != self.revision:
            # Offline, `datasets` takes whatever commit it cached last.
            message = f"only commit {builder.hash} is cached, the recipe pins {self.revision}; connect to load it"
            raise DataError(Problem(message, key="data.revision", file=self.source))
        return builder

    def known_splits(self) -> list[str]:
        """Return the splits that the data set has; some tell them only after they were downloaded."""
        return list(self._builder().info.splits or {})

    def _known_split(self, builder: Any) -> str:
        """Return the split, if the data set has it."""
        known = self.known_splits()
        for part in self.split.split("+"):
            name = part.partition("[")[0]
            if known and name not in known:
                message = f"unknown split {name!r}{suggestion(name, known)}; it has {', '.join(known)}"
                raise DataError(Problem(message, key=self.key, file=self.source))
        return self.split


@functools.cache  # each one asks the Hub anew for the commit and the files
def _builder(source: str, subset: str | None, revision: str | None) -> Any:
    return datasets.load_dataset_builder(source, subset, revision=revision)


def subsets(source: str) -> list[str]:
    """Return the subsets of a data set of which one must be named; none where that can't be known."""
    try:
        names = datasets.get_dataset_config_names(source)
    except (*READING_ERRORS, HTTP_ERROR):
        return []  # reading it says more
    return [] if "default" in names or len(names) < 2 else names


def undecoded(rows: datasets.Dataset) -> Iterator[dict[str, Any]]:
    """Yield rows in which images and sounds are as their files hold them."""
    for name, kind in rows.features.items():
        if isinstance(kind, datasets.Image | datasets.Audio):
            rows = rows.cast_column(name, type(kind)(decode=False))
    yield from rows


Origin = LocalFiles | HubSplit


@dataclass(frozen=True)
class Origins:
    """The sources of every split."""

    train: tuple[Origin, ...]  # one, or those that are mixed
    weights: tuple[float, ...]  # share of the draws from each; 1 in all
    validation: Origin | None
    test: Origin | None
    problems: tuple[Problem, ...] = ()  # of the sources that could not be found

    def __iter__(self) -> Iterator[Origin]:
        yield from self.train
        yield from (origin for origin in (self.validation, self.test) if origin is not None)

    @property
    def places(self) -> dict[str, str]:
        """Names of the splits in messages; a validation split that is cut off is called like the training rows."""
        train = ", ".join(origin.place for origin in self.train)
        held = {"validation": self.validation, "test": self.test}
        return {"train": train, **{name: train if origin is None else origin.place for name, origin in held.items()}}

    def stamps(self) -> list[tuple[str, int, int]]:
        """Return name, size and time of change of every local file.

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

    def found(names: str | list[str] | None, where: Data | Source, key: str) -> list[Origin]:
        """Return the origin of the files or splits that `key` names in a block, if it names any that are there."""
        source, block = where.source, key.rpartition(".")[0]
        if names is None:
            return []
        if source is None or Path(source).expanduser().is_dir():
            given = [name for name in ("subset", "revision") if getattr(where, name) is not None]
            if given:
                reason = f"belongs to a Hub id, and {source} is a folder; remove it"
                raise RecipeError(Problem(reason, key=f"{block}.{name}") for name in given)
            files, wrong = find(names, source, key)
            problems.extend(wrong)
            return [] if wrong else [LocalFiles(key, tuple(files), data.cache)]
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
            message = f"{source!r} is no folder here, and no data set on the Hub (owner/name)"
            problems.append(Problem(message, key=f"{block}.source"))
            return []
        split = names if isinstance(names, str) else "+".join(names)
        return [HubSplit(key, source, where.subset, where.revision, split)]

    train = found(data.train, data, "data.train")
    for index, part in enumerate(data.mix or ()):
        train += found(part.train, part, f"data.mix.{index}.train")
    held = {name: found(getattr(data, name), data, f"data.{name}") for name in ("validation", "test")}
    total = sum(part.weight for part in data.mix or ())
    weights = tuple(part.weight / total for part in data.mix or ()) or (1.0,)
    validation, test = (next(iter(origins), None) for origins in held.values())
    return Origins(tuple(train), weights, validation, test, tuple(problems))
