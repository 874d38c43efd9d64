"""Every fault of the list is tried here, or docs/reliability.md says why not; what it says of tests is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from faults.lab import ROOT

FAULTS = [*(f"F{number}" for number in range(1, 42)), *(f"K{number}" for number in range(1, 16))]
HERE = Path(__file__).parent
FILES = [*HERE.glob("test_*.py"), *HERE.parent.glob("test_push*.py")]
"""Faults of the Hub are tried where the Hub for tests is."""
DOCUMENT = (ROOT / "docs" / "reliability.md").read_text()


def covered() -> set[str]:
    """Ids that names of tests carry: `test_f25_f26_...`, `test_f1_to_f9_...`."""
    found = set()
    for file in FILES:
        for name in re.findall(r"^def test_(\w+)", file.read_text(), re.MULTILINE):
            for letter, first, last in re.findall(r"(?:^|_)([fk])(\d+)(?:_to_[fk](\d+))?(?=_)", name):
                found |= {f"{letter.upper()}{number}" for number in range(int(first), int(last or first) + 1)}
    return found


def rows(title: str) -> dict[str, str]:
    """Id -> row, of the table under a heading; `F1-F9` and `F32, F33` stand for several."""
    section = DOCUMENT.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    found: dict[str, str] = {}
    for line in section.splitlines():
        first = line.split("|")[1].strip() if line.startswith("| ") else ""
        for letter, low, high in re.findall(r"\b([FK])(\d+)(?:-[FK](\d+))?", first):
            found |= {f"{letter}{number}": line for number in range(int(low), int(high or low) + 1)}
    return found


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_tried_or_has_a_reason(fault: str) -> None:
    told, untried = rows("Faults"), rows("Not tried here")
    assert (fault in told) != (fault in untried), "it belongs into one of the two tables"
    assert (fault in told) == (fault in covered())


def test_the_document_names_tests_that_there_are() -> None:
    named = set(re.findall(r"`(test_\w+\.py)`", DOCUMENT))
    assert named == {file.name for file in HERE.glob("test_*.py")} - {"test_matrix.py"}
