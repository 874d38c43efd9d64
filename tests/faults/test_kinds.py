"""Every kind of run goes on bit for bit: K6-K9, packing, adapters, tasks, another number of processes."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from faults.lab import Job, Lab
from faults.oracle import exact, resume, resumed_at

LM = ("task={kind: causal_lm, text: text}",)
BY_STEPS = ("training.epochs=null", "training.steps=26")
STREAMED = ("data.streaming=true", "data.shuffle_buffer=40", "task.labels=[negative, positive]", *BY_STEPS)
KINDS = {
    "adalora": ("adapter={kind: adalora, init_r: 6, target_r: 3, dropout: 0.1, interval: 2}",),
    "ia3": ("adapter={kind: ia3, target_modules: [query, value], feedforward_modules: [value]}",),
    "pissa": ("adapter.init=pissa", "adapter.dropout=0"),
    "eva": ("adapter.init=eva",),
    "full": ("adapter={kind: full}", "training.learning_rate=5e-4"),
    "adafactor": ("training.optimizer=adafactor",),
    "bf16": ("training.precision=bf16",),
    "checkpointing": ("training.activation_checkpointing=true",),
    "grouped": ("training.group_by_length=true",),
    "workers": ("data.workers=2",),
    "streamed": STREAMED,
}


def killed(job: Job, step: int, place: str = "step_end") -> Job:
    ended = job.go(["at", {"place": place, "step": step, "action": "die"}])
    assert set(ended.codes) == {-signal.SIGKILL}, ended.output
    return job


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.faults
def test_k7_k9_k11_every_kind_of_run(lab: Lab, kind: str) -> None:
    resume(lab, killed(lab.job(*KINDS[kind]), 18), at=15)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param((), id="plain"),
        pytest.param(("data.packing=true", "training.batch_size=2", "training.micro_batch=1"), id="packed"),
        pytest.param(("task.generate_rows=0", "task.sample_prompts=2"), id="samples"),
    ],
)
@pytest.mark.faults
def test_language_models(lab: Lab, tiny_llama: str, more: tuple[str, ...]) -> None:
    job = lab.job(*LM, f"model.name={tiny_llama}", *BY_STEPS, *more)
    resume(lab, killed(job, 18), at=15)
    samples = job.run / "samples.jsonl"
    if samples.exists():
        reference = lab.reference(job.overrides).run / "samples.jsonl"
        assert samples.read_bytes() == reference.read_bytes()


@pytest.mark.parametrize("step", [9, 14, 26])
@pytest.mark.faults
def test_k9_streams_in_their_first_and_second_pass(lab: Lab, step: int) -> None:
    resume(lab, killed(lab.job(*STREAMED), step), at=(step - 1) // 5 * 5)


@pytest.mark.parametrize("kind", ["grouped", "streamed"])
@pytest.mark.faults
def test_k7_k9_in_the_middle_of_the_second_pass(lab: Lab, kind: str) -> None:
    resume(lab, killed(lab.job(*KINDS[kind], ranks=2), 22), at=20)


STOPPING = (
    "training.epochs=8", "training.eval_every=3", "training.best_metric=loss", "training.learning_rate=0.02",
    "training.early_stopping={patience: 4}",
)  # fmt: skip


@pytest.mark.parametrize("back", [2, 8])
@pytest.mark.faults
def test_k6_early_stopping_stops_at_the_same_step_with_the_same_best(lab: Lab, back: int) -> None:
    reference = lab.reference(STOPPING)
    last = reference.lines("train")[-1]["step"]
    assert last < 8 * 13, "it should stop early"
    assert len(reference.lines("eval")) > 5
    job = killed(lab.job(*STOPPING), last - back)
    resume(lab, job, at=None)
    assert job.lines("train")[-1]["step"] == last


@pytest.mark.faults
def test_k6_best_without_other_checkpoints(lab: Lab) -> None:
    job = killed(lab.job("checkpoints.every=null", "training.best_metric=accuracy"), 25)
    assert job.checkpoints
    resume(lab, job, at=job.checkpoints[-1])


def test_two_processes_go_on_as_one_with_the_same_rows(lab: Lab) -> None:
    plain = ("adapter.dropout=0", "model.dropout=0")
    whole, cut = lab.job(*plain, ranks=2), lab.job(*plain, ranks=2)
    assert whole.go(["record", {"file": str(whole.folder / "rows")}]).codes == [0, 0]
    killed(cut, 12)
    cut.ranks = 1
    cut.overrides.append("training.micro_batch=8")
    ended = cut.go(["record", {"file": str(cut.folder / "rows")}])
    assert ended.code == 0, ended.output
    assert resumed_at(ended.output) == 10
    assert "2 ranks, now 1" in ended.output
    assert drawn(cut, after=10) == drawn(whole, after=10)
    for one, other in zip(cut.lines("train"), whole.lines("train"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6), one["step"]
        assert one["learning_rate"] == other["learning_rate"]
    assert [exact(line) for line in cut.lines("train")[:10]] == [exact(line) for line in whole.lines("train")[:10]]


@pytest.mark.faults
def test_one_process_goes_on_as_two(lab: Lab) -> None:
    plain = ("adapter.dropout=0", "model.dropout=0", "training.group_by_length=true")
    whole, cut = lab.job(*plain), lab.job(*plain)
    assert whole.go(["record", {"file": str(whole.folder / "rows")}]).codes == [0]
    killed(cut, 17)
    cut.ranks = 2
    ended = cut.go(["record", {"file": str(cut.folder / "rows")}])
    assert ended.codes == [0, 0], ended.output
    assert drawn(cut, after=15) == drawn(whole, after=15)
    losses = [[line["loss"] for line in job.lines("train")] for job in (cut, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


@pytest.mark.faults
def test_the_rows_after_a_resume_are_those_that_were_due(lab: Lab) -> None:
    whole, cut = lab.job("training.group_by_length=true"), lab.job("training.group_by_length=true")
    assert whole.go(["record", {"file": str(whole.folder / "rows")}]).code == 0
    killed(cut, 17)
    ended = cut.go(["record", {"file": str(cut.folder / "rows")}])
    assert ended.code == 0, ended.output
    assert in_order(cut) == [micro for micro in in_order(whole) if micro[0] > 15]


@pytest.mark.faults
def test_a_moved_run_folder_goes_on(lab: Lab) -> None:
    job = killed(lab.job(), 12)
    elsewhere = job.folder / "elsewhere" / "run"
    elsewhere.parent.mkdir()
    shutil.move(job.run, elsewhere)
    moved = Job(job.server, elsewhere.parent, job.recipe, [f"output={elsewhere}"])
    ended = moved.go()
    assert ended.code == 0, ended.output
    assert resumed_at(ended.output) == 10
    assert [exact(line) for line in moved.lines("train")] == [exact(line) for line in lab.reference(()).lines("train")]


def in_order(job: Job) -> list[tuple[int, list[str]]]:
    """Step and rows of each micro-batch of rank 0."""
    lines = Path(f"{job.folder}/rows.0").read_text().splitlines()
    return [(step, hashes) for step, hashes in map(json.loads, lines)]


def drawn(job: Job, after: int) -> dict[int, list[str]]:
    """The rows of each global batch after a step, sorted, from all ranks."""
    found: dict[int, list[str]] = {}
    for file in job.folder.glob("rows.*"):
        for line in file.read_text().splitlines():
            step, hashes = json.loads(line)
            if step > after:
                found.setdefault(step, []).extend(hashes)
    return {step: sorted(hashes) for step, hashes in sorted(found.items())}
