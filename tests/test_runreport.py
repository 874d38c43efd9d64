"""The run report: what it says, how sure it is, and that it loses no run."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import reported
from reported import CHAT, CLASSES, EVIL
from scipy import stats

from hf_finetune.config.blocks import Tracking
from hf_finetune.data.facts import Facts
from hf_finetune.data.splits import SplitReport
from hf_finetune.log import text as log_text
from hf_finetune.recipe import Recipe
from hf_finetune.reports import intervals, verdict
from hf_finetune.reports import outcome as reports_outcome
from hf_finetune.reports import run as reports_run
from hf_finetune.reports.run import RunData
from hf_finetune.run.folder import RunFolder
from hf_finetune.tasks import _metrics as metrics
from hf_finetune.tasks._sums import Sums
from hf_finetune.tasks.base import State
from hf_finetune.tasks.causal_lm import CausalLM
from hf_finetune.tasks.token_classification import TokenClassification
from hf_finetune.tracking import predictions
from hf_finetune.tracking.records import Record

if TYPE_CHECKING:
    from conftest import Run

Array = np.ndarray[Any, Any]
Runner = Callable[..., "Run"]
NAMES = ["good", "bad", "odd", "rare"]


def data_of(folder: RunFolder, task: dict[str, Any]) -> RunData:
    return RunData.read(folder, reported.recipe(folder.path.parent, task))


def sums_of(rows: Array, facts: dict[str, Any]) -> Sums | None:
    record = Record("predictions", "eval", 1, {"rows": rows}, facts)
    return intervals.recorded(record, CausalLM(kind="causal_lm", text="text"))


def estimate(rows: Array, facts: dict[str, Any], seed: int = 0) -> intervals.Intervals:
    sums = sums_of(rows, facts)
    return intervals.estimate([] if sums is None else [sums], seed)


def classes(count: int) -> Array:
    """Logits and label id of four classes, the last of which nobody has or predicts."""
    draw = np.random.default_rng(1)
    labels = draw.integers(0, 3, count)
    logits = draw.normal(size=(count, 4))
    logits[np.arange(count), labels] += 1
    logits[:, 3] = -9
    return np.column_stack([logits, labels])


def cells(count: int) -> Array:
    draw = np.random.default_rng(2)
    return np.column_stack([draw.normal(size=(count, 4)), draw.integers(0, 2, (count, 4))])


SPLITS: dict[str, tuple[Array, dict[str, Any], dict[str, float]]] = {
    "single_label": (
        classes(200), {"names": NAMES}, metrics.single_label(classes(200)[:, :4], classes(200)[:, 4], NAMES)
    ),
    "multi_label": (
        cells(200), {"names": NAMES, "threshold": 0.4},
        metrics.multi_label(cells(200)[:, :4], cells(200)[:, 4:], NAMES, 0.4),
    ),
    "regression": (cells(200)[:, :2] + 1e3, {}, metrics.regression(*(cells(200)[:, :2] + 1e3).T)),
}  # fmt: skip


def test_metrics_of_sums_are_those_of_the_task() -> None:
    for problem in SPLITS:
        rows, facts, expected = SPLITS[problem]
        sums = sums_of(rows, {"problem": problem, **facts})
        assert sums is not None
        found = sums.metrics(np.asarray(sums.of_rows @ np.ones((len(rows), 1))))
        shared = {name: float(values[0]) for name, values in found.items() if name in expected}
        assert shared == pytest.approx({name: expected[name] for name in shared})
        assert {"loss", {"regression": "r2"}.get(problem, "f1_macro")} <= set(shared)


def test_token_metrics_of_sums_are_those_of_the_task() -> None:
    rows = np.column_stack([np.linspace(1, 9, 20), np.full(20, 4), np.arange(20) % 4])
    sums = sums_of(rows, {"problem": None})
    assert sums is not None
    found = {name: float(values[0]) for name, values in sums.metrics(rows.sum(axis=0)[:, None]).items()}
    task = CausalLM(kind="causal_lm", text="text")
    predictions = dict(zip(("nats", "tokens", "right"), rows.T, strict=True))
    assert found == pytest.approx(task.metrics(predictions, State()))


def test_an_interval_is_that_of_scipy() -> None:
    rows = classes(300)
    right = (rows[:, :4].argmax(axis=1) == rows[:, 4]).astype(float)
    expected = stats.bootstrap(
        (right,), np.mean, n_resamples=1000, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    found = estimate(rows, {"problem": "single_label", "names": NAMES})
    assert found.bounds["accuracy"] == pytest.approx((expected.low, expected.high))
    assert found.method == "95% percentile bootstrap, 1,000 resamples of 300 rows"


def test_an_interval_is_the_same_every_time() -> None:
    rows, facts, _ = SPLITS["regression"]
    once, twice, other = (estimate(rows, {"problem": "regression", **facts}, seed) for seed in (0, 0, 1))
    assert once == twice != other


def test_an_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(5)
    covered = 0
    for _ in range(100):
        labels = (draw.random(100) > 0.8).astype(float)  # right in 80 of 100 rows
        low, high = estimate(
            np.column_stack([np.ones(100), np.zeros(100), labels]), {"problem": "single_label", "names": ["a", "b"]}
        ).bounds["accuracy"]
        covered += low <= 0.8 <= high
    assert 88 <= covered <= 99


def test_a_task_without_charts_has_intervals_of_what_it_predicted() -> None:
    task = TokenClassification(kind="token_classification", words="words", tags="tags")
    truth = np.tile([0, 1, 1, -100], (20, 1))
    tag = truth.copy()
    tag[:5, 0] = 1
    arrays = {"truth": truth, "tag": tag, "nats": np.ones((20, 4)), "confidence": np.ones((20, 4))}
    record = Record("outputs", "eval", 1, {"ids": np.arange(20), **arrays}, {"names": ["O", "B-X"]})
    sums = intervals.recorded(record, task)
    assert sums is not None
    low, high = intervals.estimate([sums]).bounds["accuracy"]
    assert low < 55 / 60 < high


def test_rows_that_are_all_right_leave_wilsons_interval() -> None:
    rows = np.column_stack([np.linspace(1, 3, 14), np.zeros(14), np.zeros(14)])
    found = estimate(rows, {"problem": "single_label", "names": ["a", "b"]})
    expected = stats.binomtest(14, 14).proportion_ci(method="wilson")
    assert found.bounds["accuracy"] == pytest.approx((expected.low, expected.high))
    assert expected.low < 0.8
    assert "f1_macro" not in found.bounds, "an interval of no width would say that more rows could change nothing"
    assert found.bounds["loss"][0] < found.bounds["loss"][1]
    assert found.method.endswith("Wilson's for accuracy, alike in all of them")


def test_all_wrong_and_models_that_agree_everywhere_have_an_interval_too() -> None:
    rows = np.column_stack([np.zeros(14), np.ones(14), np.zeros(14)])
    facts = {"problem": "single_label", "names": ["a", "b"]}
    upper = stats.binomtest(0, 14).proportion_ci(method="wilson").high
    assert estimate(rows, facts).bounds["accuracy"] == pytest.approx((0.0, upper))
    sums = sums_of(rows, facts)
    assert sums is not None
    assert intervals.differences([(sums, sums)]).bounds == {"accuracy": pytest.approx((-upper, upper))}


def test_the_share_of_the_peak_is_one_number(tmp_path: Path) -> None:
    run = data_of(reported.classifier(tmp_path), CLASSES)
    lines = [{**line, "matmul_share": 0.584} for line in run.of("train")] + [{**run.summary, "matmul_share": 0.484}]
    assert "48.4%" in dict(reports_run.cost(replace(run, lines=lines)))["Matmul peak"]


def test_of_many_labels_a_line_has_the_commonest_and_the_rarest(tmp_path: Path) -> None:
    report = SplitReport(rows=9, kept=9, trained=9, tokens=70, longest=8)
    facts = {"train": Facts(labels={f"label{number}": number for number in range(1, 60)})}
    prepared: Any = SimpleNamespace(reports={"train": report}, facts=facts)
    made = reported.recipe(tmp_path, CLASSES)
    rows, labels = reports_outcome.data_lines(made, prepared)
    assert rows == "train: 9 rows, 70 tokens, longest 8"
    assert labels.startswith("labels: 59, most often label59 59, label58 58, ")
    assert labels.endswith("least often label3 3, label2 2, label1 1 (--verbose names them all)")
    assert len(labels) < 200
    assert "label30 30" in reports_outcome.data_lines(made, prepared, every_label=True)[-1]
    pictures = made.model_copy(update={"task": SimpleNamespace(rows_are="images", token_ids=None)})
    assert reports_outcome.data_lines(pictures, prepared)[0] == "train: 9 images"
    rates = {"samples_per_second": 2.0, "tokens_per_second": 394.0, "padding_share": 0.0}
    assert reports_outcome.speed(pictures, rates) == ["2.0 images/s"]


def test_the_summary_says_what_was_kept_and_what_it_took(tmp_path: Path) -> None:
    made = reported.recipe(tmp_path, CLASSES)
    made = made.model_copy(update={"training": made.training.model_copy(update={"best_metric": "f1_macro"})})
    scores = {
        "f1_macro": 0.5,
        "f1.good": 0.5,
        "f1.fair": 0.5,
        "support.good": 9.0,
        "support.fair": 0.0,
        "support.bad": 0.0,
    }
    found: Any = {"steps": 90, "resumed_at": 60, "seconds": 20.0, "step_seconds": 75.0, "kept": 50, "rates": {}}
    found |= {"not_taken": 0, "peak_memory": None, "scores": {"validation": scores}, "reload_difference": 0.0}
    outcome: Any = SimpleNamespace(recipe=made, folder=RunFolder("run"), **found)
    text = "\n".join(reports_outcome.summary_lines(outcome))
    assert "90: 30 in 0:20 since the run was resumed at step 60; all steps together took 1:15" in text
    assert "step 50 of 90, with the best f1_macro on validation" in text
    assert "macro over 2 of 3 labels; 2 have no rows" in text


def test_the_summary_ends_with_the_commands_that_fit_the_run(tmp_path: Path) -> None:
    found: Any = {"steps": 1, "resumed_at": 0, "not_taken": 0, "seconds": 1.0, "rates": {}, "peak_memory": None}
    found |= {"scores": {}, "reload_difference": 0.0, "kept": None}

    def commands(kind: Any, **changes: Any) -> list[str]:
        made = reported.recipe(tmp_path, kind).model_copy(update=changes)
        outcome: Any = SimpleNamespace(recipe=made, folder=RunFolder("runs/a b"), **found)
        lines = reports_outcome.summary_lines(outcome)
        first = next(n for n, line in enumerate(lines) if line.startswith("  next "))
        place = "hf-finetune "
        return [line[line.index(place) :].removeprefix(place) for line in lines[first:]]

    assert commands(CLASSES) == [
        "predict 'runs/a b' --input FILE",
        "evaluate 'runs/a b' --against base",
        "merge 'runs/a b' --to FOLDER",
        "push 'runs/a b' --repo OWNER/NAME",
        "tensorboard 'runs/a b'",
    ]
    assert commands(CLASSES, tracking=Tracking(tensorboard=False))[-1].startswith("push")
    assert "chat 'runs/a b'" in commands({"kind": "causal_lm", "prompt": "question", "completion": "answer"})


def test_ten_thousand_rows_take_two_seconds_at_most() -> None:
    rows = classes(10_000)
    assert len(rows) * intervals.RESAMPLES <= intervals.ROWS_DRAWN
    assert estimate(rows, {"problem": "single_label", "names": NAMES}).method.endswith("1,000 resamples of 10,000 rows")
    huge = estimate(np.ones((200_000, 3)), {"problem": None})
    assert f"{intervals.FEWEST} resamples" in huge.method, (
        "time grows with the rows from here on, not with the resamples"
    )


def test_too_few_rows_have_no_interval() -> None:
    for rows in [np.empty((0, 3)), np.array([[1.0, 0.0, 0.0]])]:
        assert estimate(rows, {"problem": "single_label", "names": ["a", "b"]}).bounds == {}


def test_masked_rows_are_not_drawn() -> None:
    rows = classes(60)
    rows[:30, -1] = -100
    assert estimate(rows, {"problem": "single_label", "names": NAMES}).method.endswith("of 30 rows")


def test_the_last_evaluation_tells_about_the_model_that_is_saved(tmp_path: Path) -> None:
    run = data_of(reported.classifier(tmp_path), CLASSES)
    record = run.record("predictions", "validation")
    assert record is not None
    assert record.step == 20
    assert run.phases == {"validation": "eval", "test": "test"}
    assert set(run.intervals) == {"validation", "test"}


def test_a_final_evaluation_stands_before_the_last(tmp_path: Path) -> None:
    folder = reported.classifier(tmp_path)
    reported.predictions(40, "final").write(folder.observations)
    run = data_of(folder, CLASSES)
    late = replace(run, lines=[*run.lines, {"step": 20, "phase": "final", "loss": 0.4}])
    record = late.record("predictions", "validation")
    assert record is not None
    assert (record.phase, len(record.arrays["rows"])) == ("final", 40)
    assert late.scores["validation"] == {"loss": 0.4}


def test_a_run_that_went_on_after_its_end_has_an_older_final_evaluation(tmp_path: Path) -> None:
    run = data_of(reported.classifier(tmp_path), CLASSES)
    longer = replace(run, lines=[{"step": 15, "phase": "final", "loss": 0.4}, *run.lines])
    assert longer.phases["validation"] == "eval"


def test_numbers_that_json_can_not_hold_stop_no_report(tmp_path: Path) -> None:
    folder = reported.write(tmp_path, CLASSES, [], reported.lines({"loss": "nan", "accuracy": 0.5}))
    assert "| 20 | nan | 0.5000 |" in reports_run.text(data_of(folder, CLASSES), [])
    assert "nan" in reported.page(folder, reported.recipe(tmp_path, CLASSES))


def test_an_older_record_is_not_taken_for_the_newest(tmp_path: Path) -> None:
    folder = reported.classifier(tmp_path)
    (folder.observations / "predictions" / "eval-00000020.npz").write_bytes(b"PK torn")
    run = data_of(folder, CLASSES)
    assert run.record("predictions", "validation") is None
    assert "The predictions on validation were not kept" in run.missing[0]


def test_markdown_has_scores_with_intervals(tmp_path: Path) -> None:
    text = reports_run.text(data_of(reported.classifier(tmp_path), CLASSES), [])
    assert re.search(r"\| accuracy \| 0\.8000 \| 0\.\d{4} to 0\.\d{4} \|", text)
    assert "Intervals: 95% percentile bootstrap, 1,000 resamples of 80 rows." in text
    assert "| row | label | predicted | confidence | text |" in text
    assert "| layer.1 | 0.002 |" in text


def with_data(folder: RunFolder, **facts: Any) -> RunFolder:
    """Add what is known of the training rows: 60 of 100 are called bad."""
    labels = {"good": 30, "bad": 60, EVIL: 10}
    known = {"labels": {"train": labels}, "kept": {"train": 100}, "cut": {"train": 0}} | facts
    Record("data", "train", 0, facts=known).write(folder.observations)
    return folder


def test_the_headline_stands_beside_models_that_learned_nothing(tmp_path: Path) -> None:
    run = data_of(with_data(reported.classifier(tmp_path)), CLASSES)
    before = {"step": 0, "phase": "eval", "loss": 1.1, "accuracy": 0.3}
    shown = verdict.of(replace(run, lines=[before, *run.lines]))["headline"]
    record = run.record("predictions", "test")
    assert shown is not None
    assert record is not None
    truth = record.arrays["rows"][:, -1]
    assert (shown["metric"], shown["split"], shown["value"]) == ("accuracy", "test", 0.8)
    assert shown["bounds"] == run.intervals["test"].bounds["accuracy"]
    assert shown["yardsticks"] == [("before training, validation", 0.3), ("always bad, test", np.mean(truth == 1))]
    blind = {name: scores for name, _, scores in verdict.untrained(run)}["always bad"]
    assert blind["loss"] == pytest.approx(-np.log(np.array([0.3, 0.6, 0.1])[truth.astype(int)]).mean())


def test_a_regression_is_measured_against_the_mean() -> None:
    rows = cells(200)[:, :2]
    found = predictions.of(Record("predictions", "eval", 1, {"rows": rows}, {"problem": "regression"})).blind([], 0)
    assert found is not None
    sums = found[1].sums()
    assert sums is not None
    assert sums.whole()["mse"] == pytest.approx(rows[:, 1].var())


def test_what_to_try_next_comes_from_facts(tmp_path: Path) -> None:
    run = data_of(with_data(reported.classifier(tmp_path), cut={"train": 7}), CLASSES)
    lines = [line | {"loss": 0.3} if (line["phase"], line["step"]) == ("eval", 10) else line for line in run.lines]
    lines[-2] = lines[-2] | {"support.bad": 12.0, "recall.bad": 0.0, "accuracy": 0.45}
    told = verdict.of(replace(run, lines=lines))["hints"]
    assert [
        re.findall(pattern, " ".join(told)) for pattern in (r"lowest at step 10 of 20", r"7 of 100", r"bad \(12 rows\)")
    ] == [["lowest at step 10 of 20"], ["7 of 100"], ["bad (12 rows)"]]
    quiet = data_of(reported.speaker(tmp_path / "other"), CHAT)
    assert verdict.of(quiet)["hints"] == []


def test_markdown_can_not_be_broken_by_texts(tmp_path: Path) -> None:
    text = reports_run.text(data_of(reported.classifier(tmp_path), CLASSES), [])
    assert "<script" not in text
    assert not set("\x1b\u202e") & set(text)
    rows = [line for line in text.splitlines() if line.startswith("| 3 | good |")]
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [6]


def test_cost_is_what_all_devices_took(tmp_path: Path) -> None:
    told_ = dict(reports_run.cost(data_of(reported.classifier(tmp_path), CLASSES)))
    assert told_["Cost"] == "2 device-hours of cuda (4 x 30:00)"
    assert told_["A step"] == "data 0.1 s (10%), forward 0.2 s (20%), backward 0.5 s (50%), optimizer 0.2 s (20%)"
    assert told_["Matmul peak"].startswith("25.0%")
    assert told_["Peak memory"] == "2.00 GB on its device (rank 0)"


def test_what_a_resumed_run_cost_is_said_to_be_a_part(tmp_path: Path) -> None:
    folder = reported.classifier(tmp_path)
    Record("environment", "train", 12, facts={"table": {}}).write(folder.observations)
    cost = dict(reports_run.cost(data_of(folder, CLASSES)))
    assert cost["Time"] == "30:00, evaluations in between included; from step 12 on, where the run was resumed"


class Parsed(HTMLParser):
    """Open elements, and what is loaded or linked."""

    VOID = frozenset({"meta", "br", "wbr", "hr", "use", "path"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name in {"href", "src", "xlink:href", "action"}]
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture(scope="module", params=["classifier", "speaker"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The page of a hostile run, made from its folder alone."""
    folder = tmp_path_factory.mktemp(request.param)
    run = getattr(reported, request.param)(folder)
    return reported.page(run, reported.recipe(folder, CLASSES if request.param == "classifier" else CHAT))


def test_the_page_is_whole_and_refers_to_nothing_outside(made: str) -> None:
    parsed = Parsed(made)
    assert parsed.open == []
    assert [name for name in parsed.references if not name.startswith("#")] == []
    assert "url(http" not in made
    assert {name[1:] for name in parsed.references} <= set(parsed.ids)
    assert len(set(parsed.ids)) == len(parsed.ids)


def test_hostile_texts_are_texts(made: str) -> None:
    assert not {"script", "img", "link", "iframe"} & Parsed(made).tags
    assert "&lt;script&gt;window.pwned=1&lt;/script&gt;" in made
    assert "{{ 7*7 }}" in made
    assert not set("\x1b\u202e\u2028") & set(made)


def test_the_same_folder_makes_the_same_page(tmp_path: Path) -> None:
    folder, recipe = reported.speaker(tmp_path), reported.recipe(tmp_path, CHAT)
    assert reported.page(folder, recipe) == reported.page(folder, recipe)


def test_tokens_are_coloured_by_their_loss(tmp_path: Path) -> None:
    page = reported.page(reported.speaker(tmp_path), reported.recipe(tmp_path, CHAT))
    assert '<span class="loss l9" title="loss 6 nats, entropy 1">▁the</span>' in page
    assert '<span class="loss masked-token">&lt;s&gt;</span>' in page
    assert "who?<br>" in page, "samples"


def test_a_run_without_records_says_what_is_missing(tmp_path: Path) -> None:
    folder = reported.write(tmp_path, CLASSES, [], reported.lines({"loss": 1.0, "accuracy": 0.5}))
    page = reported.page(folder, reported.recipe(tmp_path, CLASSES))
    assert "The predictions on validation were not kept" in page
    assert '<td class="n">0.5000</td>' in page
    assert page.count("<svg") == 5


@pytest.mark.parametrize("gone", ["metrics.jsonl", "observations"])
def test_whatever_is_missing_there_is_a_page(tmp_path: Path, gone: str) -> None:
    folder = reported.speaker(tmp_path)
    (folder.path / gone).rename(tmp_path / "gone")
    assert "Run report" in reported.page(folder, reported.recipe(tmp_path, CHAT))


def test_a_real_run_leaves_its_report(run: Runner) -> None:
    done = run("training.epochs=3", "tracking.report=true")
    text, page = ((done.folder / name).read_text() for name in ("report.md", "report.html"))
    images = {file.name for file in (done.folder / "plots").iterdir()}
    assert {"loss.png", "confusion_matrix-validation.png", "reliability-validation.png"} <= images
    assert set(re.findall(r"\(plots/([\w.-]+)\)", text)) == images
    accuracy = done.outcome.scores["validation"]["accuracy"]
    assert f"| accuracy | {accuracy:.4f} |" in text
    assert f'<th scope="row">accuracy</th><td class="n">{accuracy:.4f}<' in page
    assert done.outcome.prepared.fingerprint in page
    assert "PeftModel.from_pretrained(model, folder)" in page
    assert reported.page(done.outcome.folder, Recipe.load(str(done.folder / "recipe.yaml"))) == page


def test_a_report_that_can_not_be_written_loses_no_run(
    run: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run" / "report.html").mkdir(parents=True)
    (tmp_path / "run" / "status.json").write_text('{"state": "failed", "step": 0}')
    done = run("tracking.report=true")
    assert (done.status["state"], done.status["exit_code"]) == ("done", 0)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "report" in line]
    assert len(warnings) == 1
    assert "is not complete (Is a directory); the run itself is" in warnings[0]
    assert "## Result" in (done.folder / "report.md").read_text()


def test_a_record_that_is_not_whole_loses_no_run(
    run: Runner, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = run("tracking.report=true")
    capsys.readouterr()
    Record("examples", "eval", done.outcome.steps, facts={"rows": [{"row": 1}]}).write(done.folder / "observations")
    reports_run.write(done.outcome, done.lines("eval"))
    told_ = capsys.readouterr().err.splitlines()
    assert [line for line in told_ if "is not complete (KeyError: 'label')" in line] == told_


def test_texts_end_no_block_of_code() -> None:
    assert log_text.fenced("a\n```\nb", "yaml") == "````yaml\na\n```\nb\n````"
    assert EVIL not in log_text.cell(EVIL)
