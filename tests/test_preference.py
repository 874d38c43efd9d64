"""Preferences: losses beside TRL's on the same batch, rows as people write them, and what a run reports."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_finetune import check, load_run, train
from hf_finetune.recipe import Recipe
from hf_finetune.tasks import _preferences as preferences
from hf_finetune.tasks.base import State
from hf_finetune.tasks.preference import Preference

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
BLOCK = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
FILMS = ("film", "movie", "story", "plot", "acting", "cast", "scene", "music")
PAIRS = [
    {"prompt": f"how is the {film} ?{' so' * times}", "chosen": "good and warm .", "rejected": "bad , very dull ."}
    for film in FILMS
    for times in range(8)
]


@pytest.fixture(scope="module")
def models(tiny_llama: str) -> tuple[Any, Any, Any]:
    """A language model with a LoRA that changes it, the same model anew, and the tokenizer."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model: Any = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.config.use_cache = False
    return model, copy.deepcopy(model), AutoTokenizer.from_pretrained(tiny_llama)


def batch_of(task: Preference, tokenizer: Any, rows: list[dict[str, Any]], model: Any) -> dict[str, torch.Tensor]:
    """Rows as a batch that knows the start, with partners where the task has them."""
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    features = task.features(columns, tokenizer, State(), 64)
    shift = task.partner(len(rows))
    if shift:
        features = [{**row, "partner": features[(n + shift) % len(rows)]} for n, row in enumerate(features)]
    batch = task.collate(features, tokenizer, State())
    if not task.needs_start:
        return batch
    with model.disable_adapter():
        return {**batch, **task.start(model, batch, State())}


def gradient(model: Any, loss: torch.Tensor) -> torch.Tensor:
    """The gradient of a loss at all weights that are trained."""
    model.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def trl_batch(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same rows as TRL has them: all chosen answers, then all rejected ones."""

    def flat(name: str) -> torch.Tensor:
        return batch[name].transpose(0, 1).flatten(0, 1)

    found = {"input_ids": flat("input_ids"), "attention_mask": flat("attention_mask")}
    return found | {"completion_mask": (flat("labels") != -100).long()}


@pytest.mark.parametrize(
    ("settings", "theirs"),
    [
        ({"method": "dpo", "beta": 0.3}, {"loss_type": "sigmoid"}),
        ({"method": "ipo", "beta": 0.3}, {"loss_type": "ipo"}),
        ({"method": "apo", "beta": 0.3}, {"loss_type": "apo_zero"}),
        ({"method": "apo", "beta": 0.3, "apo": "down"}, {"loss_type": "apo_down"}),
    ],
)
def test_losses_with_a_reference_are_those_of_trl(
    settings: dict[str, Any], theirs: dict[str, Any], models: tuple[Any, Any, Any], tmp_path: Path
) -> None:
    from datasets import Dataset

    trl: Any = pytest.importorskip("trl")
    own, other, tokenizer = models[0], copy.deepcopy(models[1]), models[2]
    task = Preference.model_validate({**BLOCK, **settings})
    batch = batch_of(task, tokenizer, [PAIRS[0], {**PAIRS[9], "chosen": "yes"}, PAIRS[18]], own)
    options = trl.DPOConfig(output_dir=str(tmp_path), beta=0.3, report_to="none", use_cpu=True, bf16=False, **theirs)
    trainer = trl.DPOTrainer(
        other, args=options, train_dataset=Dataset.from_list(PAIRS[:2]), processing_class=tokenizer
    )
    trainer.precompute_ref_logps = True
    starts = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), batch["start"].unbind(1), strict=True))
    expected = trainer._compute_loss(trainer.model.eval(), {**trl_batch(batch), **starts}, False)
    found = task.loss(own.eval(), batch, State())
    count = task.count(batch, State())
    assert float(found.sum / count) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(gradient(own, found.sum / count), gradient(trainer.model, expected), atol=1e-6)
    seen = trainer._metrics["eval"]
    assert found.logs is not None
    assert float(found.logs["margin"] / count) == pytest.approx(seen["rewards/margins"][0], rel=1e-4)
    assert float(found.logs["accuracy"] / count) == pytest.approx(seen["rewards/accuracies"][0])
    assert float(found.logs["chosen_logp"] / count) == pytest.approx(seen["logps/chosen"][0], rel=1e-5)


def test_losses_without_a_reference_are_those_of_trl(models: tuple[Any, Any, Any]) -> None:
    orpo: Any = pytest.importorskip("trl.experimental.orpo").ORPOTrainer
    cpo: Any = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    own, other, tokenizer = models
    settings = SimpleNamespace(
        **{"beta": 0.4, "simpo_gamma": 0.5, "alpha": 0.0, "loss_type": "simpo", "label_smoothing": 0.0},
        accelerator=SimpleNamespace(device="cpu"),
    )
    for method, more in (("orpo", {}), ("simpo", {"gamma": 0.5})):
        task = Preference.model_validate({**BLOCK, "method": method, "beta": 0.4, **more})
        batch = batch_of(task, tokenizer, [PAIRS[0], {**PAIRS[9], "chosen": "yes"}], own)
        plain = trl_batch(batch)
        labels = plain["input_ids"].masked_fill(plain["completion_mask"] == 0, -100)
        logits = other.eval()(input_ids=plain["input_ids"], attention_mask=plain["attention_mask"]).logits
        means = orpo.get_batch_logps(logits, labels, average_log_prob=True).chunk(2)
        if method == "orpo":
            # TRL takes the prompt into the loss of the chosen answer, and the mean over all tokens of a micro-batch.
            expected = (-means[0] - orpo.odds_ratio_loss(settings, *means)[0]).mean()
        else:
            expected = cpo.cpo_loss(settings, *means)[0].mean()
        found = task.loss(own.eval(), batch, State()).sum / 2
        assert float(found) == pytest.approx(float(expected), rel=1e-5), method
        assert torch.allclose(gradient(own, found), gradient(other, expected), atol=1e-6), method


def test_the_loss_of_single_answers_is_that_of_trl(models: tuple[Any, Any, Any], tmp_path: Path) -> None:
    from datasets import Dataset

    trl: Any = pytest.importorskip("trl")
    own, other, tokenizer = models[0], copy.deepcopy(models[1]), models[2]
    rows = [
        {"prompt": pair["prompt"], "completion": pair["chosen" if good else "rejected"], "label": good}
        for pair, good in zip(PAIRS[::9], (True, False, False, True), strict=False)
    ]
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5}
    block = {"prompt": "prompt", "completion": "completion", "label": "label", "method": "kto", "beta": 0.3}
    task = Preference.model_validate({**block, **weights})
    batch = batch_of(task, tokenizer, rows, own)
    options = trl.KTOConfig(output_dir=str(tmp_path), beta=0.3, report_to="none", use_cpu=True, bf16=False, **weights)
    trainer = trl.KTOTrainer(other, args=options, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    trainer.precompute_ref_logps = True
    batch["partner_start"] = batch["partner_start"] - 2  # so that the reference point is not 0
    partner = {
        "KL_input_ids": batch["partner_input_ids"][:, 0],
        "KL_attention_mask": batch["partner_attention_mask"][:, 0],
        "KL_completion_mask": (batch["partner_labels"][:, 0] != -100).long(),
        "ref_logps": batch["start"][:, 0],
        "ref_KL_logps": batch["partner_start"][:, 0],
        "label": batch["desired"][:, 0].bool(),
    }
    expected = trainer._compute_loss(trainer.model.eval(), {**trl_batch(batch), **partner}, False)
    found = task.loss(own.eval(), batch, State()).sum / task.count(batch, State())
    point = float(task.embed(own, batch, State())["ratio"].mean())
    assert point == pytest.approx(trainer._metrics["eval"]["kl"][0], rel=1e-4)
    assert point > 0
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(gradient(own, found), gradient(trainer.model, expected), atol=1e-6)


CHAT = [{"role": "user", "content": "how is it ?"}]
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("good .", "bad ."))
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "texts": (BLOCK, {"prompt": "how is it ?", "chosen": "good .", "rejected": "bad ."}),
    "chats": (BLOCK, {"prompt": CHAT, "chosen": [GOOD], "rejected": [BAD]}),
    "chats as JSON": (BLOCK, {"prompt": json.dumps(CHAT), "chosen": json.dumps([GOOD]), "rejected": json.dumps([BAD])}),
    "the prompt once more": (BLOCK, {"prompt": "how is it ?", "chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]}),
    "no column of prompts": ({}, {"chosen": [*CHAT, GOOD], "rejected": [*CHAT, BAD]}),
    "dialogues as one text": (
        {},
        {
            "chosen": "\n\nHuman: how is it ?\n\nAssistant: good .",
            "rejected": "\n\nHuman: how is it ?\n\nAssistant: bad .",
        },
    ),
    "OpenAI's": (
        {"prompt": "input", "chosen": "preferred_output", "rejected": "non_preferred_output"},
        {"input": {"messages": CHAT, "tools": None}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_are_read_as_people_write_them(form: str, models: tuple[Any, Any, Any]) -> None:
    block, row = FORMS[form]
    task = Preference.model_validate({"chosen": "chosen", "rejected": "rejected", **block})
    tokenizer = models[2]
    (found,) = task.features({name: [cell] for name, cell in row.items()}, tokenizer, State(), 64)
    batch = task.collate([found], tokenizer, State())
    texts = [tokenizer.decode([i for i in ids if i]) for ids in batch["input_ids"][0].tolist()]
    trained = [tokenizer.decode([i for i in ids if i != -100]) for ids in batch["labels"][0].tolist()]
    assert [text.replace(" ", "") for text in trained] == ["good.<|im_end|>", "bad.<|im_end|>"]
    assert all("how is it ?" in text for text in texts), texts
    (asked,) = task.ask({name: [cell] for name, cell in row.items()}, tokenizer)
    assert batch["input_ids"][0, 0, : len(asked)].tolist() == asked, "a model is asked as it was trained"


def test_an_answer_that_is_json_or_a_number_is_text() -> None:
    reader = preferences.Reader("prompt", ("chosen", "rejected"), None)
    for chosen, rejected in (('["a", "b"]', "[]"), ('[{"name": "a"}]', "[1, 2]"), (4, 5.5)):
        asked, chats = reader.chats({"prompt": "[2, 2] added?", "chosen": chosen, "rejected": rejected})
        assert [turn["content"] for turn in asked.messages] == ["[2, 2] added?"]
        assert [chat.messages[-1]["content"] for chat in chats] == [str(chosen), str(rejected)]


def test_without_a_chat_template_the_prompt_is_the_begin_that_both_answers_share() -> None:
    reader = preferences.Reader(None, ("chosen", "rejected"), None)
    assert reader.texts({"chosen": "two plus two is four", "rejected": "two plus two is five"}) == (
        "two plus two is",
        [" four", " five"],
    )
    dialogue = "\n\nHuman: hi\n\nAssistant:"
    row = {"chosen": f"{dialogue} the one", "rejected": f"{dialogue} the other"}
    assert reader.texts(row) == (dialogue + " ", ["the one", "the other"])


def recipe(folder: Path, model: str, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A small run on rows; the last quarter validates."""
    folder.mkdir(exist_ok=True)
    for name, some in (("train", rows[: 3 * len(rows) // 4]), ("validation", rows[3 * len(rows) // 4 :])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    made: dict[str, Any] = {
        "task": {"kind": "preference", **BLOCK, "sample_prompts": 0},
        "model": {"name": model},
        "data": {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl")}
        | {"max_length": 64, "checks": {"longer_chosen": "off"}},
        "adapter": {"kind": "lora", "r": 4},
        "training": {"epochs": 2, "batch_size": 8, "learning_rate": 3e-3, "precision": "fp32", "log_every": 1}
        | {"eval_at_start": True},
        "tracking": {"images": False, "report": False},
        "output": str(folder / "run"),
    }
    for key, value in changes.items():
        made[key] = {**made[key], **value} if isinstance(value, dict) else value
    return made


def lines(folder: Path, phase: str) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl of one phase."""
    found = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["phase"] == phase]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    """Folder of a run by DPO."""
    folder = tmp_path_factory.mktemp("dpo")
    train(recipe(folder, tiny_llama, PAIRS))
    return folder


def test_dpo_learns_which_answer_is_preferred_and_says_how_far_the_model_went(trained: Path) -> None:
    first, *_, last = lines(trained, "eval")
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    assert first["kl"] == pytest.approx(0, abs=1e-5), "training begins with the base"
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert last["accuracy"] == 1.0
    assert last["margin"] > 0.5
    assert 0 < last["kl"] < 5
    assert last["chosen_logp"] - last["rejected_logp"] > first["chosen_logp"] - first["rejected_logp"]
    assert last["chosen_tokens"] == 5, "and the token that ends the turn"
    assert {"margin", "accuracy", "chosen_logp", "rejected_logp"} <= lines(trained, "train")[0].keys()


def test_the_start_is_found_again_without_the_cache(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_FINETUNE_CACHE", str(tmp_path))
    found = load_run(trained / "run").evaluate(split="validation")["metrics"]
    kept = lines(trained, "final")[-1] if lines(trained, "final") else lines(trained, "eval")[-1]
    assert {name: found[name]["value"] for name in ("loss", "margin", "kl")} == pytest.approx(
        {name: kept[name] for name in ("loss", "margin", "kl")}, rel=1e-4
    )
    base = load_run(trained / "run").evaluate(split="validation", against=["base"])["against"][0]
    assert base["metrics"]["margin"] == pytest.approx(0, abs=1e-4), "the base is its own reference"


def test_an_adapter_that_goes_on_is_its_own_reference(trained: Path, tmp_path: Path, tiny_llama: str) -> None:
    made = recipe(tmp_path, tiny_llama, PAIRS, adapter={"r": None, "from": str(trained / "run")})
    made["training"] |= {"epochs": None, "steps": 4}
    train(made)
    first, *_, last = lines(tmp_path, "eval")
    assert first["margin"] == pytest.approx(0, abs=1e-4), "not that of the base, which is worse by far"
    assert first["chosen_logp"] == pytest.approx(lines(trained, "eval")[-1]["chosen_logp"], rel=1e-3)
    assert "kl" not in last, "there is no second model to compare with"
    shutil.rmtree(Path(os.environ["HF_FINETUNE_CACHE"]) / "start")
    found = load_run(tmp_path / "run").evaluate(split="validation")["metrics"]
    assert found["margin"]["value"] == pytest.approx(last["margin"], rel=1e-3)


def test_the_memory_of_pairs_without_a_column_of_prompts_is_estimated(tmp_path: Path, tiny_llama: str) -> None:
    rows = [
        {name: f"\n\nHuman: {p['prompt']}\n\nAssistant: {p[name]}" for name in ("chosen", "rejected")} for p in PAIRS
    ]
    found = check(recipe(tmp_path, tiny_llama, rows, task={"prompt": None}))
    assert found.ok, found
    assert found.numbers["memory_bytes"] > 0


def singles() -> list[dict[str, Any]]:
    """The same pairs as answers that are judged one by one, those of a prompt beside each other."""
    return [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for pair in PAIRS[::3]
        for name in ("chosen", "rejected")
    ]


KTO = {"prompt": "prompt", "completion": "completion", "label": "label", "method": "kto", "chosen": None}


def test_kto_takes_the_same_steps_however_the_global_batch_is_cut(tmp_path: Path, tiny_llama: str) -> None:
    found = {}
    for size in (8, 3):
        folder = tmp_path / str(size)
        made = recipe(folder, tiny_llama, singles(), task={**KTO, "rejected": None}, training={"micro_batch": size})
        train(made)
        found[size] = [line[name] for line in lines(folder, "train") for name in ("loss", "grad_norm")]
    assert found[8] == pytest.approx(found[3], rel=1e-4)
    first, *_, last = lines(tmp_path / "3", "eval")
    assert last["roc_auc"] == 1.0
    assert first["loss"] == pytest.approx(0.5, abs=1e-3)
    assert last["loss"] < 0.45


def test_pairs_that_teach_little_are_found(tmp_path: Path, tiny_llama: str) -> None:
    long = {"prompt": "how is it ?", "chosen": "so " * 70 + "good", "rejected": "so " * 70 + "bad"}
    rows = [*PAIRS[:20], {**PAIRS[0], "rejected": PAIRS[0]["chosen"]}, long]
    made = recipe(tmp_path, tiny_llama, [])
    made["data"]["checks"] = {"no_trained_token": "warn"}
    made["data"]["validation"] = str(tmp_path / "validation.jsonl")
    longer = [{**row, "chosen": "it is so very good ."} for row in rows[:-1]]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*longer, rows[-2], long]))
    shared = {**PAIRS[3], "chosen": "so good .", "rejected": "so bad ."}
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*PAIRS[60:], shared]))
    said = "\n".join(str(problem) for problem in check(made).warnings)
    assert "1 of 23 train rows has the same answer as chosen and rejected (row 22)" in said
    assert "answers that differ only in what is cut off (row 23)" in said
    assert "a chosen answer that is longer than the rejected one" in said
    assert "1 of 5 validation rows has the prompt of a training row" in said


def test_settings_of_another_method_are_refused(tiny_llama: str, tmp_path: Path) -> None:
    for more, key in (
        ({"gamma": 0.5}, "gamma is for method simpo"),
        ({"rejected": None}, "chosen and rejected belong together"),
        ({"completion": "completion"}, "give chosen and rejected, or completion and label"),
    ):
        made = recipe(tmp_path, tiny_llama, PAIRS, task=more)
        assert key in str(check(made)), more
    streamed = recipe(tmp_path, tiny_llama, PAIRS, data={"streaming": True})
    streamed["training"] |= {"epochs": None, "steps": 3}
    assert "looks at all rows before training begins" in str(check(streamed))


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one_with_kto(tmp_path: Path, tiny_llama: str) -> None:
    script = str(Path(__file__).with_name("first_steps.py"))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    found = []
    commands = {"one": [sys.executable, script], "two": [*launcher, "--main_process_port", "0", script]}
    for name, command in commands.items():
        made = recipe(tmp_path / name, tiny_llama, singles(), task={**KTO, "rejected": None})
        jobs = {"kto": Recipe.model_validate(made).model_dump(mode="json")}
        (tmp_path / f"{name}.json").write_text(json.dumps(jobs))
        words = [*command, str(tmp_path / f"{name}.json"), str(tmp_path / f"{name} steps.json")]
        environment = os.environ | {"ACCELERATE_USE_CPU": "1"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        found.append(json.loads((tmp_path / f"{name} steps.json").read_text())["kto"])
    one, two = ([value for step in steps for value in step] for steps in found)
    assert two == pytest.approx(one, rel=1e-5)
