from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import RECIPE, finished

from hf_finetune.errors import CheckpointError, RecipeError
from hf_finetune.inference import merge
from hf_finetune.inference.load import Finished, open_run
from hf_finetune.run import folder as run_folder
from hf_finetune.run import lock
from hf_finetune.run.lock import Input
from hf_finetune.tasks.base import State
from hf_finetune.tracking.records import Record, stored


def last_predictions(run: Path) -> Record:
    """What training's last evaluation saw of the validation split."""
    return [record for record in stored(run / "observations", "predictions") if record.phase in ("eval", "final")][-1]


def evaluated(run: Finished, network: Any) -> np.ndarray[Any, Any]:
    """The rows of the validation split, evaluated as the training does it."""
    from hf_finetune.data import prepare

    prepared = prepare.prepare(run.recipe, run.tokenizer, run.machine)
    encoded: Any = prepared.validation
    served = run.serve(network)
    found = run.predictions(encoded, served.predict, all_logits=served.paths.makes_all_logits)
    plot = run.recipe.task.plots(found, run.targets)
    assert plot is not None
    return plot.rows


@pytest.mark.parametrize("kind", ["classifier", "chatter"])
def test_a_run_that_is_opened_says_what_it_said_in_training(kind: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(kind)
    run = open_run(str(folder))
    record = last_predictions(folder)
    np.testing.assert_array_equal(evaluated(run, run.model())[record.arrays["ids"]], record.arrays["rows"])


@pytest.mark.parametrize(
    "changes",
    [
        ["adapter={kind: full}", "training.learning_rate=1e-3"],
        ["training.precision=bf16", "adapter={kind: lora, r: 4, modules_to_save: [bert.pooler]}"],
    ],
    ids=["full", "bf16-pooler"],
)
def test_also_in_half_precision_and_with_other_adapters(changes: list[str], run: Callable[..., Any]) -> None:
    made = run(*changes)
    opened = open_run(str(made.folder))
    record = last_predictions(made.folder)
    found = evaluated(opened, opened.model())[record.arrays["ids"]]
    np.testing.assert_allclose(found, record.arrays["rows"], atol=1e-5)


@pytest.mark.parametrize(
    "adapter",
    [
        "{kind: lora, r: 4, dora: true}",
        pytest.param("{kind: lora, r: 4, init: pissa}", marks=pytest.mark.slow),
        "{kind: adalora, init_r: 6, target_r: 3, interval: 1}",
        pytest.param("{kind: full}", marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_says_what_the_run_said_at_its_step(adapter: str, run: Callable[..., Any]) -> None:
    made = run(f"adapter={adapter}", "checkpoints={every: 5, keep: 9}", "training.eval_every=5")
    told = {record.step: record for record in stored(made.folder / "observations", "predictions")}
    for step in (5, 10):
        opened = open_run(f"{made.folder}/checkpoints/checkpoint-{step}")
        record = told[step]  # of the last step, after the run has ended what it saves
        found = evaluated(opened, opened.model())[record.arrays["ids"]]
        np.testing.assert_allclose(found, record.arrays["rows"], atol=1e-5)
    assert np.abs(told[5].arrays["rows"] - told[10].arrays["rows"]).max() > 1e-3
    with pytest.raises(CheckpointError, match=r"not kept this checkpoint.*it has checkpoint-10, checkpoint-5"):
        open_run(f"{made.folder}/checkpoints/checkpoint-7")
    weights = made.folder / "checkpoints/checkpoint-5/trained.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(CheckpointError, match=r"trained\.safetensors: is damaged"):
        open_run(str(weights.parent)).model()
    with pytest.raises(RecipeError, match="a checkpoint can't be merged"):
        merge.Options(to=str(made.folder / "merged")).check(str(weights.parent))


def test_the_base_of_a_classifier_has_the_trained_head_and_nothing_else(classifier: Path) -> None:
    run = open_run(str(classifier))
    base, adapted = run.base(), run.model()
    weights = dict(base.named_parameters())
    head: Any = adapted.get_submodule("base_model.model.classifier.modules_to_save.default")
    assert torch.equal(weights["classifier.weight"], head.weight)
    assert not any("lora" in name for name in weights)
    assert not base.training
    assert not any(weight.requires_grad for weight in weights.values())
    record = last_predictions(classifier)
    assert np.abs(evaluated(run, base)[record.arrays["ids"]] - record.arrays["rows"]).max() > 1e-3


def test_the_base_of_a_language_model_is_the_pretrained_one(chatter: Path, tiny_llama: str) -> None:
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_llama).state_dict()
    base = open_run(str(chatter)).base().state_dict()
    assert all(torch.equal(plain[name], base[name]) for name in plain)


def test_labels_come_back_with_every_spelling_they_have_in_the_data(tmp_path: Path) -> None:
    targets = State(("no", "yes"), (3, 4), (1.0, 0.5), {"no": 0, "yes": 1, "0": 0, "1": 1})
    run_folder.write_targets(tmp_path / "targets.json", targets)
    kept = run_folder.read_targets(tmp_path / "targets.json")
    assert kept == (targets, Path.cwd())
    assert [file.name for file in tmp_path.iterdir()] == ["targets.json"]


def test_a_folder_without_a_run_is_a_mistake_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"holds no run.*`output` of the recipe"):
        open_run(str(tmp_path))
    with pytest.raises(RecipeError, match="does not exist"):
        open_run(str(tmp_path / "none"))


@pytest.fixture
def copied(classifier: Path, tmp_path: Path) -> Path:
    """A run that may be damaged."""
    return Path(shutil.copytree(classifier, tmp_path / "run"))


def test_a_run_that_is_not_finished_says_how_to_go_on(copied: Path) -> None:
    status = {"state": "preempted", "reason": "stopped by SIGTERM"}
    (copied / "status.json").write_text(json.dumps(status))
    with pytest.raises(
        CheckpointError, match=r"not finished \(preempted: stopped by SIGTERM\).*run the training command again"
    ):
        open_run(str(copied))
    beating = {"state": "running", "heartbeat": datetime.now(UTC).isoformat()}
    (copied / "status.json").write_text(json.dumps(beating))
    with pytest.raises(CheckpointError, match=r"not finished \(lost: it was killed"):  # nobody holds its lock
        open_run(str(copied))
    (copied / ".lock").write_text("4711 another-host")
    with pytest.raises(CheckpointError, match="wait for it"):
        open_run(str(copied))


def test_a_missing_adapter_and_missing_or_damaged_labels_are_named(copied: Path) -> None:
    (copied / "targets.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"targets\.json: is damaged"):
        open_run(str(copied))
    (copied / "targets.json").unlink()
    with pytest.raises(CheckpointError, match="an earlier version made this run"):
        open_run(str(copied))
    shutil.rmtree(copied / "adapter")
    with pytest.raises(CheckpointError, match="the adapter is missing"):
        open_run(str(copied))


def test_what_the_model_is_made_of_can_not_be_overridden(classifier: Path) -> None:
    for word in ("adapter.r=8", "task.labels=[a, b]", "training.epochs=9", "output=x", "nonsense"):
        with pytest.raises(RecipeError):
            open_run(str(classifier), [word])
    assert open_run(str(classifier), ["data.max_length=16"]).recipe.data.max_length == 16


def test_relative_paths_lead_from_where_the_run_was_started(
    tmp_path: Path, tiny_bert: str, reviews: Callable[[int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = tmp_path / "work [1]"
    work.mkdir()
    shutil.copytree(tiny_bert, work / "base")
    shutil.copy(reviews(32), work / "train.csv")
    monkeypatch.chdir(work)
    text = RECIPE.format(model="./base", data="train.csv", output="run").replace("epochs: 2", "steps: 1")
    finished(work, text + "tracking: {images: false, report: false}\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    run = open_run(str(work / "run"))
    assert run.recipe.model.name == str(work / "base")
    assert Path(str(run.recipe.data.train)) == work / "train.csv"
    run.model()
    work.rename(tmp_path / "moved")
    with pytest.raises(Exception, match=r"there is no folder '\./base'"):
        open_run(str(tmp_path / "moved" / "run"))
    assert open_run(str(tmp_path / "moved" / "run"), [f"model.name={tiny_bert}"]).recipe.model.name == tiny_bert


def test_a_base_that_is_another_one_is_refused(
    classifier: Path, copied: Path, tiny_bert: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = Path(shutil.copytree(tiny_bert, tmp_path / "moved"))
    open_run(str(classifier), [f"model.name={moved}"])
    with (moved / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x01")
    with pytest.raises(CheckpointError, match=r"model\.name: .*model\.safetensors changed .*; put it back, or give"):
        open_run(str(classifier), [f"model.name={moved}"])
    (copied / "run.lock.json").write_text("{")
    capsys.readouterr()
    open_run(str(copied), [f"model.name={moved}"])
    assert "could not be compared with that of the training" in capsys.readouterr().err


def test_a_base_of_the_hub_is_compared_by_name_and_commit() -> None:
    cases: list[tuple[dict[str, Any], str | None]] = [
        ({"source": "a/b", "commit": "1" * 40}, None),
        ({"source": "a/c", "commit": "1" * 40}, "source was a/b, is a/c"),
        ({"source": "a/b", "commit": "2" * 40}, "commit was 1111"),
    ]
    for now, says in cases:
        found = list(lock.changed_input(Input(source="a/b", commit="1" * 40), Input(**now)))
        assert found == [] if says is None else says in found[0]


def test_a_run_is_used_by_one_process(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RecipeError, match="accelerate launch"):
        open_run(str(classifier))
