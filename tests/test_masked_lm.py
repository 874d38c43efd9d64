"""`masked_lm`: which tokens are masked, by what, and that nothing but seed, pass and text decides it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WORDS

from hf_finetune import train
from hf_finetune.config.blocks import Model
from hf_finetune.data.batches import Division, GlobalBatches, Rows, train_loader
from hf_finetune.errors import ModelError, Stopped
from hf_finetune.models.pretrained import load_processor
from hf_finetune.pipeline.init import columns_of, recognise
from hf_finetune.tasks.base import State
from hf_finetune.tasks.masked_lm import MaskedLM
from hf_finetune.training.trainer import FinetuneTrainer

TASK = MaskedLM(text="text")


def long_text(start: int, words: int = 55) -> str:
    return " ".join(WORDS[(start + at * 7) % 60] for at in range(words))


def recipe(model: str, folder: Path, name: str, **training: Any) -> dict[str, Any]:
    """Two steps a pass."""
    for split, count in (("train", 16), ("validation", 4)):
        lines = [json.dumps({"text": long_text(at + 100 * (split == "train"), 9 + at)}) for at in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return {
        "task": {"kind": "masked_lm", "text": "text"},
        "model": {"name": model},
        "data": {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")} | {"max_length": 48},
        "adapter": "full",
        "training": {
            "steps": 6,
            "batch_size": 8,
            "learning_rate": 1e-2,
            "precision": "fp32",
            "log_every": 1,
            **training,
        },
        "tracking": {"images": False, "report": False},
        "output": str(folder / name),
    }


def test_words_are_masked_as_a_whole_and_in_the_shares_of_bert(tiny_masked: str) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Every letter is a token.
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[MASK]", *letters, *(f"##{letter}" for letter in letters)]
    core = Tokenizer(models.WordPiece({piece: at for at, piece in enumerate(pieces)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    make: Any = PreTrainedTokenizerFast
    tokenizer = make(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", mask_token="[MASK]")
    texts = ["".join(filter(lambda c: c.isalpha() or c == " ", long_text(at))) for at in range(60)]
    rows = TASK.features({"text": texts}, tokenizer, State(), 512)
    told = whole = 0
    for row in rows:
        labels, words = np.array(row["labels"]), np.array(row["words"])
        for word in np.unique(words[words >= 0]):
            assert len(set((labels[words == word] >= 0).tolist())) == 1, "a word is masked as a whole"
        told, whole = told + row["weight"], whole + len(words)
    assert told / whole == pytest.approx(0.15, abs=0.02)
    batch = TASK.collate(rows, tokenizer, State())
    before = torch.tensor([row["input_ids"] + [0] * (batch["labels"].shape[1] - row["size"]) for row in rows])
    chosen = batch["labels"] >= 0
    assert torch.equal(batch["input_ids"][~chosen], before[~chosen])
    now, true = batch["input_ids"][chosen], batch["labels"][chosen]
    assert float((now == tokenizer.mask_token_id).float().mean()) == pytest.approx(0.8, abs=0.04)
    assert float((now == true).float().mean()) == pytest.approx(0.1, abs=0.04)
    loose = TASK.model_copy(update={"whole_words": False}).features({"text": texts}, tokenizer, State(), 512)
    assert [row["words"] for row in loose] != [row["words"] for row in rows]


def test_masks_follow_from_seed_pass_and_text_alone(tiny_masked: str) -> None:
    tokenizer = load_processor(Model(name=tiny_masked), TASK)
    import datasets

    found = TASK.features({"text": [long_text(at, 9 + at) for at in range(12)]}, tokenizer, State(), 64)
    encoded = datasets.Dataset.from_list(found)

    def masks(micro_batch: int, seed: int, epoch: int) -> list[tuple[Any, ...]]:
        batches = GlobalBatches([row["size"] for row in found], Division(6, micro_batch), seed)
        batches.set_epoch(epoch)
        rows = Rows(encoded, TASK)
        collate: Any = lambda some: {"all": some}  # noqa: E731
        loader = train_loader(rows, batches, collate, pin=False)
        return sorted((*row["input_ids"], -1, *row["labels"]) for batch in loader for row in batch["all"])

    assert masks(6, 1, 0) == masks(2, 1, 0)
    assert masks(6, 1, 0) != masks(6, 1, 1)
    assert masks(6, 1, 0) != masks(6, 2, 0)
    held_out = Rows(encoded, TASK)
    assert [row["labels"] for row in held_out.__getitems__([0, 5])] == [found[0]["labels"], found[5]["labels"]]
    (filler,) = Rows(encoded, TASK, GlobalBatches([1] * 12, Division(6, 6), 1)).__getitems__([~0])
    assert set(filler["labels"]) == {-100}, "a row that only fills a rank has nothing to tell"


def test_a_run_that_is_stopped_in_its_second_pass_goes_on_with_the_same_masks(
    tiny_masked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses(name: str) -> list[float]:
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["phase"] in ("train", "eval")]

    train(recipe(tiny_masked, tmp_path, "whole"))
    step = FinetuneTrainer.training_step

    def stopping(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.state.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, *arguments, **options)

    made = recipe(tiny_masked, tmp_path, "parts")
    with monkeypatch.context() as patched:
        patched.setattr(FinetuneTrainer, "training_step", stopping)
        with pytest.raises(Stopped):
            train(made)
    train(made)
    assert losses("parts") == losses("whole")


def test_evaluated_rows_are_masked_alike_in_every_run(tiny_masked: str, tmp_path: Path) -> None:
    first = [
        train(recipe(tiny_masked, tmp_path, f"run{seed}", seed=seed, learning_rate=1e-12, steps=1)).metrics[
            "validation"
        ]
        for seed in (1, 2)
    ]
    assert first[0]["loss"] == pytest.approx(first[1]["loss"], rel=1e-6)
    assert first[0]["perplexity"] == pytest.approx(np.exp(first[0]["loss"]))


def test_the_loss_is_that_of_transformers(tiny_masked: str) -> None:
    from transformers import AutoModelForMaskedLM

    auto: Any = AutoModelForMaskedLM
    model, tokenizer = auto.from_pretrained(tiny_masked).eval(), load_processor(Model(name=tiny_masked), TASK)
    rows = TASK.features({"text": [long_text(at, 9 + at) for at in range(6)]}, tokenizer, State(), 64)
    batch = TASK.collate(rows, tokenizer, State())
    with torch.no_grad():
        ours = TASK.loss(model, batch, State()).sum / TASK.count(batch, State())
        assert float(ours) == pytest.approx(float(model(**batch).loss), rel=1e-5)


def test_a_model_without_a_mask_token_is_refused(tiny_llama: str) -> None:
    with pytest.raises(ModelError, match=r"model\.name: the tokenizer has no mask token; masked_lm needs one"):
        load_processor(Model(name=tiny_llama), TASK)


def test_init_takes_the_task_that_the_model_was_pretrained_for() -> None:
    columns, _ = columns_of(lambda: ({"text": long_text(at)} for at in range(5)))
    for architecture, kind in [
        ("BertForMaskedLM", "masked_lm"),
        ("LlamaForCausalLM", "causal_lm"),
        (None, "causal_lm"),
    ]:
        assert recognise(columns, None, architecture)[0] == kind
