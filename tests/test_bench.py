"""The benchmark: its arithmetic, its table, its memory of what was measured, and a small real race."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import marked
from benchmarks.race import __main__ as command
from benchmarks.race import (
    clis,
    corpora,
    environments,
    flops,
    goals,
    llama,
    machine,
    measure,
    ours,
    race,
    runner,
    summary,
    table,
)
from benchmarks.race.results import Measurement, Store, plan
from benchmarks.race.workloads import QUICK, Shape, Target

pytestmark = pytest.mark.slow

NOTHING = measure.Sources(None, None, None)
TINY = Shape(32, 2, 64, 2, 512)
CHATS = replace(QUICK[1], model=TINY, rows=12, validation_rows=4, batch_size=4, r=4, alpha=8)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> measure.Prepared:
    """A tiny Llama and a few chats."""
    return measure.prepare(CHATS, NOTHING, tmp_path_factory.mktemp("race"))


def result(system: str, seed: int, rate: float, **more: Any) -> dict[str, Any]:
    """What a run that went well leaves behind."""
    facts = {"workload": "quick-chats", "system": system, "seed": seed, "failed": None, "load": 0.1, "others": 0.01}
    numbers = {
        "samples_per_second": rate,
        "tokens_per_second": 10 * rate,
        "flops_per_second": 1e9 * rate,
        "wall": 60 / rate,
    }
    own = {"tokens": None, "trained_parameters": 1, "steps": 3}
    return {**facts, **numbers, "first_step": 3.0, "memory": 10**8, "quality": 1.5, "own": own, **more}


def test_a_ratio_is_taken_round_by_round() -> None:
    one = [result("hf_finetune", 1, 20.0), result("hf_finetune", 2, 10.0), result("hf_finetune", 3, 90.0)]
    other = [result("plain", 2, 2.0), result("plain", 1, 10.0)]
    assert summary.ratio(one, other, "samples_per_second") == summary.Spread(3.5, 2.0, 5.0, 2)


def test_the_ratio_of_times_says_how_many_times_faster() -> None:
    found = summary.ratio([result("a", 1, 20.0)], [result("b", 1, 10.0)], "wall", less_is_better=True)
    assert found is not None
    assert found.median == pytest.approx(2.0)


def test_the_time_to_a_target_is_that_of_the_first_evaluation_that_meets_it() -> None:
    for target, seconds in [
        (Target("accuracy", 0.8), 20.0),
        (Target("accuracy", 0.95), None),
        (Target("loss", 0.5), 10.0),
    ]:
        evaluations = [
            {"seconds": 10.0, "accuracy": 0.7, "loss": 0.5},
            {"seconds": 20.0, "accuracy": 0.8, "loss": 0.6},
            {"seconds": 30.0, "accuracy": 0.9, "loss": 0.1},
        ]
        assert summary.time_to(evaluations, target) == seconds


def test_flops_are_4_a_frozen_and_6_a_trained_weight_and_token_and_the_head_counts_for_answers_alone() -> None:
    assert flops.training(flops.Weights(frozen=100, trained=10, head=50), tokens=3, answers=2) == 3 * 460 + 2 * 200


def test_answers_are_what_comes_after_the_questions(prepared: measure.Prepared) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(prepared.model)
    rows = corpora.cut(corpora.gsm8k(None), CHATS).train
    ended = [f"{row['answer']}<|im_end|>\n" for row in rows]
    assert prepared.answers == sum(len(ids) for ids in tokenizer(ended, add_special_tokens=False)["input_ids"])
    assert corpora.answers([{"text": "a", "label": "b"}], prepared.model, 8) == 0


def test_the_weights_that_tokens_meet_are_counted_as_peft_makes_them(prepared: measure.Prepared) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(prepared.model)
    linear = sum(m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear))
    adapted: Any = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4))
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert (prepared.weights.frozen + prepared.weights.head, prepared.weights.trained) == (linear, trained)
    assert prepared.weights.head == base.get_output_embeddings().weight.numel()


def test_the_made_llama_is_the_same_every_time(tmp_path: Path) -> None:
    texts = ["a b c", "two and two are four"]
    files = [llama.make(tmp_path / name, TINY, texts) / "model.safetensors" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_workload_takes_the_same_rows_whoever_trains(prepared: measure.Prepared) -> None:
    rows = [json.loads(line) for line in (prepared.folder / "train.jsonl").read_text().splitlines()]
    assert rows == corpora.cut(corpora.gsm8k(None), CHATS).train
    assert len(rows) == prepared.rows == 12


def test_every_system_has_the_same_tokens(prepared: measure.Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    sys_path = Path(measure.__file__).parent / "peers"
    monkeypatch.syspath_prepend(str(sys_path))
    import plain  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    job = {"kind": "chat", "max_length": 512, "variant": "plain", "train": str(prepared.folder / "train.jsonl")}
    job["validation"] = str(prepared.folder / "validation.jsonl")
    theirs = plain.encode(job, AutoTokenizer.from_pretrained(prepared.model))["train"]["input_ids"]
    counted = corpora.lengths(corpora.cut(corpora.gsm8k(None), CHATS).train, prepared.model, 512)
    assert [len(ids) for ids in theirs] == counted
    assert sum(counted) == prepared.tokens


def test_sst2_is_read_from_its_tsv_files(tmp_path: Path) -> None:
    for name in ("train", "dev"):
        (tmp_path / f"{name}.tsv").write_text('sentence\tlabel\na "good film \t1\nbad\t0\n')
    corpus = corpora.sst2(tmp_path)
    assert corpus.train == [{"text": 'a "good film ', "label": "positive"}, {"text": "bad", "label": "negative"}]
    assert corpus.note == ""


def test_every_second_round_goes_backwards() -> None:
    order = [(found.system, found.seed) for found in plan([("w", "d", ("a", "b"))], 3)]
    assert order == [("a", 1), ("b", 1), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]


def test_what_was_measured_is_found_again_under_the_same_settings_only(tmp_path: Path) -> None:
    store, measured = Store(tmp_path), Measurement("w", CHATS.digest(), "plain", 1)
    store.put(measured, {"failed": None, "seed": 1})
    assert store.get(measured) == {"failed": None, "seed": 1}
    assert store.get(replace(measured, digest=replace(CHATS, rows=13).digest())) is None
    told: dict[str, Any] = {
        "goals": {"plain": 9.0},
        "memory_goals": {"plain": 0.5},
        "share_goal": 0.4,
        "systems": ("plain",),
    }
    assert replace(CHATS, title="else", **told).digest() == CHATS.digest()
    store.forget(measured)
    assert store.get(measured) is None


def small(folder: Path, *words: str, systems: tuple[str, ...] = ("hf_finetune", "plain")) -> race.Race:
    """A race on a tiny model that is ready to run."""
    options = command.parse(["--quick", "--seeds", "1", *words])
    one = race.Race(options, folder, [replace(CHATS, systems=systems)])
    one.prepare()
    return one


@pytest.fixture
def known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is spent on measuring the machine."""
    monkeypatch.setattr(machine, "peaks", lambda: {"fp32": 1e11, "bf16": 4e11})


@pytest.mark.usefixtures("known_peak")
def test_a_finished_race_measures_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = small(tmp_path, systems=("plain",))
    for prepared, measurement in one.plan():
        one.store.put(measurement, {**result("plain", 1, 5.0), "digest": prepared.digest})
    monkeypatch.setattr(measure, "measure", None)  # would not be survived
    monkeypatch.setattr(machine, "peaks", lambda: {"fp32": 1e10, "bf16": 1e10})  # who is disturbed measures too little
    one.run()
    assert "| Trainer + PEFT, defaults | 1 | 5.0 |" in one.write()
    assert json.loads((tmp_path / "table.json").read_text())["rows"][0]["share"]["median"] == pytest.approx(0.0125)


@pytest.mark.usefixtures("known_peak")
def test_nothing_is_begun_when_the_time_is_up_and_missing_ourselves_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = small(tmp_path, "--budget", "0")
    monkeypatch.setattr(measure, "measure", None)
    one.run()
    assert "| hf_finetune | 0 | not measured: no time |" in one.write()
    assert one.problems() == ["quick-chats: hf_finetune was not measured"]


@pytest.mark.usefixtures("known_peak")
def test_a_peer_that_fails_is_no_failure_of_the_race_but_ours_is(tmp_path: Path) -> None:
    one = small(tmp_path)
    (_, ours_), (_, plain) = one.plan()
    one.store.put(ours_, result("hf_finetune", 1, 5.0))
    one.store.put(plain, {**result("plain", 1, 5.0), "failed": "ValueError: no"})
    assert one.problems() == []
    one.store.put(ours_, {**result("hf_finetune", 1, 5.0), "failed": "ValueError: no"})
    assert one.problems() == ["quick-chats: hf_finetune failed: ValueError: no"]


@pytest.mark.usefixtures("known_peak")
def test_a_peer_that_can_not_be_installed_is_in_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(*arguments: Any) -> float:
        asked.append(arguments)
        raise environments.InstallError("ERROR: No matching distribution found for trl")

    monkeypatch.setattr(environments, "install", refuse)
    one = small(tmp_path, systems=("trl", "trl-tuned"))
    one.run()
    assert len(asked) == 1  # once for both
    assert "did not run: `pip: ERROR: No matching distribution found for trl`" in one.write()
    assert one.problems() == []


@pytest.mark.usefixtures("known_peak")
def test_a_run_that_the_end_of_the_time_cuts_short_is_measured_again_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environments, "install", lambda *_: 0.0)
    slow = {**result("plain", 1, 5.0), "failed": "did not end within 99 s", "timed_out": True}
    monkeypatch.setattr(measure, "measure", lambda *_, **__: slow)
    one = small(tmp_path, "--budget", "100", "--timeout", "200", systems=("plain",))
    one.run()
    assert one.found() == []
    patient = small(tmp_path, "--budget", "300", "--timeout", "200", systems=("plain",))
    patient.run()
    assert patient.found() == [slow]


def test_a_row_has_medians_ratios_and_how_many_seeds(prepared: measure.Prepared) -> None:
    workload = replace(CHATS, goals={"plain": 4.0}, memory_goals={"plain": 0.4}, share_goal=0.5)
    results = {
        "hf_finetune": [result("hf_finetune", seed, 40.0 + seed) for seed in (1, 2, 3)],
        "plain": [result("plain", seed, 10.0, memory=2 * 10**8) for seed in (1, 2)],
    }
    entries = table.rows(replace(prepared, workload=workload), results, 1e12)
    text = table.markdown(replace(prepared, workload=workload), entries, goals.check(workload, entries))
    assert "| hf_finetune | 3 | 42.0 (41.0..43.0) | 420 (410..430) | 4.2% | 100 MB |" in text
    assert "| share of peak (goal 50%: missed) |" in text
    assert "| 4.15 (4.10..4.20) x faster (goal 4 x: met), memory x 0.50 (goal at most 0.4 x: missed) |" in text


def test_goals_say_what_was_measured_and_whether_it_is_enough(prepared: measure.Prepared) -> None:
    workload = replace(CHATS, goals={"plain": 8.0, "tuned": 1.0, "trl": 5.0}, share_goal=0.04)
    results = {
        "hf_finetune": [result("hf_finetune", seed, 42.0, quality=1.5 + seed / 10) for seed in (1, 2, 3)],
        "plain": [result("plain", seed, 10.0, quality=1.0 + seed / 10) for seed in (1, 2, 3)],
        "tuned": [],
    }
    found = goals.check(workload, table.rows(replace(prepared, workload=workload), results, 1e12))
    told = {(goal.what, goal.against): (goal.aim, goal.verdict) for goal in found}
    assert told == {
        ("rate", "plain"): ("8 x", "missed"),
        ("rate", "tuned"): ("1 x", "not measured"),
        ("share of the peak", ""): ("4%", "met"),
        ("quality", "plain"): ("ranges overlap, or better", "missed"),  # our best loss, 1.6, is above their worst, 1.3
    }
    line = f"| `{CHATS.name}` | rate | plain | 8 x | 4.20 x (3 seeds) | missed |"
    assert line in goals.markdown(found)


def test_a_table_replaces_what_stands_between_its_marks_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "page.md"
    file.write_text("before\n<!-- results: from a -->\nold\n<!-- results: end -->\nafter\n")
    for _ in range(2):
        marked.put(file, "results", "\nnew \\1\n")
        text = "before\n<!-- results: from a -->\n\nnew \\1\n\n<!-- results: end -->\nafter\n"
        assert file.read_text() == text
    with pytest.raises(SystemExit, match="profile: end"):
        marked.put(file, "profile", "x")


def test_a_package_that_can_not_be_had_is_an_install_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)  # a machine's own constraints refuse in other words
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    (tmp_path / "constraints.txt").write_text("torch==0.0.1\n")
    with pytest.raises(environments.InstallError, match=r"No matching distribution found for torch==0\.0\.1"):
        environments.install(environments.Environment("test", ("torch",), is_pinned=False))


def test_the_last_words_of_a_log_are_its_last_error() -> None:
    log = "Traceback\n  File x\nValueError: no\n  0%|      | 0/2 [00:03<?, ?it/s]\n"
    assert environments.last_line(log) == "ValueError: no"
    assert environments.last_line("one\rtwo\n\n") == "two"
    assert environments.last_line("") == "it said nothing"
    assert environments.last_line("OSError: no /a/b/lib/x.so, see https://a.b/c/d") == (
        "OSError: no .../x.so, see https://a.b/c/d"
    )


def test_a_run_is_watched_until_it_ends(tmp_path: Path) -> None:
    code = "import time; print('one', flush=True); x = bytearray(50_000_000); time.sleep(0.5); print('two'); exit(3)"
    launch = runner.Launch(
        [sys.executable, "-c", code], None, lambda seen: [{"time": t, "line": s} for t, s in seen], tmp_path
    )
    watched = runner.run(launch, tmp_path / "log", tmp_path, 60.0)
    assert watched.exit_code == 3
    assert [event["line"] for event in watched.events] == ["one", "two"]
    assert 0.3 < watched.events[1]["time"] - watched.events[0]["time"] < watched.wall
    assert watched.peak_rss is None or watched.peak_rss > 50_000_000


def test_a_run_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    launch = runner.Launch([sys.executable, "-c", "import time; time.sleep(60)"], None, lambda seen: [], tmp_path)
    watched = runner.run(launch, tmp_path / "log", tmp_path, 0.3)
    assert watched.timed_out
    assert watched.wall < 30


def test_our_probe_counts_as_training() -> None:
    lines = [
        (5.0, {"phase": "train", "step": 1, "loss": 1.0}),
        (8.0, {"phase": "eval", "step": 4, "loss": 0.5, "accuracy": 0.7}),
        (9.0, {"phase": "summary", "step": 4, "seconds": 3.0, "probe_seconds": 2.0, "trained_parameters": 7}),
    ]
    found = ours.events(lines)
    assert [event["event"] for event in found] == ["first_step", "evaluated", "train_end"]
    assert found[2]["seconds"] == 5.0


def test_memory_is_compared_where_micro_batches_are_equal(prepared: measure.Prepared) -> None:
    ours_ = [result("hf_finetune", 1, 1.0, micro_batch=4)]
    ratios = []
    for rows in (4, 8):
        theirs = [result("plain", 1, 1.0, micro_batch=rows, memory=2 * 10**8)]
        ratios.append(table.rows(prepared, {"hf_finetune": ours_, "plain": theirs}, 1e12)[1]["times_less_memory"])
    assert ratios == [summary.Spread(2.0, 2.0, 2.0, 1), None]


def test_peers_with_a_command_line_are_told_the_same(prepared: measure.Prepared, tmp_path: Path) -> None:
    for configure in [clis.llama_factory, clis.axolotl, clis.ms_swift]:
        job = measure.job_of(prepared, Measurement("quick-chats", prepared.digest, "x", 7), tmp_path)
        command = configure(job).command
        said = " ".join(command) + "".join(file.read_text() for file in tmp_path.glob("config.yaml"))
        for fact in (job["model"], str(job["learning_rate"]), "512"):
            assert fact in said


@pytest.mark.usefixtures("known_peak")
def test_two_systems_race(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments.Environment, "python", sys.executable)
    monkeypatch.setattr(environments, "install", lambda *_: 0.0)
    one = small(tmp_path)
    one.run()
    hf, plain = one.found()
    assert hf["failed"] is plain["failed"] is None
    own = {"tokens": one.prepared[0].tokens, "trained_parameters": one.prepared[0].weights.trained, "steps": 3}
    assert hf["own"] == plain["own"] == own
    assert hf["micro_batch"] == plain["micro_batch"] == CHATS.batch_size
    assert hf["quality"] == pytest.approx(plain["quality"], abs=0.02)
    assert hf["samples_per_second"] > 0
    assert not (tmp_path / "work" / "quick-chats" / "plain-seed1").exists()


def test_rows_padded_to_the_greatest_length_count_as_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(measure.__file__).parent / "peers"))
    import plain
    from transformers import AutoTokenizer

    minilm = measure.packaged(str(QUICK[0].model))
    rows = str(corpora.QUICKSTART / "validation.jsonl")
    job = {"kind": "classification", "max_length": 64, "train": rows, "validation": rows, "variant": "plain-padded"}
    job["labels"] = ["resolved", "unresolved"]
    encoded = plain.encode(job, AutoTokenizer.from_pretrained(minilm))["train"]
    assert {len(ids) for ids in encoded["input_ids"]} == {64}
    counted = sum(sum(mask) for mask in encoded["attention_mask"])
    whole = corpora.sst2(None).validation[: len(encoded)]
    assert counted == sum(corpora.lengths(whole, minilm, 64))
