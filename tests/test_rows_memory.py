"""Three times the rows may not need three times the memory: what grows with them is counted in bytes a row."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import rows

MOST = 300
"""Bytes a row, lasting and passing ones: a hash, a label, a few numbers, and their sorted copies. The tokens of a row
of this test alone are 400 as the file holds them, and 3,000 as Python objects."""


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "packing"), [("csv", False), ("pairs", True)])
def test_memory_hardly_grows_with_the_rows(tmp_path: Path, kind: str, *, packing: bool) -> None:
    used = {}
    for count in (100_000, 300_000):
        case = rows.Case(count, kind, words=50 if packing else 20, packing=packing)
        recipe = rows.lay_out(tmp_path / str(count), case)
        commands = rows.commands(recipe, case)
        used[count] = max(rows.watched(commands[name]).memory for name in ("check", "train"))
    assert (used[300_000] - used[100_000]) / 200_000 < MOST
    assert used[300_000] < 1.5e9
