"""The laboratory: the fork server, a tiny model, a small data set."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import WORDS
from forked import Server

from faults.lab import Lab, rows


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """101 rows to train on, 24 to validate."""
    folder = tmp_path_factory.mktemp("sentences")
    plain = [word for word in WORDS if word.isalpha()]
    (folder / "train.csv").write_text(rows(101, 1, plain))
    (folder / "validation.csv").write_text(rows(24, 2, plain))
    return folder


@pytest.fixture(scope="session")
def lab(server: Server, tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, data_folder: Path) -> Lab:
    """Makes runs."""
    folder = tmp_path_factory.mktemp("lab")
    files = {name: str(data_folder / f"{name}.csv") for name in ("train", "validation")}
    return Lab(server, folder, {"model": tiny_bert, "cache": str(folder / "cache"), **files})
