"""What glibc's `malloc` makes of a sequence of tensors: the holes between them are memory of the process, too.

torch takes its CPU tensors from `posix_memalign`, which asks for the alignment and a chunk header more than the tensor
needs (https://sourceware.org/bugzilla/show_bug.cgi?id=14581): a hole that a tensor leaves is too small for the next one
of the same size. Tensors of `MAPPED` bytes and more are mapped apart and leave no holes.
"""

from __future__ import annotations

import bisect
import ctypes
from collections.abc import Callable
from functools import cache

MAPPED = 32 << 20
"""Where glibc's own threshold settles (`DEFAULT_MMAP_THRESHOLD_MAX`); it rises to the largest tensor freed below."""
MARGIN = 64 + 32
"""Bytes that an aligned request asks for besides: the alignment and the smallest chunk."""
LEAST = 1024
"""Smaller tensors are left out."""


class Heap:
    """Best fit with splitting and merging, as glibc treats large chunks; positions in bytes.

    What the heap once had stays the process's: glibc gives back only what is free at its end, where something small and
    lasting nearly always lies (measured: after training 1.6 GB were resident and 0.2 GB in use).
    """

    def __init__(self) -> None:
        self.highest = 0
        """Most bytes that heap and mappings ever had together."""
        self.held = 0
        """Bytes that the heap has, in use or not."""
        self._top = 0
        self.mapped = 0
        """Bytes of tensors that are mapped apart."""
        self._holes: list[tuple[int, int]] = []  # (size, start), sorted
        self._starts: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._used: dict[int, tuple[int, int]] = {}

    def take(self, key: int, size: int) -> None:
        """Place a tensor."""
        if size < LEAST:
            return
        if size >= MAPPED:
            self.mapped += size
            self._used[key] = (-1, size)
        else:
            self._used[key] = (self._find(size), size)
        self.held = max(self.held, self._top)
        self.highest = max(self.highest, self.held + self.mapped)

    def give(self, key: int) -> None:
        """Free it again."""
        start, size = self._used.pop(key, (0, 0))
        if not size:
            return
        if start < 0:
            self.mapped -= size
            return
        end = start + size
        if end in self._starts:
            end += self._remove(end)
        if start in self._ends:
            before = self._ends[start]
            self._remove(before)
            start = before
        if end == self._top:
            self._top = start
        else:
            self._add(start, end - start)

    def _find(self, size: int) -> int:
        place = bisect.bisect_left(self._holes, (size + MARGIN, -1))
        if place == len(self._holes):
            start = self._top
            self._top += size
            return start
        hole, start = self._holes[place]
        self._remove(start)
        if hole > size:
            self._add(start + size, hole - size)
        return start

    def _add(self, start: int, size: int) -> None:
        bisect.insort(self._holes, (size, start))
        self._starts[start], self._ends[start + size] = size, start

    def _remove(self, start: int) -> int:
        size = self._starts.pop(start)
        del self._ends[start + size]
        self._holes.pop(bisect.bisect_left(self._holes, (size, start)))
        return size


@cache
def _trim() -> Callable[[int], int] | None:
    """`malloc_trim` of glibc (https://man7.org/linux/man-pages/man3/malloc_trim.3.html); others lack it."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def can_give_back() -> bool:
    """Whether `give_back` does anything here."""
    return _trim() is not None


def give_back() -> None:
    """Return to the system what the heap holds and nothing uses, holes between tensors included."""
    if trim := _trim():
        trim(0)
