"""Counts the facts of each split: what grows with the tokens is looked at stretch by stretch, and never held.

Of each row a hash, a label and a length are kept, at most 60 bytes in all. Rows are compared by BLAKE2b hashes of 8
bytes of their token ids, after cutting: among 10 million rows two different ones share a hash with a probability of
3e-6.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np

from hf_finetune.data import encoding as data_encoding
from hf_finetune.data.encoding import INDEX, MARKS, Encoding
from hf_finetune.data.facts import Facts, Tally
from hf_finetune.data.splits import PART, ROW, Split
from hf_finetune.tasks import _likeness as likeness
from hf_finetune.tasks import _texts as tasks_texts
from hf_finetune.tasks.base import IGNORE, REMARKS, State, Task, tokenizer_of

Array = np.ndarray[Any, Any]

SHOWN = 10
"""Rows that a tally remembers."""
BINS = 32
"""Bins of the lengths up to `TAIL`; one more holds those beyond."""
TAIL = 99.5
"""Percentile of the lengths above which they share a bin."""
FREQUENT = 20
"""Tokens that are listed for each label."""
LABELS = 50
"""Commonest labels whose frequent tokens are listed."""
END = 4
"""Trained tokens at the end of a row, one of which should end the turn: templates put a little behind it."""
STRETCH_TOKENS, STRETCH_ROWS = 1 << 20, 100_000
"""Most tokens and rows that are looked at together; a longer row is looked at alone."""


@dataclass(frozen=True)
class Setting:
    """What the facts of every split depend on."""

    task: Task
    processor: Any
    targets: State
    max_length: int


def gather(splits: Mapping[str, Split], encodings: Mapping[str, Encoding], setting: Setting) -> dict[str, Facts]:
    """Facts of every split.

    Args:
        splits: Raw rows by name of the split.
        encodings: The same, encoded.
        setting: Task, processor, labels and length.
    """
    found, trained = dict[str, Facts](), None
    for name in sorted(encodings, key=lambda name: name != "train"):
        counting = _Counting(splits[name], encodings[name], setting)
        found[name] = counting.facts(trained)
        if name == "train":
            trained = counting.distinct
    return {name: found[name] for name in encodings}


@dataclass
class _Struck:
    """Rows of the encoded split that a check struck."""

    count: int = 0
    rows: list[int] = field(default_factory=list)
    """The first few."""

    def add(self, rows: Array, count: int | None = None) -> None:
        """These rows follow; `count` where something else than rows is counted."""
        self.count += len(rows) if count is None else count
        self.rows += rows[: SHOWN - len(self.rows)].tolist()


@dataclass(frozen=True)
class _Stretch:
    """Rows of the encoded split that follow each other."""

    start: int
    """Number of the first one."""
    kept: Array
    """Which of them are used."""
    column: Mapping[str, Array]
    content: list[Any] | None
    """By which equal rows are found, where that is not `ids`."""
    ids: Array
    """Tokens of all of them; empty where rows are not made of tokens."""
    starts: Array
    """Where each row begins in `ids`, and the end."""
    labels: tuple[Array, Array] | None
    """The same of the labels, where each token has its own."""

    def tokens(self, rows: Array) -> Array:
        """The tokens of some rows, which are counted from the first one here."""
        if len(rows) == len(self.kept):
            return self.ids
        lengths = np.diff(self.starts)[rows]
        # The positions of all tokens of the rows: each row's own start, counted up.
        before = np.cumsum(lengths) - lengths
        offsets = np.repeat(self.starts[:-1][rows] - before, lengths)
        return self.ids[offsets + np.arange(len(offsets))]

    def hashes(self) -> Array:
        """One a row."""
        if self.content is not None:
            texts = (value if isinstance(value, bytes) else repr(value).encode() for value in self.content)
            found = b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts)
            return np.frombuffer(found, dtype="<u8")
        bytes_: Any = np.ascontiguousarray(self.ids, dtype="<i4")
        view = memoryview(bytes_).cast("B")
        spans = itertools.pairwise((self.starts * 4).tolist())
        digests = b"".join(hashlib.blake2b(view[start:end], digest_size=8).digest() for start, end in spans)
        return np.frombuffer(digests, dtype="<u8")


class _Counting:
    """Goes through one split once; `kept` arrays hold only the rows that are used."""

    def __init__(self, split: Split, encoding: Encoding, setting: Setting) -> None:
        self.split, self.encoding, self.setting = split, encoding, setting
        self.struck: dict[str, _Struck] = {}
        self.labels = self._label_cells()
        """Of the kept rows, (rows,) ids or (rows, C) cells; None for numbers and for language models."""
        self.counts = self._label_counts()
        names = setting.targets.names
        self.listed = sorted(names, key=lambda name: -self.counts[name])[:LABELS] if self.counts else [""]
        """Labels whose frequent tokens are counted."""
        self.tokenizer: Any = None if setting.task.token_ids is None else tokenizer_of(setting.processor)
        """None where rows are not made of tokens."""
        self.frequent = np.zeros((len(self.listed), len(self.tokenizer or ())), dtype=np.int64)
        self.missing = np.ones(len(split.rows), dtype=bool)
        """Raw rows without text."""
        self.endings = list(setting.task.endings(setting.processor))
        self.distinct: Array = np.empty(0, dtype="<u8")
        """Hashes of the kept rows, each once, sorted."""
        self.hashes = self._pass()

    def _pass(self) -> Array:
        """Count everything that a row shows by itself; returns the hashes of the kept rows."""
        hashes, before = [], 0
        for stretch in self._stretches():
            kept = np.flatnonzero(stretch.kept)
            self._marks(stretch)
            self._untrained(stretch)
            self._untrained_end(stretch)
            if self.tokenizer is not None:
                self._doubled_bos(stretch, kept)
                self._unknown(stretch)
                labels = None if self.labels is None else self.labels[before : before + len(kept)]
                self._count_tokens(stretch, kept, labels)
            hashes.append(stretch.hashes()[kept])
            before += len(kept)
        return np.concatenate(hashes)

    def facts(self, trained: Array | None) -> Facts:
        """Args: trained: sorted hashes of the training rows, where this is another split and they are known."""
        edges, lengths = _histogram(self.encoding.whole.data["whole"].to_numpy())
        return Facts(self._tallies(trained), edges, lengths, self.counts, self._frequent())

    def _tallies(self, trained: Array | None) -> dict[str, Tally]:
        self._compare()
        if trained is not None:
            places = np.minimum(np.searchsorted(trained, self.hashes), len(trained) - 1)
            self._strike("leakage", trained[places] == self.hashes)
        struck = {name: self.struck[name] for name in _ORDER if name in self.struck}
        tallies = {
            name: Tally(one.count, tuple(map(self._place, one.rows)), self._detail(name, one.rows[0]))
            for name, one in struck.items()
        }
        empty = np.flatnonzero(self.missing)
        if len(empty):
            tallies["empty_text"] = Tally(len(empty), tuple(self.split.where(int(row)) for row in empty[:SHOWN]))
        similar = self._similar_labels()
        return tallies | ({"similar_labels": similar} if similar.count else {})

    def _place(self, row: int) -> tuple[str, int]:
        """Source of an encoded row, and its number there."""
        found = self.encoding.whole.select_columns([PART, ROW])[row]
        return self.split.places[found[PART]], found[ROW]

    def _detail(self, check: str, row: int) -> str:
        """What exactly a check finds in an encoded row; empty where the check says all."""
        if check != "special_tokens" and check not in REMARKS:
            return ""
        index, setting = self.encoding.whole.select_columns([INDEX])[row][INDEX], self.setting
        raw = replace(self.split, rows=self.split.rows.select([index])).raw()[:]
        if check in REMARKS:
            return setting.task.remark(raw, setting.processor, check)
        specials = tasks_texts.pattern(self.tokenizer)
        return (
            repr(data_encoding.special((cells[0] for cells in raw.values()), specials)) if specials is not None else ""
        )

    def _strike(self, check: str, mask: Array) -> None:
        """Some of the kept rows have what a check looks for."""
        if mask.any():
            self._add(check, np.flatnonzero(self.encoding.kept)[mask])

    def _add(self, check: str, rows: Array, count: int | None = None) -> None:
        if len(rows):
            self.struck.setdefault(check, _Struck()).add(rows, count)

    def _marks(self, stretch: _Stretch) -> None:
        """What stands in the raw text, and which raw rows have any."""
        marks, places = stretch.column[MARKS], self.split.places
        is_table = any(place.partition(" (and ")[0].lower().endswith((".csv", ".tsv")) for place in places)
        found = {"nul_characters": data_encoding.NUL, "control_characters": data_encoding.CONTROL}
        found |= {"special_tokens": data_encoding.SPECIAL, **REMARKS}
        for check, bit in (found | {"missing_words": data_encoding.MISSING} if is_table else found).items():
            self._add(check, stretch.start + np.flatnonzero(marks & bit))
        self.missing[stretch.column[INDEX]] = False

    def _untrained(self, stretch: _Stretch) -> None:
        over = stretch.column["whole"] > self.setting.max_length
        dropped = self.encoding.report.dropped > 0  # then over-long rows are dropped for that
        gone = ~stretch.kept & (stretch.column["weight"] == 0)
        self._add("no_trained_token", stretch.start + np.flatnonzero(gone & ~over if dropped else gone))

    def _doubled_bos(self, stretch: _Stretch, kept: Array) -> None:
        bos = self.tokenizer.bos_token_id
        if bos is not None:
            rows = kept[np.diff(stretch.starts)[kept] >= 2]
            first = stretch.starts[rows]
            doubled = (stretch.ids[first] == bos) & (stretch.ids[first + 1] == bos)
            self._add("doubled_bos", stretch.start + rows[doubled])

    def _untrained_end(self, stretch: _Stretch) -> None:
        """Rows that are not cut and whose last trained tokens do not end a turn or text."""
        if stretch.labels is None:
            return
        labels, starts = stretch.labels
        trained = np.flatnonzero(labels != IGNORE)
        ended = np.isin(labels[trained], self.endings)
        # Of each row, its trained tokens are trained[first:last].
        first, last = np.searchsorted(trained, starts[:-1]), np.searchsorted(trained, starts[1:])
        before = np.concatenate([[0], np.cumsum(ended)])
        without = before[last] - before[np.maximum(first, last - END)] == 0
        whole = stretch.column["whole"] <= self.setting.max_length
        self._add("untrained_end", stretch.start + np.flatnonzero(without & whole & stretch.kept))

    def _unknown(self, stretch: _Stretch) -> None:
        unknown = self.tokenizer.unk_token_id
        # Some tokenizers name an ordinary token, such as EOS, their unknown one.
        if unknown is None or unknown == self.tokenizer.eos_token_id:
            return
        row = np.searchsorted(stretch.starts, np.flatnonzero(stretch.ids == unknown), side="right") - 1
        row = row[stretch.kept[row]]
        self._add("unknown_tokens", stretch.start + np.unique(row), len(row))

    def _count_tokens(self, stretch: _Stretch, kept: Array, labels: Array | None) -> None:
        """Add the tokens of the kept rows to those of their labels."""
        names = list(self.setting.targets.names)
        for place, name in enumerate(self.listed):
            rows = kept
            if labels is not None:
                label = names.index(name)
                rows = kept[labels == label if labels.ndim == 1 else labels[:, label]]
            found = np.bincount(stretch.tokens(rows))
            if len(found) > self.frequent.shape[1]:  # tokens that the tokenizer does not count among its own
                self.frequent = np.pad(self.frequent, ((0, 0), (0, len(found) - self.frequent.shape[1])))
            self.frequent[place, : len(found)] += found

    def _compare(self) -> None:
        """Find the kept rows with the tokens of another one; of a language model, labels are tokens too."""
        order = np.argsort(self.hashes, kind="stable")
        ordered = self.hashes[order]
        begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        self.distinct = ordered[begins]
        later = np.ones(len(order), dtype=bool)
        later[order[begins]] = False
        self._strike("duplicates", later)
        if self.labels is None:
            return
        labels = self.labels
        if labels.ndim > 1:  # a number for each set of labels
            weights = np.random.default_rng(0).integers(1, 2**63, labels.shape[1], dtype=np.uint64)
            labels = labels.astype(np.uint64) @ weights
        labels = labels[order]
        differ = np.minimum.reduceat(labels, begins) != np.maximum.reduceat(labels, begins)
        conflicting = np.zeros(len(order), dtype=bool)
        conflicting[order] = np.repeat(differ, np.diff(begins, append=len(order)))
        self._strike("conflicting_labels", conflicting)

    def _label_cells(self) -> Array | None:
        names, feature = self.setting.targets.names, self.encoding.whole.features.get("labels")
        if not names or feature is None:
            return None
        is_one = isinstance(feature, datasets.Value)
        # A number to learn is a float, and where every token has a label, these are integers.
        if (feature.dtype if is_one else feature.feature.dtype).startswith("int") is not is_one:
            return None
        parts = []
        for start, rows in self._tables(["labels"]):
            values = rows["labels"].to_numpy().astype(np.int32) if is_one else _flat(rows, "labels")[0]
            values = values if is_one else values.reshape(-1, len(names)) == 1
            parts.append(values[self.encoding.kept[start : start + len(values)]])
        return np.concatenate(parts)

    def _label_counts(self) -> dict[str, int]:
        labels, names = self.labels, self.setting.targets.names
        if labels is None:
            return {}
        counts = np.bincount(labels, minlength=len(names)) if labels.ndim == 1 else labels.sum(axis=0)
        return dict(zip(names, counts.tolist(), strict=True))

    def _similar_labels(self) -> Tally:
        """Count rows whose label is like a commoner one; remember the first row of each such label, in their order."""
        alike = [name for group in likeness.groups(self.counts) for name in group[1:] if self.counts[name]]
        if self.labels is None or not alike:
            return Tally()
        labels, kept = self.labels, np.flatnonzero(self.encoding.kept)
        ids = [self.setting.targets.names.index(name) for name in alike]
        first = [int((labels == index if labels.ndim == 1 else labels[:, index]).argmax()) for index in ids]
        places = tuple(self._place(int(row)) for row in kept[first[:SHOWN]])
        return Tally(sum(self.counts[name] for name in alike), places)

    def _frequent(self) -> dict[str, tuple[tuple[str, int], ...]]:
        """The most frequent tokens of each label, special ones left out."""
        counts, tokenizer = self.frequent, self.tokenizer
        if tokenizer is None:
            return {}
        special = {*tokenizer.all_special_ids, *(i for i, one in tokenizer.added_tokens_decoder.items() if one.special)}
        counts[:, [index for index in special if index < counts.shape[1]]] = 0
        tops = dict(zip(self.listed, counts, strict=True))
        names = [name for name in self.setting.targets.names if self.counts.get(name) and name in tops]
        return {name: self._top(tops[name]) for name in (names if self.labels is not None else [""])}

    def _top(self, counts: Array) -> tuple[tuple[str, int], ...]:
        top = np.argsort(-counts, kind="stable")[:FREQUENT]
        decode = self.tokenizer.decode
        return tuple((str(decode([int(index)])), int(counts[index])) for index in top if counts[index])

    def _stretches(self) -> Iterator[_Stretch]:
        plain = ["whole", "weight", INDEX, MARKS]
        task, ids = self.setting.task, self.setting.task.token_ids if self.tokenizer is not None else None
        others = {*([] if ids is None else [ids]), task.content, *(["labels"] if self.endings else [])}
        nothing = np.empty(0, dtype=np.int32), np.zeros(1, dtype=np.int64)
        for start, rows in self._tables([*plain, *sorted(others)]):
            column = {name: rows[name].to_numpy() for name in plain}
            labels = _flat(rows, "labels") if self.endings else None
            kept = self.encoding.kept[start : start + len(rows)]
            content = None if task.content == ids else rows[task.content].to_pylist()
            tokens, starts = nothing if ids is None else _flat(rows, ids)
            yield _Stretch(start, kept, column, content, tokens, starts, labels)

    def _tables(self, columns: list[str]) -> Iterator[tuple[int, Any]]:
        """Some columns as Arrow tables, with the number of the first row of each."""
        rows = self.encoding.whole.select_columns(columns).with_format("arrow")
        ends = np.cumsum(self.encoding.whole.data["size"].to_numpy())
        by_tokens = np.searchsorted(ends, np.arange(STRETCH_TOKENS, ends[-1], STRETCH_TOKENS)) + 1
        bounds = np.unique([0, *by_tokens, *range(STRETCH_ROWS, len(ends), STRETCH_ROWS), len(ends)])
        for start, end in itertools.pairwise(bounds.tolist()):
            yield start, rows[start:end]


_ORDER = (
    "no_trained_token",
    "duplicates",
    "conflicting_labels",
    "nul_characters",
    "control_characters",
    "missing_words",
    "doubled_bos",
    "untrained_end",
    "special_tokens",
    *REMARKS,
    "leakage",
    "unknown_tokens",
)
"""Of the tallies."""


def _flat(rows: Any, name: str) -> tuple[Array, Array]:
    """All values of a column of lists, and where each row starts in them, with the end; (N,), (rows + 1,)."""
    chunks = rows[name].chunks
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
    lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in chunks]
    starts = np.concatenate([[0], np.cumsum(np.concatenate([*lengths, [0]])[:-1])]).astype(np.int64)
    return (np.concatenate(values) if values else np.empty(0, dtype=np.int32)), starts


def _histogram(lengths: Array) -> tuple[tuple[int, ...], tuple[int, ...]]:
    longest = int(lengths.max())
    most = int(np.percentile(lengths, TAIL)) + 1
    step = max(1, -(-most // BINS))
    edges = list(range(0, most + step, step))
    if edges[-1] <= longest:
        edges.append(longest + 1)
    return tuple(edges), tuple(np.histogram(lengths, bins=np.array(edges))[0].tolist())
