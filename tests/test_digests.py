"""A large file is read once, by whichever process; one that changed is read again, whatever its dates say."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hf_finetune.run import files

CONTENT = b"weights " * 300_000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file of 2.4 MB that last changed some time ago."""
    made = tmp_path / "model.safetensors"
    made.write_bytes(CONTENT)
    time.sleep(files.SETTLED_NS / 1e9 + 0.1)  # nobody can set back `st_ctime`
    return made


def true(file: Path) -> bytes:
    return hashlib.sha256(file.read_bytes()).digest()


def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Files that are read from now on."""
    seen: list[str] = []
    read = files._read

    def noted(file: str | Path) -> bytes:
        seen.append(str(file))
        return read(file)

    monkeypatch.setattr(files, "_read", noted)
    return seen


def test_a_file_is_read_once_and_again_when_it_changed(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = reads(monkeypatch)
    assert [files.sha256(file, tmp_path / "cache") for _ in range(3)] == [true(file)] * 3
    assert len(seen) == 1
    dates = file.stat()
    with file.open("r+b") as stream:  # the same size, inode and dates, as a hostile or a lazy copy would leave them
        stream.write(b"W")
    os.utime(file, ns=(dates.st_atime_ns, dates.st_mtime_ns))
    assert files.sha256(file, tmp_path / "cache") == true(file)
    other = tmp_path / "other"
    shutil.copy2(file, other)
    other.replace(file)
    assert files.sha256(file, tmp_path / "cache") == true(file)
    assert len(seen) == 3


def test_a_file_that_has_just_changed_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = tmp_path / "fresh.csv"
    fresh.write_bytes(CONTENT)
    seen = reads(monkeypatch)
    assert [files.sha256(fresh, tmp_path / "cache") for _ in range(2)] == [true(fresh)] * 2
    assert len(seen) == 2


def test_a_damaged_note_is_none(file: Path, tmp_path: Path) -> None:
    for text in ["", "{}", '{"sha256": "00"', "[1]", '{"sha256": 7}']:
        files.sha256(file, tmp_path / "cache")
        (note,) = (tmp_path / "cache" / "digests").iterdir()
        assert true(file).hex() in note.read_text()
        note.write_text(text)
        assert files.sha256(file, tmp_path / "cache") == true(file)
        assert true(file).hex() in note.read_text()


def test_where_nothing_can_be_noted_the_file_is_read(file: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    assert files.sha256(file, tmp_path / "cache") == true(file)


def test_of_the_ranks_of_a_node_one_reads(file: Path, tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from hf_finetune.run import files as digests
read = digests._read
def slow(file):
    print("read", flush=True)
    time.sleep(0.5)
    return read(file)
digests._read = slow
assert digests.sha256(sys.argv[1], Path(sys.argv[2])).hex() == sys.argv[3]
"""
    command = [sys.executable, "-c", code, str(file), str(tmp_path / "cache"), true(file).hex()]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [rank.communicate(timeout=60)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    assert "".join(said) == "read\n"
