"""Facts about the encoded rows of each split, counted whatever `data.checks` says, stretch by stretch.

What grows with the tokens is never held: of each row a hash, a label and a length are kept, at most 60 bytes in all.
Rows are compared by BLAKE2b hashes of 8 bytes of their token ids, after cutting: among 10 million rows two different
ones share a hash with a probability of 3e-6.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from hf_finetune.data import encoding as data_encoding
from hf_finetune.data.encoding import INDEX, MARKS, Encoder, Encoding
from hf_finetune.data.splits import PART, ROW, Split
from hf_finetune.tasks import _likeness as likeness
from hf_finetune.tasks import _texts as texts
from hf_finetune.tasks._catalogue import REMARKS
from hf_finetune.tasks.base import IGNORE, tokenizer_of

Array = np.ndarray[Any, Any]

SHOWN = 10  # rows that a tally remembers
BINS = 32  # bins of the lengths up to `TAIL`; one more holds those beyond
TAIL = 99.5  # percentile of the lengths above which they share a bin
TOKENS = 20  # tokens that are listed for each label
LABELS = 50  # commonest labels whose tokens are listed
NOTABLE = 1.96  # z-score from which on a token is distinctive of a label
PRIOR = 0.1  # weight of the tokens of all rows in those of a label: ten of ten stand out, three of three do not
END = 4  # trained tokens at the end of a row, one of which should end the turn: templates put a little behind it
STRETCH_TOKENS, STRETCH_ROWS = 1 << 20, 100_000
"""Most tokens and rows that are looked at together; a longer row is looked at alone."""


@dataclass(frozen=True)
class Tally:
    """The rows of a split that one check found."""

    count: int = 0  # Rows; tokens for `unknown_tokens`
    rows: tuple[tuple[str, int], ...] = ()
    """The first few: source as messages call it, and the row's number there, from 1."""
    detail: str = ""  # the exact finding in the first of them; empty where the check says all


@dataclass(frozen=True)
class Facts:
    """One split."""

    tallies: Mapping[str, Tally] = field(default_factory=dict)  # by name of the check; only those that struck
    length_edges: tuple[int, ...] = ()
    """Bins of the tokens a row, before cutting: from, to (exclusive), to, ...; one more than `lengths`."""
    lengths: tuple[int, ...] = ()  # rows in each bin
    labels: Mapping[str, int] = field(default_factory=dict)
    """Kept rows of each label by name (multi_label: its positive cells); empty without labels."""
    telling: Mapping[str, tuple[tuple[str, int, int], ...]] = field(default_factory=dict)
    """Label name -> its most distinctive tokens: text, how often in rows of the label, and in all rows. For tasks
    without labels, '' -> the most frequent tokens. Special tokens are left out."""


def gather(splits: Mapping[str, Split], encodings: Mapping[str, Encoding], encoder: Encoder) -> dict[str, Facts]:
    """Return the facts of every split, from its raw rows, the encoded ones, and what encoded them."""
    found, trained = dict[str, Facts](), None
    groups: Array = np.empty(0, dtype=np.int64)
    # The training rows first: the others are compared with them.
    for name in sorted(encodings, key=lambda name: name != "train"):
        counting = _Counting(splits[name], encodings[name], encoder)
        found[name] = counting.facts(trained, groups)
        if name == "train":
            trained, groups = counting.distinct, np.unique(counting.groups)
    return {name: found[name] for name in encodings}


class _Stretch:
    """Rows of the encoded split that follow each other.

    Args:
        start: Number of the first one.
        rows: Their columns, as an Arrow table.
        kept: The rows that are used, (rows,) bool.
        ids: Name of the column of tokens; None where rows are not made of tokens.
        content: Name of the column by which equal rows are found.
    """

    def __init__(self, start: int, rows: Any, kept: Array, ids: str | None, content: str) -> None:
        self.start, self.rows, self.kept, self.used = start, rows, kept, np.flatnonzero(kept)
        self.ids: Array = np.empty(0, dtype=np.int32)
        self.starts: Array = np.zeros(len(rows) + 1, dtype=np.int64)
        """Tokens of all rows, and the begin of each row in them, with the end."""
        if ids is not None:
            self.lists, (self.ids, self.starts) = rows[ids], _flat(rows, ids)
        self.content = None if content == ids else rows[content].to_pylist()

    def column(self, name: str) -> Array:
        """Return a column of numbers."""
        values: Array = self.rows[name].to_numpy()
        return values

    def tokens(self, rows: Array) -> Array:
        """Return the tokens of some rows, which are counted from the first one here."""
        if len(rows) == len(self.kept):
            return self.ids
        found: Array = pc.list_flatten(self.lists.take(rows)).to_numpy()
        return found

    def hashes(self) -> Array:
        """Return a hash for each row that is used."""
        parts: Any
        if self.content is not None:
            parts = (value if isinstance(value, bytes) else repr(value).encode() for value in self.content)
        else:
            tokens: Any = np.ascontiguousarray(self.ids, dtype="<i4")
            view = memoryview(tokens).cast("B")
            parts = (view[start:end] for start, end in itertools.pairwise((self.starts * 4).tolist()))
        digests = b"".join(hashlib.blake2b(part, digest_size=8).digest() for part in parts)
        return np.frombuffer(digests, dtype="<u8")[self.used]


class _Counting:
    """Goes through one split once."""

    def __init__(self, split: Split, encoding: Encoding, encoder: Encoder) -> None:
        self.split, self.encoding, self.encoder = split, encoding, encoder
        self.struck: dict[str, tuple[int, list[int]]] = {}
        """By check: the number of rows of the encoded split that it found, and the first few."""
        self.labels = self._label_cells()
        """Of the kept rows, (rows,) ids or (rows, C) cells; None for numbers and for language models."""
        names, self.counts = encoder.targets.names, dict[str, int]()
        if self.labels is not None:
            one = self.labels.ndim == 1
            counts = np.bincount(self.labels, minlength=len(names)) if one else self.labels.sum(axis=0)
            self.counts = dict(zip(names, counts.tolist(), strict=True))
        self.listed = sorted(names, key=lambda name: -self.counts[name])[:LABELS] if self.counts else [""]
        """Labels whose tokens are counted."""
        self.tokenizer: Any = None if encoder.task.token_ids is None else tokenizer_of(encoder.processor)
        """None where rows are not made of tokens."""
        self.token_counts = np.zeros((len(self.listed), len(self.tokenizer or ())), dtype=np.int64)
        self.endings = list(encoder.task.endings(encoder.processor))
        empty = np.ones(len(split.rows), dtype=bool)
        empty[encoding.faulty] = False
        hashes, groups, before = list[Array](), list[Array](), 0
        ids, content = None if self.tokenizer is None else encoder.task.token_ids, encoder.task.content
        group = encoder.task.group
        columns = {"whole", "size", "weight", INDEX, MARKS, content}
        columns |= {name for name in (ids, group) if name is not None}
        for start, rows in self._tables(sorted(columns | ({"labels"} if self.endings else set()))):
            stretch = _Stretch(start, rows, encoding.kept[start : start + len(rows)], ids, content)
            empty[stretch.column(INDEX)] = False
            self._look(stretch)
            if self.tokenizer is not None:
                end = before + len(stretch.used)
                self._count_tokens(stretch, None if self.labels is None else self.labels[before:end])
                before = end
            hashes.append(stretch.hashes())
            groups.append(np.empty(0, np.int64) if group is None else stretch.column(group)[stretch.used])
        self.hashes = np.concatenate(hashes)  # of the kept rows
        self.groups = np.concatenate(groups)  # of the kept rows, if any
        self.empty = np.flatnonzero(empty)  # raw rows without text
        self.distinct = self._compare()  # hashes of the kept rows, each once, sorted

    def facts(self, trained: Array | None, groups: Array) -> Facts:
        """Return the facts; `trained` has the sorted hashes of the training rows, where they are another split.

        So does `groups` of what rows of two splits should not have in common.
        """
        if trained is not None:
            # What sorts behind the last hash is compared with the last.
            places = np.minimum(np.searchsorted(trained, self.hashes), len(trained) - 1)
            kept = np.flatnonzero(self.encoding.kept)
            self._add("leakage", kept[trained[places] == self.hashes])
            self._add("shared_prompts", kept[np.isin(self.groups, groups)] if len(self.groups) else kept[:0])
        tallies = {
            name: Tally(count, tuple(map(self._place, rows)), self._detail(name, rows[0]))
            for name, (count, rows) in self.struck.items()
        }
        for name, numbers in self.encoder.task.findings(self.split.raw()).items():
            if numbers:
                tallies[name] = Tally(len(numbers), tuple(map(self.split.where, numbers[:SHOWN])))
        if len(self.empty):
            first = tuple(self.split.where(int(row)) for row in self.empty[:SHOWN])
            tallies["empty_text"] = Tally(len(self.empty), first)
        alike = [name for group in likeness.groups(self.counts) for name in group[1:] if self.counts[name]]
        if self.labels is not None and alike:
            # Rows whose label is like a commoner one; with the first row of each such label.
            labels, kept = self.labels, np.flatnonzero(self.encoding.kept)
            ids = [self.encoder.targets.names.index(name) for name in alike[:SHOWN]]
            rows = [int(kept[(labels == index if labels.ndim == 1 else labels[:, index]).argmax()]) for index in ids]
            count = sum(self.counts[name] for name in alike)
            tallies["similar_labels"] = Tally(count, tuple(map(self._place, rows)))
        lengths = self.encoding.whole.data["whole"].to_numpy()
        longest, most = int(lengths.max()), int(np.percentile(lengths, TAIL)) + 1
        step = max(1, -(-most // BINS))
        edges = list(range(0, most + step, step))
        edges += [longest + 1] if edges[-1] <= longest else []
        bins = tuple(np.histogram(lengths, bins=np.array(edges))[0].tolist())
        return Facts(tallies, tuple(edges), bins, self.counts, self._telling())

    def _place(self, row: int) -> tuple[str, int]:
        """Return the source of an encoded row, and its number there."""
        found = self.encoding.whole.select_columns([PART, ROW])[row]
        return self.split.places[found[PART]], found[ROW]

    def _detail(self, check: str, row: int) -> str:
        """Return the exact finding of a check in an encoded row; empty where the check says all."""
        if check != "special_tokens" and check not in REMARKS:
            return ""
        index = self.encoding.whole.select_columns([INDEX])[row][INDEX]
        raw = replace(self.split, rows=self.split.rows.select([index])).raw()[:]
        if check in REMARKS:
            return self.encoder.task.remark(raw, self.encoder.processor, check)
        specials = texts.pattern(self.tokenizer)
        return (
            repr(data_encoding.special((cells[0] for cells in raw.values()), specials)) if specials is not None else ""
        )

    def _add(self, check: str, rows: Array, count: int | None = None) -> None:
        """Count these rows of the encoded split; `count` where something else than rows is counted."""
        if len(rows):
            before, first = self.struck.get(check, (0, []))
            more = rows[: SHOWN - len(first)].tolist()
            self.struck[check] = before + (len(rows) if count is None else count), first + more

    def _look(self, stretch: _Stretch) -> None:
        """Find marks in the raw text, rows of which nothing, or no end, is trained, doubled BOS and unknown tokens."""
        marks, places = stretch.column(MARKS), self.split.places
        found = {"nul_characters": data_encoding.NUL, "control_characters": data_encoding.CONTROL}
        found |= {"special_tokens": data_encoding.SPECIAL, **REMARKS}
        if any(place.partition(" (and ")[0].lower().endswith((".csv", ".tsv")) for place in places):
            found["missing_words"] = data_encoding.MISSING
        for check, bit in found.items():
            self._add(check, stretch.start + np.flatnonzero(marks & bit))
        whole = stretch.column("whole") <= stretch.column("size")
        gone = ~stretch.kept & (stretch.column("weight") == 0)
        if self.encoding.report.dropped:  # then over-long rows are dropped for that
            gone &= whole
        self._add("no_trained_token", stretch.start + np.flatnonzero(gone))
        if self.endings:
            # Rows that are not cut and whose last trained tokens do not end a turn or text.
            labels, starts = _flat(stretch.rows, "labels")
            trained = np.flatnonzero(labels != IGNORE)
            ended = np.isin(labels[trained], self.endings)
            # Of each row, its trained tokens are trained[first:last]; `before` counts the ends up to each of them.
            first, last = np.searchsorted(trained, starts[:-1]), np.searchsorted(trained, starts[1:])
            before = np.concatenate([[0], np.cumsum(ended)])
            without = before[last] - before[np.maximum(first, last - END)] == 0
            self._add("untrained_end", stretch.start + np.flatnonzero(without & whole & stretch.kept))
        if self.tokenizer is None:
            return
        bos, unknown = self.tokenizer.bos_token_id, self.tokenizer.unk_token_id
        if bos is not None:
            rows = stretch.used[np.diff(stretch.starts)[stretch.used] >= 2]
            first = stretch.starts[rows]
            doubled = (stretch.ids[first] == bos) & (stretch.ids[first + 1] == bos)
            self._add("doubled_bos", stretch.start + rows[doubled])
        # Some tokenizers name an ordinary token, such as EOS, their unknown one.
        if unknown is not None and unknown != self.tokenizer.eos_token_id:
            row = np.searchsorted(stretch.starts, np.flatnonzero(stretch.ids == unknown), side="right") - 1
            row = row[stretch.kept[row]]
            self._add("unknown_tokens", stretch.start + np.unique(row), len(row))

    def _count_tokens(self, stretch: _Stretch, labels: Array | None) -> None:
        """Add the tokens of the kept rows to those of their labels."""
        names = list(self.encoder.targets.names)
        for place, name in enumerate(self.listed):
            rows = stretch.used
            if labels is not None:
                label = names.index(name)
                rows = rows[labels == label if labels.ndim == 1 else labels[:, label]]
            found = np.bincount(stretch.tokens(rows))
            if len(found) > self.token_counts.shape[1]:  # tokens that the tokenizer does not count among its own
                self.token_counts = np.pad(self.token_counts, ((0, 0), (0, len(found) - self.token_counts.shape[1])))
            self.token_counts[place, : len(found)] += found

    def _compare(self) -> Array:
        """Find the kept rows with the tokens of another one; of a language model, labels are tokens too."""
        kept = np.flatnonzero(self.encoding.kept)
        # Stable: of equal rows the earliest comes first, and only the later ones are duplicates.
        order = np.argsort(self.hashes, kind="stable")
        ordered = self.hashes[order]
        begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
        later = np.ones(len(order), dtype=bool)
        later[order[begins]] = False
        self._add("duplicates", kept[later])
        if self.labels is None:
            return ordered[begins]
        labels = self.labels
        if labels.ndim > 1:
            # A number for each set of labels: the sum of random numbers, one a label, modulo 2^64.
            weights = np.random.default_rng(0).integers(1, 2**63, labels.shape[1], dtype=np.uint64)
            labels = labels.astype(np.uint64) @ weights
        labels = labels[order]
        differ = np.minimum.reduceat(labels, begins) != np.maximum.reduceat(labels, begins)
        conflicting = np.zeros(len(order), dtype=bool)
        conflicting[order] = np.repeat(differ, np.diff(begins, append=len(order)))
        self._add("conflicting_labels", kept[conflicting])
        return ordered[begins]

    def _label_cells(self) -> Array | None:
        names, feature = self.encoder.targets.names, self.encoding.whole.features.get("labels")
        if not names or feature is None or not self.encoder.task.has_labels:
            return None
        is_one = isinstance(feature, datasets.Value)
        # Cells of several labels are floats; where every token has a label, these are integers, and no row has one.
        if not is_one and feature.feature.dtype.startswith("int"):
            return None
        parts = []
        for start, rows in self._tables(["labels"]):
            # Half the width of what is stored, as these are held for all rows.
            values = rows["labels"].to_numpy().astype(np.int32) if is_one else _flat(rows, "labels")[0]
            values = values if is_one else values.reshape(-1, len(names)) == 1
            parts.append(values[self.encoding.kept[start : start + len(values)]])
        return np.concatenate(parts)

    def _telling(self) -> dict[str, tuple[tuple[str, int, int], ...]]:
        """Return the most distinctive tokens of each label; the most frequent ones where there are not two labels.

        Distinctive are the largest z-scores of the log-odds of a token in rows of the label and in the others, with
        `PRIOR` of all rows as prior, so that neither rare nor common tokens come out on top (Monroe, Colaresi, Quinn
        2008: Fightin' Words, equations 15, 18 and 22).
        """
        counts, tokenizer = self.token_counts, self.tokenizer
        if tokenizer is None:
            return {}
        # Chat templates bring tokens that are special without being one of the tokenizer's named ones.
        special = {*tokenizer.all_special_ids, *(i for i, one in tokenizer.added_tokens_decoder.items() if one.special)}
        counts[:, [index for index in special if index < counts.shape[1]]] = 0
        whole, found = counts.sum(axis=0), {}
        used = np.flatnonzero(whole)  # a vocabulary has more
        whole = whole[used]
        for name, count in zip(self.listed, counts[:, used], strict=True):
            scores = count + NOTABLE
            if len(self.listed) > 1:
                mine, others = count + PRIOR * whole, whole - count + PRIOR * whole
                with np.errstate(divide="ignore", invalid="ignore"):  # of a single token
                    odds = np.log(mine / (mine.sum() - mine)) - np.log(others / (others.sum() - others))
                scores = odds / np.sqrt(1 / mine + 1 / others)
            top = [at for at in np.argsort(-scores, kind="stable")[:TOKENS] if scores[at] >= NOTABLE]
            if self.labels is None or self.counts[name]:
                listed = ((str(tokenizer.decode([int(used[at])])), int(count[at]), int(whole[at])) for at in top)
                found[name] = tuple(listed)
        # In the order of the labels, not of their counts.
        return {name: found[name] for name in self.encoder.targets.names or [""] if name in found} or found

    def _tables(self, columns: list[str]) -> Iterator[tuple[int, Any]]:
        """Yield some columns as Arrow tables, with the number of the first row of each."""
        rows = self.encoding.whole.select_columns(columns).with_format("arrow")
        ends = np.cumsum(self.encoding.whole.data["size"].to_numpy())
        # A stretch ends with the row in which its tokens are full, or after so many rows, whatever comes first.
        by_tokens = np.searchsorted(ends, np.arange(STRETCH_TOKENS, ends[-1], STRETCH_TOKENS)) + 1
        bounds = np.unique([0, *by_tokens, *range(STRETCH_ROWS, len(ends), STRETCH_ROWS), len(ends)])
        for start, end in itertools.pairwise(bounds.tolist()):
            yield start, rows[start:end]


def _flat(rows: Any, name: str) -> tuple[Array, Array]:
    """Return all values of a column of lists, and where each row starts in them, with the end; (N,), (rows + 1,)."""
    values: Array = pc.list_flatten(rows[name]).to_numpy()
    lengths = pc.list_value_length(rows[name]).to_numpy()
    return values, np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
