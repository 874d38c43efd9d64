"""The laboratory of tests/faults, for runs that a scheduler or several hosts start."""

from __future__ import annotations

from faults.conftest import data_folder, lab

__all__ = ["data_folder", "lab"]
