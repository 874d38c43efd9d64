"""Counts the facts of each split, on arrays.

Rows are compared by BLAKE2b hashes of 8 bytes of their token ids, after cutting: among 10 million rows two different
ones share a hash with a probability of 3e-6.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_finetune.data import rawtext
from hf_finetune.data.encoding import INDEX, MARKS, Encoding
from hf_finetune.data.facts import Facts, Tally
from hf_finetune.data.splits import PART, ROW, Split
from hf_finetune.language import escaping
from hf_finetune.tasks import REMARKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_finetune.tasks import Targets, Task

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


@dataclass(frozen=True)
class Setting:
    """What the facts of every split depend on."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    targets: Targets
    max_length: int


def gather(splits: Mapping[str, Split], encodings: Mapping[str, Encoding], setting: Setting) -> dict[str, Facts]:
    """Facts of every split.

    Args:
        splits: Raw rows by name of the split.
        encodings: The same, encoded.
        setting: Task, tokenizer, labels and length.
    """
    counted = {name: _Counting(splits[name], encodings[name], setting) for name in encodings}
    trained = counted["train"].hashes if "train" in counted else None
    return {name: counting.facts(None if name == "train" else trained) for name, counting in counted.items()}


class _Counting:
    """The columns of one split as arrays; `kept` arrays hold only the rows that are used."""

    def __init__(self, split: Split, encoding: Encoding, setting: Setting) -> None:
        self.split, self.encoding, self.setting = split, encoding, setting
        table = encoding.whole.data
        self.column = {name: table[name].to_numpy() for name in ("whole", "trained", INDEX, MARKS, ROW, PART)}
        self.kept = np.flatnonzero(encoding.kept)
        self.ids, self.starts = _flat(encoding.whole, "input_ids")
        view = self.ids.astype("<i4", copy=False).tobytes()
        spans = zip((self.starts[:-1] * 4).tolist(), (self.starts[1:] * 4).tolist(), strict=True)
        digests = b"".join(hashlib.blake2b(view[start:end], digest_size=8).digest() for start, end in spans)
        self.hashes: Array = np.frombuffer(digests, dtype="<u8")[self.kept]

    def facts(self, trained: Array | None) -> Facts:
        """Args: trained: hashes of the training rows, where this is another split and they are known."""
        edges, lengths = _histogram(self.column["whole"])
        return Facts(self._tallies(trained), edges, lengths, self._labels(), self._frequent())

    def _tallies(self, trained: Array | None) -> dict[str, Tally]:
        marks, first = self.column[MARKS], np.unique(self.hashes, return_index=True)[1]
        later = np.ones(len(self.kept), dtype=bool)
        later[first] = False
        is_table = any(place.partition(" (and ")[0].lower().endswith((".csv", ".tsv")) for place in self.split.places)
        found = {
            "no_trained_token": self._untrained(),
            "duplicates": self.kept[later],
            "conflicting_labels": self.kept[self._conflicting()],
            "nul_characters": np.flatnonzero(marks & rawtext.NUL),
            "control_characters": np.flatnonzero(marks & rawtext.CONTROL),
            "missing_words": np.flatnonzero(marks & rawtext.MISSING) if is_table else np.empty(0, int),
            "doubled_bos": self.kept[self._doubled_bos()],
            "untrained_end": self._untrained_end(),
            "special_tokens": np.flatnonzero(marks & rawtext.SPECIAL),
            **{check: np.flatnonzero(marks & bit) for check, bit in REMARKS.items()},
        }
        if trained is not None:
            found["leakage"] = self.kept[np.isin(self.hashes, trained, kind="sort")]  # numpy 2.0's table overflows
        tallies = {name: replace(self._tally(rows), detail=self._detail(name, rows)) for name, rows in found.items()}
        tallies |= {"empty_text": self._empty(), "unknown_tokens": self._unknown()}
        return {name: tally for name, tally in tallies.items() if tally.count}

    def _tally(self, rows: Array) -> Tally:
        places = self.split.places
        shown = [(places[self.column[PART][row]], int(self.column[ROW][row])) for row in rows[:SHOWN]]
        return Tally(len(rows), tuple(shown))

    def _detail(self, check: str, rows: Array) -> str:
        """What exactly is found in the first of the rows."""
        if not len(rows) or (check != "special_tokens" and check not in REMARKS):
            return ""
        index, setting = int(self.column[INDEX][rows[0]]), self.setting
        raw = replace(self.split, rows=self.split.rows.select([index])).raw()[:]
        if check in REMARKS:
            return setting.task.remark(raw, setting.tokenizer, check)
        specials = escaping.pattern(setting.tokenizer)
        return repr(rawtext.special((cells[0] for cells in raw.values()), specials)) if specials is not None else ""

    def _untrained(self) -> Array:
        over = self.column["whole"] > self.setting.max_length
        dropped = self.encoding.report.dropped > 0  # then over-long rows are dropped for that
        gone = ~self.encoding.kept & (self.column["trained"] == 0)
        return np.flatnonzero(gone & ~over if dropped else gone)

    def _empty(self) -> Tally:
        missing = np.ones(len(self.split.rows), dtype=bool)
        missing[self.column[INDEX]] = False
        rows = np.flatnonzero(missing)
        return Tally(len(rows), tuple(self.split.where(int(row)) for row in rows[:SHOWN]))

    def _conflicting(self) -> Array:
        """Kept rows whose tokens also stand with another label."""
        labels = self._label_cells()
        if labels is None:
            return np.zeros(len(self.kept), dtype=bool)
        lines = labels.reshape(len(labels), -1)
        _, label = np.unique(lines, axis=0, return_inverse=True)
        _, group = np.unique(self.hashes, return_inverse=True)
        size = int(group.max()) + 1
        low, high = np.full(size, len(lines)), np.full(size, -1)
        np.minimum.at(low, group, label.ravel())
        np.maximum.at(high, group, label.ravel())
        conflicts: Array = (low != high)[group]
        return conflicts

    def _label_cells(self) -> Array | None:
        """Labels of the kept rows, (rows,) ids or (rows, C) cells; None for numbers and for language models."""
        if not self.setting.targets.names:
            return None
        labels = self.encoding.whole.data["labels"]
        if str(labels.type).startswith(("list", "large_list")):
            flat, _ = _flat(self.encoding.whole, "labels")
            return flat.reshape(-1, len(self.setting.targets.names))[self.kept].astype(np.int64)
        found = labels.to_numpy()[self.kept]
        return found if np.issubdtype(found.dtype, np.integer) else None

    def _labels(self) -> dict[str, int]:
        labels, names = self._label_cells(), self.setting.targets.names
        if labels is None:
            return {}
        counts = np.bincount(labels, minlength=len(names)) if labels.ndim == 1 else labels.sum(axis=0)
        return dict(zip(names, counts.tolist(), strict=True))

    def _doubled_bos(self) -> Array:
        starts, ends, bos = self.starts[:-1][self.kept], self.starts[1:][self.kept], self.setting.tokenizer.bos_token_id
        long = ends - starts >= 2
        doubled = np.zeros(len(self.kept), dtype=bool)
        if bos is not None:
            first = starts[long]
            doubled[long] = (self.ids[first] == bos) & (self.ids[first + 1] == bos)
        return doubled

    def _untrained_end(self) -> Array:
        """Rows that are not cut and whose last trained tokens do not end a turn or text."""
        endings = self.setting.task.endings(self.setting.tokenizer)
        if not endings:
            return np.empty(0, dtype=int)
        from hf_finetune.tasks import IGNORE

        labels, starts = _flat(self.encoding.whole, "labels")
        trained = np.flatnonzero(labels != IGNORE)
        ended = np.isin(labels[trained], list(endings))
        # Of each row, its trained tokens are trained[first:last].
        first, last = np.searchsorted(trained, starts[:-1]), np.searchsorted(trained, starts[1:])
        before = np.concatenate([[0], np.cumsum(ended)])
        without = before[last] - before[np.maximum(first, last - END)] == 0
        whole = self.column["whole"] <= self.setting.max_length
        return np.flatnonzero(without & whole & self.encoding.kept)

    def _unknown(self) -> Tally:
        unknown = self.setting.tokenizer.unk_token_id
        # Some tokenizers name an ordinary token, such as EOS, their unknown one.
        if unknown is None or unknown == self.setting.tokenizer.eos_token_id:
            return Tally()
        lengths = np.diff(self.starts)
        row = np.repeat(np.arange(len(lengths)), lengths)[self.ids == unknown]
        row = row[self.encoding.kept[row]]
        return Tally(len(row), self._tally(np.unique(row)).rows)

    def _frequent(self) -> dict[str, tuple[tuple[str, int], ...]]:
        labels, names = self._label_cells(), self.setting.targets.names
        if labels is None:
            return {"": self._top(self.kept)}
        counts = self._labels()
        common = sorted(names, key=lambda name: -counts[name])[:LABELS]
        has = {name: (labels == i) if labels.ndim == 1 else labels[:, i] == 1 for i, name in enumerate(names)}
        return {name: self._top(self.kept[has[name]]) for name in names if name in common and counts[name]}

    def _top(self, rows: Array) -> tuple[tuple[str, int], ...]:
        """The most frequent tokens of some rows."""
        if not len(rows):
            return ()
        lengths = np.diff(self.starts)[rows]
        # The positions of all tokens of the rows: each row's own start, counted up.
        offsets = np.repeat(self.starts[:-1][rows] - np.concatenate([[0], np.cumsum(lengths)[:-1]]), lengths)
        counts = np.bincount(self.ids[offsets + np.arange(len(offsets))])
        tokenizer = self.setting.tokenizer
        special = [index for index in tokenizer.all_special_ids if index < len(counts)]
        special += [i for i, token in tokenizer.added_tokens_decoder.items() if token.special and i < len(counts)]
        counts[special] = 0
        top = np.argsort(-counts, kind="stable")[:FREQUENT]
        return tuple((str(tokenizer.decode([int(index)])), int(counts[index])) for index in top if counts[index])


def _flat(rows: Any, name: str) -> tuple[Array, Array]:
    """All values of a column of lists, and where each row starts in them, with the end; (N,), (rows + 1,)."""
    chunks = rows.data[name].chunks
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
