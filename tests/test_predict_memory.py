from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import predict_memory


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(classifier: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    predict_memory.write(source, 60_000, None, "text")
    found = predict_memory.measure(str(classifier), source, target)
    assert found["written"] == 60_000
    # 54,000 rows of some 200 bytes are 11 MB of text, and many times that as Python objects
    assert found["peak_bytes"] - found["peak_bytes_after_a_tenth"] < 40e6
    assert found["peak_bytes"] < 1.5e9
