"""Generated answers against references."""

from __future__ import annotations

import pytest

from hf_finetune.errors import DataError
from hf_finetune.tasks._generation import Generation, compare, extract

GSM8K = r"#### (-?[\d,]+)"


def test_extract_takes_the_last_match_and_its_group() -> None:
    for pattern, answer in [
        (None, "#### 1 or\n#### 1,200"),
        (GSM8K, "1,200"),
        (r"\d+", "200"),
        (r"(?:x)|(y)|1", ""),
        ("nothing", None),
    ]:
        assert extract("  #### 1 or\n#### 1,200\n", pattern) == answer


def test_compare() -> None:
    texts = [("so #### 5", 4, True), ("#### 6", 8, False), ("5", 3, True)]
    generations = [Generation(text, tokens, ended) for text, tokens, ended in texts]
    found = compare(generations, ["#### 5", "#### 5", "#### 5"], GSM8K)
    assert found == {"exact_match": [1.0, 0.0, 0.0], "ended": [1.0, 0.0, 1.0], "generated_tokens": [4.0, 8.0, 3.0]}


def test_white_space_around_whole_texts_does_not_count() -> None:
    assert compare([Generation(" yes\n", 2, ended=True)], ["yes "], None)["exact_match"] == [1.0]


def test_a_reference_without_answer_is_refused() -> None:
    with pytest.raises(DataError, match=r"finds nothing in reference 1: 'five'"):
        compare([Generation("", 0, ended=False)] * 2, ["#### 5", "five"], GSM8K)
