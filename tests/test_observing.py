"""Each kind of record against what is found out without it, on runs of the real Trainer."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from sklearn import metrics as sk

from hf_finetune.tracking.records import Record, stored

Start = Callable[..., Path]
ROOT = Path(__file__).parent.parent

CLASSIFIER = {"kind": "text_classification", "text": "text", "label": "label"}
LORA = {"kind": "lora", "r": 4, "alpha": 8, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, tiny_llama: str) -> Start:
    """Trains a few steps and returns the run folder: `start({"task": ...}, "training.steps=4")`."""

    def go(blocks: dict[str, Any], *overrides: str) -> Path:
        from hf_finetune.pipeline.train import train
        from hf_finetune.recipe import Recipe

        folder = tmp_path_factory.mktemp("observing")
        is_lm = blocks["task"]["kind"] == "causal_lm"
        tree = {
            "model": {"name": tiny_llama if is_lm else tiny_bert},
            "adapter": LORA,
            "training": {"steps": 6, "batch_size": 8, "learning_rate": 1e-2, "precision": "fp32", "log_every": 2}
            | {"eval_every": 3},
            "tracking": {"tensorboard": False},
            "output": str(folder / "run"),
        }
        file = folder / "recipe.yaml"
        file.write_text(json.dumps({**tree, **blocks}))
        train(Recipe.load(str(file), overrides))
        return folder / "run"

    return go


def rows_file(folder: Path, rows: list[dict[str, Any]], name: str) -> str:
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def said(index: int) -> str:
    nouns, words = ("film", "plot", "cast", "scene"), ("good", "bad", "fine", "poor", "so")
    return f"the {nouns[index % 4]} is" + " very" * (index % 7) + f" {words[index % 5]}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Train, validation and test; the 1st and 4th validation rows are dropped, as they are too long."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"text": said(i), "label": ("no", "so", "yes")[i * 7 // 4 % 3]} for i in range(80)]
    held = rows[48:64]
    for index in (0, 3):
        held[index] = {"text": "the film" + " very" * 40, "label": "no"}
    return {
        "train": rows_file(folder, rows[:48], "train.jsonl"),
        "validation": rows_file(folder, held, "validation.jsonl"),
        "test": rows_file(folder, rows[64:], "test.jsonl"),
        "max_length": 24,
        "overlong": "drop",
        "checks": {"leakage": "off", "duplicates": "off"},
    }


@pytest.fixture(scope="module")
def classified(start: Start, data: dict[str, Any]) -> Path:
    return start({"task": CLASSIFIER, "data": data}, "training.best_metric=loss", "tracking.embedding_rows=9")


def lines(run: Path, phase: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["phase"] == phase]


def records(run: Path, kind: str) -> dict[tuple[str, int], Record]:
    return {(record.phase, record.step): record for record in stored(run / "observations", kind)}


def raw(data: dict[str, Any], split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(data[split]).read_text().splitlines()]


# Predictions ---------------------------------------------------------------------------------------------------------


def test_predictions_give_the_logged_metrics_at_every_evaluation(classified: Path) -> None:
    found = records(classified, "predictions")
    assert set(found) == {("eval", 3), ("eval", 6), ("final", 6), ("test", 6)} or min(found)[1] < 6
    for (phase, step), record in found.items():
        logits, truth = record.arrays["rows"][:, :3], record.arrays["rows"][:, 3].astype(int)
        line = next(line for line in lines(classified, phase) if line["step"] == step)
        assert line["accuracy"] == sk.accuracy_score(truth, logits.argmax(1))
        assert line["f1.yes"] == pytest.approx(sk.f1_score(truth == 2, logits.argmax(1) == 2))
        assert line["loss"] == pytest.approx(sk.log_loss(truth, torch.tensor(logits).double().softmax(1)), rel=1e-6)
        assert record.facts["names"] == ["no", "so", "yes"]
        assert record.facts["split"] == ("test" if phase == "test" else "validation")
        assert record.arrays["ids"].tolist() == list(range(len(truth)))


def test_the_calibration_error_is_that_of_the_predictions(classified: Path) -> None:
    rows = records(classified, "predictions")["eval", 3].arrays["rows"].astype(float)
    probabilities = torch.tensor(rows[:, :3]).softmax(1).numpy()
    sure, right = probabilities.max(1), probabilities.argmax(1) == rows[:, 3]
    bins = np.ceil(sure * 15).astype(int)
    gaps = [abs(right[bins == b].mean() - sure[bins == b].mean()) * (bins == b).mean() for b in set(bins.tolist())]
    assert lines(classified, "eval")[0]["ece"] == pytest.approx(sum(gaps))


def test_examples_are_the_most_confidently_wrong_rows_by_their_number_in_the_file(
    classified: Path, data: dict[str, Any]
) -> None:
    kept = [number for number in range(1, 17) if number not in (1, 4)]
    rows = records(classified, "predictions")["eval", 3].arrays["rows"]
    probabilities = torch.tensor(rows[:, :3]).softmax(1).numpy()
    wrong = [(-p.max(), kept[i]) for i, p in enumerate(probabilities) if p.argmax() != rows[i, 3]]
    shown = records(classified, "examples")["eval", 3].facts["rows"]
    assert [row["row"] for row in shown] == [number for _, number in sorted(wrong)][:8] != []
    assert [-row["confidence"] for row in shown] == pytest.approx([p for p, _ in sorted(wrong)][:8])
    for row in shown:
        source = raw(data, "validation")[row["row"] - 1]
        assert (row["text"], row["label"]) == (source["text"], source["label"] if row["label"] else None)
        assert row["predicted"] != row["label"]


def test_a_wrong_number_and_wrong_cells_are_told_apart() -> None:
    from hf_finetune.tasks.base import State
    from hf_finetune.tasks.text_classification import TextClassification

    numbers = TextClassification(kind="text_classification", text="t", label="l", problem="regression")
    found = {"logits": np.array([[1.0], [2], [3]], "f4"), "labels": np.array([1.5, -2, math.nan], "f4")}
    judged = numbers.judge(found, State(("l",)))
    assert (judged.wrong.tolist(), judged.predicted, judged.truth) == ([True, True], ["1", "2"], ["1.5", "-2"])
    assert judged.confidence.tolist() == [0.5, 4.0]
    cells = TextClassification(kind="text_classification", text="t", label=["a", "b"], problem="multi_label")
    logits = np.array([[2.0, -1, 1, 1], [3, 3, 0, 0], [-4, 4, 0, 1]], "f4")
    judged = cells.judge({"logits": logits[:, :2], "labels": logits[:, 2:]}, State(("a", "b")))
    assert judged.wrong.tolist() == [True, True, False]
    assert (judged.predicted, judged.truth) == (["a", "a, b", "b"], ["a, b", "", "b"])
    assert judged.confidence[:2] == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-3))])


# Embeddings ----------------------------------------------------------------------------------------------------------


def test_the_head_makes_the_predicted_logits_of_the_embeddings(classified: Path, data: dict[str, Any]) -> None:
    found = records(classified, "embeddings")
    assert set(found) == {
        ("final", lines(classified, "final")[0]["step"]),
        ("test", lines(classified, "test")[0]["step"]),
    }
    (at,) = [at for at in found if at[0] == "final"]
    record, predicted = found[at], records(classified, "predictions")[at].arrays["rows"]
    head = {
        name: t
        for name, t in load_file(classified / "adapter" / "adapter_model.safetensors").items()
        if "class" in name
    }
    weight, bias = (next(t for name, t in head.items() if name.endswith(end)) for end in ("weight", "bias"))
    logits = torch.tensor(record.arrays["vectors"].astype("f4")) @ weight.T + bias
    assert logits.numpy() == pytest.approx(predicted[record.arrays["ids"], :3], abs=2e-2)
    assert len(record.arrays["ids"]) == 9
    kept = [row for index, row in enumerate(raw(data, "validation")) if index not in (0, 3)]
    assert record.facts["texts"] == [kept[index]["text"] for index in record.arrays["ids"]]
    assert record.facts["labels"] == [kept[index]["label"] for index in record.arrays["ids"]]


def test_a_decoder_is_pooled_as_its_head_sees_it(tiny_llama: str) -> None:
    from transformers import AutoModelForSequenceClassification

    from hf_finetune.tracking.probes import HeadInputs, find_head

    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=3)
    head = find_head(model, 3)
    assert head is model.score
    ids = torch.tensor([[8, 9, 10, 0, 0], [11, 12, 13, 14, 15], [9, 0, 0, 0, 0]])
    inputs = HeadInputs(head, [0, 2], model.config.pad_token_id)
    with inputs.listening(), torch.no_grad():
        inputs.announce(torch.tensor([2, -1, 0]), ids)
        logits = model(input_ids=ids, attention_mask=(ids != 0).long()).logits
    numbers, vectors = inputs.gather()
    assert numbers.tolist() == [0, 2]
    again = torch.tensor(vectors.astype("f4")) @ head.weight.T
    assert torch.allclose(again, logits[[2, 0]], atol=2e-2)
    assert not head._forward_pre_hooks


# Language models -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spoken(start: Start, data: dict[str, Any]) -> Path:
    task = {"kind": "causal_lm", "prompt": "label", "completion": "text", "sample_prompts": 0}
    return start({"task": task, "data": data | {"overlong": "truncate"}}, "tracking.example_rows=3")


def saved(run: Path) -> tuple[Any, Any]:
    """The saved model and tokenizer, through PEFT alone."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    return AutoPeftModelForCausalLM.from_pretrained(run / "adapter").eval(), AutoTokenizer.from_pretrained(
        run / "adapter"
    )


def test_losses_and_entropies_of_tokens_are_those_of_a_plain_forward_pass(spoken: Path) -> None:
    model, tokenizer = saved(spoken)
    found = records(spoken, "tokens")
    assert set(found) == {("eval", 3), ("eval", 6), ("test", 6)}
    assert len(found["eval", 6].facts["rows"]) == 3
    entropies = []
    for row in found["eval", 6].facts["rows"]:
        ids = torch.tensor([tokenizer.encode(text)[0] for text in row["tokens"]])
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1].double()
        plain = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        assert row["losses"][1:] == pytest.approx(plain.tolist(), rel=1e-3, abs=1e-5)
        entropy = torch.special.entr(logits.softmax(-1)).sum(-1)
        assert row["entropies"][1:] == pytest.approx(entropy.tolist(), rel=1e-3, abs=1e-5)
        entropies += [e for e, counts in zip(row["entropies"], row["trained"], strict=True) if counts]
        assert row["trained"][0] is False
        assert 0 < sum(row["trained"]) < len(ids)
    assert lines(spoken, "eval")[-1]["example_entropy"] == pytest.approx(np.mean(entropies))


def test_losses_by_position_add_up_to_the_loss_and_to_those_of_the_rows(spoken: Path) -> None:
    record, line = records(spoken, "positions")["eval", 6], lines(spoken, "eval")[-1]
    loss, tokens, edges = (record.arrays[name] for name in ("loss", "tokens", "edges"))
    rows = records(spoken, "predictions")["eval", 6].arrays["rows"]
    assert tokens.sum() == rows[:, 1].sum()
    assert np.nansum(loss * tokens) / tokens.sum() == pytest.approx(line["loss"], rel=1e-6)
    assert (len(edges), edges[0], edges[-1]) == (len(tokens) + 1, 0, 24)
    assert tokens[0] == 0


def test_positions_are_binned_by_width() -> None:
    from hf_finetune.tracking.probes import positions

    sums = np.stack([np.arange(130.0), np.r_[0, np.ones(129)]])
    found = positions(sums)
    assert found["edges"].tolist() == [*range(0, 130, 3), 130]
    assert found["loss"][1] == pytest.approx((3 + 4 + 5) / 3)
    assert found["tokens"][[0, 1, -1]].tolist() == [2, 3, 1]


def test_a_position_counts_where_its_token_stands() -> None:
    from hf_finetune.tasks import _losses as losses

    logits, labels = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0)), torch.full((2, 4), -100)
    labels[0, 2], labels[1, 2], labels[1, 3] = 5, 6, 1
    found = losses.each(*losses._kept(logits, labels))
    totals: dict[str, torch.Tensor] = {}
    losses.add_positions(totals, found, labels)
    sums = totals["positions"]
    assert sums[1].tolist() == [0, 0, 2, 1]
    assert sums[0, 3] == pytest.approx(torch.nn.functional.cross_entropy(logits[1, 2], labels[1, 3]).item())


# Weights -------------------------------------------------------------------------------------------------------------


def test_norms_of_b_are_those_of_the_saved_adapter(spoken: Path) -> None:
    scalars = records(spoken, "weights")["eval", 6].facts["scalars"]
    norms = {name.removeprefix("norm_b/"): value for name, value in scalars.items() if name.startswith("norm_b/")}
    state = load_file(spoken / "adapter" / "adapter_model.safetensors")
    plain = {
        name.removeprefix("base_model.model.").removesuffix(".lora_B.weight"): float(tensor.norm())
        for name, tensor in state.items()
        if name.endswith(".lora_B.weight")
    }
    assert norms == pytest.approx(plain)
    assert len(norms) == 14


def test_histograms_of_weights_are_those_of_the_saved_adapter(spoken: Path) -> None:
    record = records(spoken, "weights")["eval", 6]
    state = load_file(spoken / "adapter" / "adapter_model.safetensors")
    tag = "model.layers.1.mlp.up_proj.lora_A"
    place = record.facts["tags"].index(f"weights/{tag}")
    counts, edges = np.histogram(state[f"base_model.model.{tag}.weight"].numpy(), 64)
    assert np.abs(record.arrays["counts"][place] - counts).sum() <= 4  # on the edges
    assert record.arrays["edges"][place] == pytest.approx(edges, abs=1e-6)
    assert len(set(record.facts["tags"])) == len(record.facts["tags"]) == 2 * 28
    assert len(record.facts["tags"]) == len(record.arrays["counts"]) == len(record.arrays["edges"])


def test_updates_and_gradients_are_those_of_the_step_before_the_evaluation() -> None:
    from hf_finetune.tracking import probes

    layer = torch.nn.Linear(300, 500, bias=False)
    held = probes.modules(torch.nn.ModuleDict({"head": layer}))
    assert list(held) == ["head"]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(torch.ones(3, 300)).square().sum().backward()
    old, grad = layer.weight.detach().clone(), layer.weight.grad.clone()  # type: ignore[union-attr]
    update = probes.Update(held)
    optimizer.step()
    update.made(held)
    scalars = probes.record("eval", 1, held, update).facts["scalars"]
    assert scalars["gradient_norm/head"] == pytest.approx(float(grad.norm()), rel=1e-5)
    exact = float((0.5 * grad).norm() / old.norm())
    assert scalars["update_to_weight/head"] == pytest.approx(exact, rel=0.05)  # of a sample


def test_what_can_not_be_divided_or_counted_is_left_out() -> None:
    from hf_finetune.tracking import probes

    held = {
        "zero.lora_B": [torch.nn.Parameter(torch.zeros(4))],
        "nan": [torch.nn.Parameter(torch.full((2,), math.nan))],
    }
    update = probes.Update(held)
    update.made(held)
    record = probes.record("eval", 1, held, update)
    assert record.facts["scalars"] == {"norm_b/zero": 0.0}
    assert record.facts["tags"] == ["weights/zero.lora_B"]
    assert record.arrays["counts"].sum() == 4
    assert record.arrays["edges"][0, [0, -1]].tolist() == [-0.5, 0.5]


def test_names_are_short_and_tell_modules_apart() -> None:
    from hf_finetune.tracking.probes import short

    assert short("base_model.model.bert.layer.0.query.lora_A.default.weight") == "bert.layer.0.query.lora_A"
    assert short("base_model.model.classifier.modules_to_save.default.bias") == "classifier"
    assert short("bert.pooler.dense.weight") == "bert.pooler.dense"


# The data ------------------------------------------------------------------------------------------------------------


def test_the_data_are_recorded_once_with_lengths_and_labels(classified: Path, data: dict[str, Any]) -> None:
    ((at, record),) = records(classified, "data").items()
    assert at == ("train", 0)
    assert record.arrays["lengths.train"].sum() == 48
    assert record.arrays["lengths.validation"].sum() == record.facts["kept"]["validation"] == 14
    assert record.facts["dropped"] == {"train": 0, "validation": 2, "test": 0}
    labels = [row["label"] for row in raw(data, "train")]
    assert record.facts["labels"]["train"] == {name: labels.count(name) for name in ("no", "so", "yes")}
    lengths = [len(row["text"].split()) + 2 for row in raw(data, "test")]
    assert record.arrays["lengths.test"].tolist() == np.histogram(lengths, record.arrays["edges"])[0].tolist()


# When ----------------------------------------------------------------------------------------------------------------


def fingerprint(run: Path) -> tuple[str, list[Any]]:
    weights = next((run / "adapter").glob("*.safetensors")).read_bytes()
    keys = ("step", "loss", "grad_norm", "learning_rate", "token_accuracy")
    told = [[line.get(key) for key in keys] for phase in ("train", "eval", "test") for line in lines(run, phase)]
    return hashlib.sha256(weights).hexdigest(), told


OFF = ("histograms", "images", "examples", "embeddings")


@pytest.mark.parametrize("task", ["causal_lm", pytest.param("text_classification", marks=pytest.mark.slow)])
def test_observing_changes_no_bit_of_the_run(start: Start, data: dict[str, Any], task: str) -> None:
    blocks = {
        "task": {"kind": "causal_lm", "text": "text", "sample_prompts": 0} if task == "causal_lm" else CLASSIFIER,
        "data": data,
    }
    settings = ("model.dropout=0.2", "training.micro_batch=4", "training.eval_at_start=true")
    watched = start(blocks, *settings, "tracking.embeddings=1", "tracking.tensorboard=true")
    alone = start(blocks, *settings, *(f"tracking.{name}=false" for name in OFF))
    assert fingerprint(watched) == fingerprint(alone)
    ends = {"environment", "report"}
    assert {record.kind for record in stored(alone / "observations")} - ends == {"data", "predictions"}
    expected = {"tokens", "positions"} if task == "causal_lm" else {"examples", "embeddings"}
    found = {record.kind for record in stored(watched / "observations")} - ends
    assert found == {"data", "predictions", "weights"} | expected
    assert set(records(watched, "weights")) == {("eval", 0), ("eval", 3), ("eval", 6)}


def test_rarer_records_come_at_every_nth_evaluation_and_at_the_end(start: Start, data: dict[str, Any]) -> None:
    every = ("tracking.histograms=3", "tracking.images=final", "tracking.examples=final", "training.eval_every=1")
    run = start({"task": CLASSIFIER, "data": data}, *every, "training.steps=5")
    assert [step for _, step in records(run, "weights")] == [3, 5]
    assert set(records(run, "examples")) == {("eval", 5), ("test", 5)}
    assert set(records(run, "predictions")) == {("eval", 3), ("eval", 5), ("test", 5)}


def test_a_stopped_run_has_the_records_of_one_that_was_not(
    start: Start, data: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_finetune.errors import Stopped
    from hf_finetune.training.loop import ResumableTrainer

    blocks: dict[str, Any] = {"task": CLASSIFIER, "data": data}
    every = ("tracking.images=2", "tracking.histograms=2", "training.eval_every=2", "training.steps=8")
    whole = contents(start(blocks, *every))
    blocks["output"] = str(tmp_path / "run")
    with monkeypatch.context() as patch:
        # In the step after which the second evaluation is due: that is made up for by the run that goes on.
        patch.setattr(ResumableTrainer, "agrees_to_stop", stop_at(4))
        with pytest.raises(Stopped):
            start(blocks, *every)
    assert ("weights", "eval", 4) in contents(tmp_path / "run")
    start(blocks, *every)
    assert contents(tmp_path / "run") == whole


def stop_at(step: int) -> Callable[..., bool]:
    def agrees(trainer: Any, *, due: bool = False) -> bool:
        if trainer.state.global_step == step and not trainer.stopped:
            trainer.stopped, trainer.args.load_best_model_at_end = 15, False
        return bool(trainer.stopped)

    return agrees


def contents(run: Path) -> dict[tuple[str, str, int], Any]:
    return {
        at: (json.dumps(record.facts), {name: array.tobytes() for name, array in record.arrays.items()})
        for at, record in by_place(run).items()
    }


def by_place(run: Path) -> dict[tuple[str, str, int], Record]:
    found = {(record.kind, record.phase, record.step): record for record in stored(run / "observations")}
    return {at: record for at, record in found.items() if at[0] not in ("environment", "report")}


@pytest.mark.slow
def test_two_processes_make_the_records_of_one(data: dict[str, Any], start: Start, tmp_path: Path) -> None:
    tasks = {
        "classifier": {"task": CLASSIFIER, "data": data},
        "lm": {"task": {"kind": "causal_lm", "text": "text", "sample_prompts": 0}, "data": data},
    }
    settings = ("model.dropout=0", "tracking.embeddings=1", "training.steps=2", "training.eval_every=1")
    jobs = {}
    for name, blocks in tasks.items():
        one = start(blocks, *settings)
        tree = yaml.safe_load((one / "recipe.yaml").read_text())
        jobs[name] = (one, tree | {"output": str(tmp_path / name)})
    (tmp_path / "jobs.json").write_text(json.dumps({name: tree for name, (_, tree) in jobs.items()}))
    launch = ["accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / "cpu_2_processes.yaml")]
    steps = [str(ROOT / "tests" / "first_steps.py"), str(tmp_path / "jobs.json"), str(tmp_path / "result.json")]
    command = [sys.executable, "-m", *launch, "--main_process_port", "0", *steps]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (one, _) in jobs.items():
        left, right = by_place(one), by_place(tmp_path / name)
        assert left.keys() == right.keys()
        for at, record in left.items():
            for array, values in record.arrays.items() if at[0] != "weights" else ():
                assert right[at].arrays[array] == pytest.approx(values, rel=1e-3, abs=1e-2, nan_ok=True)
            keys = record.facts.keys() & {"names", "labels", "texts", "tags", "split", "kept"}
            assert {key: right[at].facts[key] for key in keys} == {key: record.facts[key] for key in keys}
