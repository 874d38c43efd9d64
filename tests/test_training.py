"""Whole runs, with the real Trainer on tiny models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from hf_finetune.errors import CheckpointError, DataError, DivergedError, ModelError, RecipeError
from hf_finetune.inference import saving
from hf_finetune.run.journal import MEASURED

if TYPE_CHECKING:
    from conftest import Run

Runner = Callable[..., "Run"]


def test_a_run_leaves_everything_in_its_folder(run: Runner) -> None:
    done = run("training.epochs=3", "checkpoints.every=epoch", "tracking.report=true")
    assert {path.name for path in done.folder.iterdir()} == {
        ".lock", "adapter", "checkpoints", "metrics.jsonl", "observations", "plots", "recipe.yaml", "report.html",
        "report.md", "run.lock.json", "status.json", "targets.json", "tensorboard",
    }  # fmt: skip
    assert done.status["state"] == "done"
    assert done.status["exit_code"] == 0
    assert [line["step"] for line in done.lines("eval")] == [5, 10, 15]
    assert [line["step"] for line in done.lines("train")] == list(range(1, 16))
    assert {path.name for path in (done.folder / "checkpoints").iterdir()} == {"checkpoint-10", "checkpoint-15"}
    modes = {path.stat().st_mode for path in done.folder.rglob("*") if path.is_file()}
    assert modes == {(done.folder / ".lock").stat().st_mode}, "weights too have the permissions of any new file"


def test_training_learns(run: Runner) -> None:
    done = run("training.epochs=16", "model.dropout=0", "adapter.r=8")
    assert done.outcome.scores["validation"]["accuracy"] > 0.9
    assert done.lines("train")[-1]["loss"] < done.lines("train")[0]["loss"] / 2


def test_the_summary_row_closes_the_metrics(run: Runner) -> None:
    done = run()
    summary = json.loads((done.folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert summary["phase"] == "summary"
    assert summary["validation_accuracy"] == done.lines("eval")[-1]["accuracy"]
    assert summary["trained_parameters"] == done.outcome.parameters[0] > 0
    assert summary["tokens_per_second"] > 0


def test_tensorboard_reads_the_same_numbers(run: Runner) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = run()
    events = EventAccumulator(str(done.folder / "tensorboard"))
    events.Reload()
    losses = {event.step: event.value for event in events.Scalars("train/loss")}
    assert losses == pytest.approx({line["step"]: line["loss"] for line in done.lines("train")})
    assert {"train/grad_norm", "train/learning_rate", "zoom_train/tokens_per_second", "eval/accuracy"} <= set(
        events.Tags()["scalars"]
    )


def test_one_seed_makes_two_runs_bit_identical(run: Runner) -> None:
    first = fingerprint(run())
    assert fingerprint(run(restart=True)) == first
    assert fingerprint(run("training.seed=7", restart=True)) != first


def fingerprint(done: Run) -> tuple[str, list[Any]]:
    """Hash of the adapter, and every number that does not depend on the clock."""
    digest = hashlib.sha256((done.folder / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()
    lines = [[line[key] for key in ("step", "loss", "grad_norm", "learning_rate")] for line in done.lines("train")]
    scores = [{k: v for k, v in line.items() if not any(word in k for word in MEASURED)} for line in done.lines("eval")]
    return digest, [lines, scores]


def test_the_same_finished_run_is_not_done_again(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    run()
    assert run().outcome is None
    assert "already holds this run, finished" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match=r"training\.epochs: was 2\.0, is 1\.0 .*--allow-change training\.epochs"):
        run("training.epochs=1")


def test_the_resolved_recipe_loads_back_to_the_same_recipe(run: Runner) -> None:
    from hf_finetune.recipe import Recipe

    done = run("training.learning_rate=3e-3", "model.dropout=0")
    assert Recipe.load(str(done.folder / "recipe.yaml")) == done.outcome.recipe


def test_the_best_model_is_kept_and_early_stopping_stops(run: Runner) -> None:
    done = run(
        "training.epochs=12", "training.best_metric=loss", "training.learning_rate=0.3",
        "training.early_stopping={patience: 2}", "training.max_grad_norm=null",
    )  # fmt: skip
    losses = [line["loss"] for line in done.lines("eval")]
    assert len(losses) < 12
    assert done.outcome.scores["validation"]["loss"] == pytest.approx(min(losses), rel=1e-5)
    assert done.outcome.reload_difference < 1e-4


def test_every_rate_follows_the_schedule(run: Runner) -> None:
    done = run("training.schedule=cosine", "training.warmup_steps=2", "training.learning_rate=1e-2")
    rates = [line["learning_rate"] for line in done.lines("train")]
    assert rates[:3] == pytest.approx([0.0, 5e-3, 1e-2])
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_a_decoder_model_classifies_too(run: Runner, tiny_llama: str) -> None:
    done = run(f"model.name={tiny_llama}", "training.epochs=24", "adapter.r=8")
    assert done.outcome.scores["validation"]["accuracy"] > 0.8
    assert done.outcome.reload_difference < 1e-4


@pytest.mark.parametrize("adapter", ["adalora", "ia3"])
def test_every_adapter_runs_and_reloads(run: Runner, adapter: str) -> None:
    targets = ", target_modules: [query, value], feedforward_modules: [value]" if adapter == "ia3" else ""
    done = run(f"adapter={{kind: {adapter}{targets}}}")
    assert done.outcome.reload_difference < 1e-4


def test_cut_and_dropped_rows_are_reported(run: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    done = run("data.max_length=8", "data.overlong=drop")
    counts = done.outcome.prepared.reports["train"]
    assert counts.dropped > 0
    line = f"{counts.dropped} dropped as over-long"
    assert line in capsys.readouterr().out
    assert line in (done.folder / "report.md").read_text()


CHAT = 'task={kind: causal_lm, prompt: "the {label} film", completion: text, generate_rows: 4, max_new_tokens: 8}'


@pytest.mark.parametrize("packing", [pytest.param("true", marks=pytest.mark.slow), "false"])
def test_a_language_model_learns_to_answer(run: Runner, tiny_llama: str, packing: str) -> None:
    done = run(
        CHAT, f"model.name={tiny_llama}", f"data.packing={packing}", "data.max_length=64",
        "training.epochs=10", "training.batch_size=8", "training.eval_at_start=true", "training.eval_every=45",
    )  # fmt: skip
    first, last = done.lines("eval")[0], done.lines("eval")[-1]
    assert first["step"] == 0
    assert last["loss"] < first["loss"] * 0.7
    assert last["perplexity"] < first["perplexity"]
    assert 0.0 <= last["ended"] <= 1.0
    samples = [json.loads(line) for line in (done.folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 * len(done.lines("eval"))
    assert all(sample["prompt"].rstrip().endswith("assistant") for sample in samples)


def test_a_quantised_run_ends_without_a_second_base(
    run: Runner, tiny_llama: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_finetune.models import load

    monkeypatch.setattr(load, "fresh_base", lambda *unused: pytest.fail("a second base was loaded"))
    done = run(CHAT, f"model.name={tiny_llama}", "model.quantization=nf4", "data.max_length=64", "training.epochs=1")
    assert done.outcome.reload_difference is None
    assert "every bit of the weights is equal" in capsys.readouterr().out
    assert "every bit of the saved weights is equal" in (done.folder / "report.md").read_text()


def test_streaming_trains_without_loading(run: Runner, tiny_llama: str, reviews: Callable[[int], str]) -> None:
    done = run(
        CHAT, f"model.name={tiny_llama}", "data.streaming=true", "data.validation_share=null",
        f"data.validation={reviews(32)}", "training.epochs=null", "training.steps=30", "training.eval_every=15",
    )  # fmt: skip
    assert [line["step"] for line in done.lines("eval")] == [15, 30]
    assert done.lines("train")[-1]["loss"] < done.lines("train")[0]["loss"]


def test_processes_that_encode_a_stream_give_the_same_rows_and_counts(run: Runner) -> None:
    streamed = (
        "data.streaming=true", "data.validation_share=null", "data.shuffle_buffer=16", "data.max_length=9",
        "data.overlong=drop", "task.labels=[negative,positive]", "training.epochs=null", "training.steps=8",
        "training.eval_every=null", "training.micro_batch=4",
    )  # fmt: skip
    found = []
    for workers in (1, 2):
        done = run(*streamed, f"data.workers={workers}", restart=True)
        losses = [line["loss"] for line in done.lines("train")]
        found.append((losses, done.outcome.prepared.reports["train"]))
    assert found[0] == found[1]
    report = found[0][1]
    assert report.rows == 96
    assert 0 < report.dropped < 96
    assert report.kept + report.dropped == 96


def test_a_diverged_run_stops_and_says_so(run: Runner, tmp_path: Path) -> None:
    rows = tmp_path / "scores.jsonl"
    rows.write_text("".join(json.dumps({"text": "the film", "label": index * 1e30}) + "\n" for index in range(16)))
    with pytest.raises(DivergedError, match="loss or gradient is not finite at step 1"):
        run(f"data.train={rows}", "data.validation_share=null", "task.problem=regression")
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 6)
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.parametrize("adapter", ["lora, r: 4, init: pissa", "full"])
def test_the_best_checkpoint_comes_back_with_every_adapter(run: Runner, adapter: str) -> None:
    done = run(
        f"adapter={{kind: {adapter}}}", "training.epochs=6", "training.best_metric=loss",
        "training.learning_rate=0.5", "training.warmup_ratio=0.99", "training.max_grad_norm=null",  # worse and worse
        "checkpoints.every=epoch", "checkpoints.keep=1",
    )  # fmt: skip
    losses = [line["loss"] for line in done.lines("eval")]
    assert losses[-1] > min(losses)
    assert done.lines("final")[0]["loss"] == pytest.approx(min(losses), rel=1e-5)
    assert done.outcome.reload_difference < 1e-4


@pytest.mark.parametrize("adapter", ["lora, r: 4, init: pissa", "full"])
def test_weights_that_were_gathered_are_saved_as_those_of_a_whole_model(
    run: Runner, monkeypatch: pytest.MonkeyPatch, adapter: str, tmp_path: Path
) -> None:
    from hf_finetune.inference import saving

    kept: dict[str, Any] = {}
    save = saving.save_and_compare

    def catch(trainer: Any, folder: Any) -> float | None:
        kept.update(model=trainer.bare_model, job=trainer.job)
        return save(trainer, folder)

    monkeypatch.setattr(saving, "save_and_compare", catch)
    done = run(f"adapter={{kind: {adapter}}}", "model.dropout=0")
    job, model = kept["job"], kept["model"]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # as if other ranks had it
    again, rest = tmp_path / "again", (job.targets, job.tokenizer)
    saving.save(model, job.recipe, *rest, again, state=state)
    weights = "model.safetensors" if adapter == "full" else "adapter_model.safetensors"
    assert (again / weights).read_bytes() == (done.folder / "adapter" / weights).read_bytes()
    saving.compare(model, job.recipe, again, state)
    with pytest.raises(ModelError, match=r"does not hold the trained model: \d+ weights differ"):
        saving.compare(model, job.recipe, again)


def test_a_run_ends_well_where_a_second_model_does_not_fit(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_finetune.models import load

    def too_large(*unused: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(load, "fresh_base", too_large)
    done = run()
    assert (done.status["state"], done.outcome.reload_difference) == ("done", None)
    assert done.lines("summary")[0]["read_back"] == "equal"


def test_the_best_model_is_kept_between_two_checkpoints(run: Runner) -> None:
    done = run(
        "training.steps=8", "training.epochs=null", "training.eval_every=1", "checkpoints.every=5",
        "training.best_metric=loss", "training.learning_rate=0.5", "training.warmup_ratio=0.99",
        "training.max_grad_norm=null",
    )  # fmt: skip
    losses = [line["loss"] for line in done.lines("eval")]
    assert losses.index(min(losses)) + 1 not in (5, 8)
    assert done.outcome.scores["validation"]["loss"] == pytest.approx(min(losses), rel=1e-5)


def test_an_undefined_best_metric_is_told(run: Runner, tmp_path: Path) -> None:
    one_class = tmp_path / "one_class.csv"
    one_class.write_text("text,label\n" + "the film is good .,positive\n" * 4)
    with pytest.raises(DataError, match=r"training\.best_metric: matthews is undefined"):
        run(
            f"data.validation={one_class}",
            "data.validation_share=null",
            "training.best_metric=matthews",
            "data.checks.leakage=off",
        )


def test_what_could_never_act_is_refused(run: Runner) -> None:
    for setting in [
        "training.warmup_steps=1000",
        "training.early_stopping={patience: 2}",
        "training.early_stopping={patience: 9}",
    ]:
        with pytest.raises(RecipeError, match=setting.partition("=")[0]):
            run(setting, "training.best_metric=loss")


def test_a_language_model_that_is_not_a_number_stops(run: Runner, tiny_llama: str) -> None:
    with pytest.raises(DivergedError, match=r"not finite|split is nan"):
        run(
            "task={kind: causal_lm, text: text}", f"model.name={tiny_llama}", "adapter={kind: full}",
            "training.learning_rate=10", "training.max_grad_norm=null", "training.epochs=60", "training.log_every=1000",
            "training.optimizer=sgd",
        )  # fmt: skip


def test_data_driven_initialisation_does_not_depend_on_the_micro_batch(run: Runner) -> None:
    settings = ("adapter={kind: lora, r: 4, init: eva}", "model.dropout=0", "training.epochs=1")
    whole = run(*settings, "training.micro_batch=16").lines("train")
    parts = run(*settings, "training.micro_batch=2", restart=True).lines("train")
    assert [line["loss"] for line in parts] == pytest.approx([line["loss"] for line in whole], rel=1e-4)


def test_two_runs_of_one_process_may_differ_in_precision(run: Runner) -> None:
    assert run("training.epochs=1").outcome.machine.precision == "fp32"
    assert run("training.epochs=1", "training.precision=bf16", restart=True).outcome.machine.precision == "bf16"


def test_a_model_that_training_blew_up_is_not_called_a_broken_file() -> None:
    grown: Any = SimpleNamespace(state=SimpleNamespace(log_history=[{"loss": 0.7}, {"eval_loss": 9.0}, {"loss": 28.0}]))
    with pytest.raises(DivergedError, match=r"the loss rose from 0.7 to 28"), saving.divergence_named(grown):
        raise ModelError("logits differ")
    grown.state.log_history.append({"loss": 0.5})
    with pytest.raises(ModelError, match="logits differ"), saving.divergence_named(grown):
        raise ModelError("logits differ")
