"""`data.overlong: split`: nothing of a long text is lost, and the counts say what became of it."""

from __future__ import annotations

import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import WORDS

from hf_finetune import check, load_run, train
from hf_finetune.config.blocks import Model
from hf_finetune.errors import RecipeError
from hf_finetune.models.pretrained import load_processor
from hf_finetune.tasks.base import State
from hf_finetune.tasks.causal_lm import CausalLM
from hf_finetune.tasks.masked_lm import MaskedLM

UNCUT = 1 << 30


def text(start: int, words: int) -> str:
    return " ".join(random.Random(start).choices(WORDS[:60], k=words))


def recipe(kind: str, model: str, folder: Path, **data: Any) -> dict[str, Any]:
    """Documents of 5, 45 and 90 words, three times each."""
    for split, start in (("train", 0), ("validation", 30)):
        lines = [json.dumps({"text": text(start + at, (5, 45, 90)[at % 3])}) for at in range(9)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    files = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}
    return {
        "task": {"kind": kind, "text": "text"},
        "model": {"name": model},
        "data": {
            **files,
            "max_length": 24,
            "overlong": "split",
            "checks": {"untrained_end": "off", "leakage": "off"},
            **data,
        },
        "adapter": "full",
        "training": {"steps": 2, "batch_size": 4, "precision": "fp32"},
        "tracking": {"images": False, "report": False},
        "output": str(folder / "run"),
    }


def test_the_parts_of_a_text_are_the_text(tiny_llama: str) -> None:
    task = CausalLM(text="text")
    tokenizer = load_processor(Model(name=tiny_llama), task)
    (whole,) = task.features({"text": [text(0, 90)]}, tokenizer, State(), UNCUT)
    parts = task.split(whole, tokenizer, 24)
    assert [token for part in parts for token in part["input_ids"]] == whole["input_ids"]
    assert [part["size"] for part in parts] == [24, 24, 24, len(whole["input_ids"]) - 72]
    assert sum(part["weight"] for part in parts) == whole["weight"] - 3, "nothing predicts the first token of a part"


def test_the_parts_of_a_masked_text_have_its_special_tokens_and_whole_words(tiny_masked: str) -> None:
    task = MaskedLM(text="text")
    tokenizer = load_processor(Model(name=tiny_masked), task)
    (whole,) = task.features({"text": [text(0, 90)]}, tokenizer, State(), UNCUT)
    # As if every third word had two tokens more.
    words = [word - word % 3 if word >= 0 else word for word in whole["words"]]
    parts = task.split({**whole, "words": words}, tokenizer, 24)
    first, last = whole["input_ids"][0], whole["input_ids"][-1]
    assert all((part["input_ids"][0], part["input_ids"][-1]) == (first, last) for part in parts)
    assert [token for part in parts for token in part["input_ids"][1:-1]] == whole["input_ids"][1:-1]
    for before, after in itertools.pairwise(parts):
        assert before["words"][-2] != after["words"][1], "no word is torn"
    assert all(part["weight"] > 0 and part["size"] <= 24 for part in parts)


@pytest.mark.parametrize(("kind", "packing"), [("causal_lm", False), ("causal_lm", True), ("masked_lm", False)])
def test_long_documents_are_trained_to_their_ends(
    kind: str, packing: bool, tmp_path: Path, tiny_llama: str, tiny_masked: str
) -> None:
    model = tiny_masked if kind == "masked_lm" else tiny_llama
    made = recipe(kind, model, tmp_path, packing=packing)
    whole = check({**made, "data": {**made["data"], "max_length": 60, "overlong": "truncate"}})
    assert whole.ok, str(whole)
    run = train(made)
    report = (tmp_path / "run" / "report.md").read_text()
    assert "6 over-long and split" in report
    assert "cut to max" not in report
    document = load_run(run.folder).evaluate(split="validation")
    assert document["metrics"]["loss"]["value"] == pytest.approx(run.metrics["validation"]["loss"], rel=1e-5)
    assert document["data"]["evaluated"] > document["data"]["rows"] == 9


def test_the_length_of_a_run_is_told_in_tokens(tmp_path: Path, tiny_llama: str, server: Any) -> None:
    made = recipe("causal_lm", tiny_llama, tmp_path, packing=True)
    (tmp_path / "recipe.yaml").write_text(json.dumps(made))
    said = server.run("check", str(tmp_path / "recipe.yaml")).stdout
    trained = int(re.search(r"train +\d+ rows, (\d+) tokens", said)[1])  # type: ignore[index]
    passes, tokens = re.search(r"2 steps of 4 rows \(([\d.]+) passes, about (\d+) tokens\)", said).groups()  # type: ignore[union-attr]
    assert int(tokens) == pytest.approx(float(passes) * trained, abs=2)


def test_rows_that_are_no_running_text_are_not_split(tmp_path: Path, tiny_llama: str) -> None:
    made = recipe("causal_lm", tiny_llama, tmp_path)
    chat = {**made, "task": {"kind": "causal_lm", "messages": "text"}}
    with pytest.raises(RecipeError, match=r"overlong: causal_lm rows can't be split"):
        train(chat)
    streamed = {**made, "data": {**made["data"], "streaming": True}}
    with pytest.raises(RecipeError, match="a stream counts rows as they are written"):
        train(streamed)
