"""Four times the rows may not need four times the memory: what grows with them is counted in bytes a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import rows

MOST = 400
"""Bytes a row, lasting and passing ones: a hash, a label, a few numbers, and their sorted copies. The tokens of a row
of this test alone were 1,000, when they were counted in memory all at once."""
FEW, MANY = 100_000, 250_000


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "packing", "names"), [("csv", False, ("check",)), ("pairs", True, ("check", "train"))]
)
def test_memory_hardly_grows_with_the_rows(tmp_path: Path, kind: str, names: tuple[str, ...], *, packing: bool) -> None:
    used = {}
    for count in (FEW, MANY):
        case = rows.Case(count, kind, words=30, packing=packing)
        commands = rows.commands(rows.lay_out(tmp_path / str(count), case), case)
        used[count] = max(rows.watched(commands[name]).memory for name in names)
    assert (used[MANY] - used[FEW]) / (MANY - FEW) < MOST
    assert used[MANY] < 1.5e9
