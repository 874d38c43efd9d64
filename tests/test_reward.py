"""Rewards: the loss beside TRL's on the same batch, and what a run learns from pairs and from numbers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_finetune import check, load_run, train
from hf_finetune.tasks._chat import Renderer
from hf_finetune.tasks._messages import Chat
from hf_finetune.tasks.base import State
from hf_finetune.tasks.reward import Reward

PAIR = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
FILMS = ("film", "movie", "story", "plot", "acting", "cast", "scene", "music")
ROWS = [
    {
        "prompt": f"how is the {film} ?{' so' * n}",
        "chosen": "good and warm .",
        "rejected": "bad , very dull .",
        "far": 0.5,
    }
    for film in FILMS
    for n in range(8)
]


@pytest.mark.parametrize("more", [{}, {"margin": "far", "center": 0.1}], ids=["plain", "margin and centre"])
def test_the_loss_of_pairs_is_that_of_trl(more: dict[str, Any], tiny_llama: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

    trl: Any = pytest.importorskip("trl")
    set_seed(0)
    own = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    center = more.get("center")
    options = trl.RewardConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, center_rewards_coefficient=center
    )
    plain = [{name: row[name] for name in PAIR} for row in ROWS[:2]]
    trainer = trl.RewardTrainer(
        copy.deepcopy(own), args=options, train_dataset=Dataset.from_list(plain), processing_class=tokenizer
    )
    task = Reward.model_validate({**PAIR, **more})
    rows = [ROWS[0], {**ROWS[9], "chosen": "yes", "far": 0.25}, ROWS[18]]
    columns = {name: [row[name] for row in rows] for name in task.columns()}
    batch = task.collate(task.features(columns, tokenizer, State(), 64), tokenizer, State())
    flat = {name: batch[name].transpose(0, 1).flatten(0, 1) for name in ("input_ids", "attention_mask")}
    margins = {"margin": batch["labels"][:, 0]} if "margin" in more else {}
    expected = trainer.compute_loss(trainer.model.eval(), {**flat, **margins})
    found = task.loss(own.eval(), batch, State())
    count = task.count(batch, State())
    assert float(found.sum / count) == pytest.approx(float(expected), rel=1e-5)
    assert found.logs is not None
    assert float(found.logs["margin"] / count) == pytest.approx(trainer._metrics["eval"]["margin"][0], abs=1e-5)
    gradients = []
    for model, loss in ((own, found.sum / count), (trainer.model, expected)):
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-6)


DATED = "{% for m in messages %}{{ strftime_now('%d %b %Y') ~ tone ~ ': ' ~ m['content'] ~ '<|im_end|>' }}{% endfor %}"


def test_the_day_and_variables_of_the_template_are_those_of_the_run(tiny_llama: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    plain = Reward.model_validate(PAIR)
    assert plain.on("2026-11-30", tokenizer).day is None, "its template prints no date"
    tokenizer.chat_template = DATED
    rows = {name: [ROWS[0][name]] for name in PAIR}
    dated = Reward.model_validate({**PAIR, "template_options": {"tone": "dull"}}).on("2026-11-30", tokenizer)
    ids = dated.features(rows, tokenizer, State(), 64)[0]["input_ids"]
    expected = Renderer(tokenizer, "2026-11-30", options={"tone": "dull"}).text(
        Chat([{"role": "user", "content": ROWS[0]["prompt"]}, {"role": "assistant", "content": ROWS[0]["chosen"]}])
    )
    found = tokenizer.encode(expected, add_special_tokens=False)
    assert ids[: len(found)] == found
    assert dated.on("2027-01-01", tokenizer).day == "2026-11-30", "a run keeps its day"


def recipe(folder: Path, model: str, rows: list[dict[str, Any]], task: dict[str, Any]) -> dict[str, Any]:
    """A small run on rows; the last quarter validates."""
    folder.mkdir(exist_ok=True)
    for name, some in (("train", rows[: 3 * len(rows) // 4]), ("validation", rows[3 * len(rows) // 4 :])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return {
        "task": {"kind": "reward", **task},
        "model": {"name": model},
        "data": {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "max_length": 64,
        },
        "adapter": {"kind": "lora", "r": 4},
        "training": {"epochs": 8, "batch_size": 8, "learning_rate": 1e-2, "precision": "fp32", "log_every": 1},
        "tracking": {"images": False, "report": False},
        "output": str(folder / "run"),
    }


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_pairs_teach_which_answer_is_better(kind: str, tiny_bert: str, tiny_llama: str, tmp_path: Path) -> None:
    model = tiny_bert if kind == "encoder" else tiny_llama
    run = train(recipe(tmp_path, model, ROWS, {**PAIR, "margin": "far"}))
    found = run.metrics["validation"]
    assert found["accuracy"] == 1.0
    assert found["margin"] > 0.5
    assert found["length_correlation"] < 0, "here the worse answers are the longer ones"
    assert found["ece"] < 0.5
    good, bad = load_run(run.folder).predict(
        [
            {"prompt": "how is the film ?", "chosen": "good and warm ."},
            {"prompt": "how is it ?", "chosen": "bad , dull ."},
        ]
    )
    assert good["reward"] > bad["reward"]


def test_numbers_teach_a_score(tiny_llama: str, tmp_path: Path) -> None:
    rows = [
        {"text": f"the {film} is {'very ' * n}{word} .", "stars": score}
        for film in FILMS
        for n in range(4)
        for word, score in (("good", 1.0), ("bad", -1.0))
    ]
    run = train(recipe(tmp_path, tiny_llama, rows, {"completion": "text", "score": "stars"}))
    assert run.metrics["validation"]["pearson"] > 0.6
    assert -1 <= run.metrics["validation"]["length_correlation"] <= 1


def test_dialogues_and_chats_are_read_as_they_are(tiny_llama: str, tiny_bert: str) -> None:
    from transformers import AutoTokenizer

    turns = [{"role": "user", "content": "how is it ?"}, {"role": "assistant", "content": "good ."}]
    other = [turns[0], {"role": "assistant", "content": "bad ."}]
    texts = [f"\n\nHuman: how is it ?\n\nAssistant: {word} ." for word in ("good", "bad")]
    task = Reward.model_validate({"chosen": "chosen", "rejected": "rejected"})
    decoder, encoder = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_llama, tiny_bert))
    found = [
        task.features({"chosen": [pair[0]], "rejected": [pair[1]]}, decoder, State(), 64)[0]
        for pair in ((turns, other), texts)
    ]
    assert found[0] == found[1], "the same dialogue, whichever way it is written"
    (row,) = task.features({"chosen": [texts[0]], "rejected": [texts[1]]}, encoder, State(), 64)
    assert str(encoder.decode(row["input_ids"][: row["ends"][0]])).startswith("[CLS]")
    assert row["weight"] == 1


def test_settings_that_contradict_each_other_are_refused(tiny_bert: str, tmp_path: Path) -> None:
    for task, says in (
        ({"chosen": "chosen"}, "chosen and rejected belong together"),
        ({"completion": "chosen", "score": "far", "center": 0.1}, "center is for pairs"),
        ({**PAIR, "completion": "chosen", "score": "far"}, "give chosen and rejected, or completion and score"),
    ):
        assert says in str(check(recipe(tmp_path, tiny_bert, ROWS, task))), task
