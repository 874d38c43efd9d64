"""`samples.jsonl`: what the model answered to fixed prompts, as a table."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hf_finetune.tracking import journal
from hf_finetune.tracking.board.markdown import table

TAG = "samples"
COLUMNS = ("prompt", "answer", "end")

Line = Mapping[str, Any]
"""step, prompt, answer, ended: one line of samples.jsonl."""


def text(lines: Iterable[Line]) -> str:
    """Prompts and answers of one evaluation."""
    return table(COLUMNS, [(line["prompt"], line["answer"], "ended" if line["ended"] else "cut off") for line in lines])


def stored(file: Path) -> Iterator[tuple[int, list[Line]]]:
    """Step and lines of each evaluation that `samples.jsonl` holds."""
    for step, group in itertools.groupby(journal.read_samples(file), key=lambda line: int(line["step"])):
        yield step, list(group)
