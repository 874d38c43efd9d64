from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import CHAT_RECIPE, RECIPE, finished
from huggingface_hub import ModelCard
from scipy import stats

from hf_finetune.errors import CheckpointError, DataError, RecipeError
from hf_finetune.inference import document as inference_document
from hf_finetune.inference import evaluate as inference_evaluate
from hf_finetune.inference.evaluate import Scored, compare, mcnemar
from hf_finetune.reports import intervals
from hf_finetune.tasks._sums import of_means
from hf_finetune.tasks.base import State
from hf_finetune.tasks.causal_lm import CausalLM
from hf_finetune.tasks.text_classification import TextClassification

QUIET = "tracking: {images: false, report: false, tensorboard: false}\n"
TASK = TextClassification(kind="text_classification", text="text", label="label")


def evaluate(capsys: pytest.CaptureFixture[str], run: Path, *overrides: str, **options: Any) -> dict[str, Any]:
    """Evaluates, and returns the document that was printed."""
    capsys.readouterr()
    inference_evaluate.evaluate(str(run), overrides, form="json", **options)
    found: dict[str, Any] = json.JSONDecoder().raw_decode(capsys.readouterr().out)[0]
    return found


def recorded(run: Path, phase: str) -> dict[str, float]:
    """Metrics of the last line of a phase."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["phase"] == phase][-1]
    return {name: value for name, value in last.items() if name not in ("step", "phase", "epoch", "time", "runtime")}


@pytest.fixture(scope="module")
def tested(tmp_path_factory: pytest.TempPathFactory, tiny_bert: str, reviews: Callable[[int], str]) -> Path:
    """A classifier with a test split, whose rows have a source."""
    folder = tmp_path_factory.mktemp("tested")
    rows = Path(reviews(96)).read_text().splitlines()[1:]
    (folder / "test.csv").write_text(
        "text,label,source\n" + "".join(f"{r},{'ab'[n % 3 > 0]}\n" for n, r in enumerate(rows))
    )
    text = RECIPE.format(model=tiny_bert, data=reviews(96), output=folder / "run")
    text = text.replace("max_length: 32", f"max_length: 32, test: {folder / 'test.csv'}, checks: {{leakage: 'off'}}")
    return finished(folder, text.replace("epochs: 2", "epochs: 12") + QUIET)


@pytest.fixture(scope="module")
def answering(tmp_path_factory: pytest.TempPathFactory, tiny_llama: str) -> Path:
    """A language model's run that generates answers."""
    folder = tmp_path_factory.mktemp("answering")
    numbers = ("one", "two", "three", "four", "five", "six")
    rows = [{"question": f"what is {a} plus {b} ?", "answer": f"{a} ."} for a in numbers for b in numbers]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = CHAT_RECIPE.format(model=tiny_llama, data=folder / "sums.jsonl", output=folder / "run")
    return finished(folder, text.replace("sample_prompts: 2", "sample_prompts: 0, generate_rows: 8") + QUIET)


@pytest.mark.parametrize("split", ["test"])
def test_the_figures_of_the_card_are_those_of_evaluate(
    split: str, tested: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card: Any = ModelCard.load(tested / "adapter" / "README.md").data
    told = {result.metric_name: result for result in card.eval_results if result.dataset_split == split}
    found = evaluate(capsys, tested, split=split)["metrics"]
    assert {"loss", "accuracy", "f1_macro"} <= told.keys() <= found.keys()
    for name, result in told.items():
        assert result.metric_value == pytest.approx(found[name]["value"], abs=1e-6)
        said = (result.metric_args or {}).get("confidence_interval")
        assert said == (pytest.approx([found[name]["low"], found[name]["high"]], abs=1e-6) if said else None)
    assert "confidence_interval" in told["accuracy"].metric_args


@pytest.mark.parametrize(
    ("run", "split", "phase"),
    [("tested", "test", "test"), ("answering", "validation", "eval")],
)
def test_metrics_are_those_that_the_run_recorded(
    run: str, split: str, phase: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    folder: Path = request.getfixturevalue(run)
    found = {name: value["value"] for name, value in evaluate(capsys, folder, split=split)["metrics"].items()}
    expected = {name: value for name, value in recorded(folder, phase).items() if name in found}
    assert {"loss", "accuracy"} <= set(expected) or {"perplexity", "exact_match"} <= set(expected)
    assert found == pytest.approx(expected, abs=1e-6)


def test_the_document_says_of_what_data_it_is_and_is_kept(tested: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import hashlib

    document = evaluate(capsys, tested)
    data = document["data"]
    file = tested.parent / "test.csv"
    assert (data["split"], data["rows"], data["evaluated"], data["cut"]) == ("test", 96, 96, 0)
    assert data["sources"][0]["source"] == str(file)
    assert len(data["sources"][0]["sha256"]) == len(hashlib.sha256().hexdigest())
    kept = [json.loads(one.read_text()) for one in (tested / "evaluations").glob("test-*.json")]
    assert document in kept
    count = len(list((tested / "evaluations").iterdir()))
    evaluate(capsys, tested)
    assert len(list((tested / "evaluations").iterdir())) == count


def test_intervals_hold_the_value(tested: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for metric in (metrics := evaluate(capsys, tested)["metrics"]).values():
        assert metric.get("low", metric["value"]) <= metric["value"] <= metric.get("high", metric["value"])
    assert metrics["accuracy"]["low"] < metrics["accuracy"]["high"]
    assert "low" not in metrics["roc_auc"]


def test_slices_are_the_metrics_of_their_rows(tested: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = (tested.parent / "test.csv").read_text().splitlines()
    (tmp_path / "a.csv").write_text("\n".join([rows[0], *(row for row in rows[1:] if row.endswith(",a"))]) + "\n")
    whole = evaluate(capsys, tested, by=("source",))
    alone = evaluate(capsys, tested, files=(str(tmp_path / "a.csv"),))
    parts = {part["value"]: part for part in whole["slices"]["source"]}
    assert {value: part["rows"] for value, part in parts.items()} == {"a": 32, "b": 64}
    for name, metric in alone["metrics"].items():
        assert parts["a"]["metrics"][name]["value"] == pytest.approx(metric["value"], abs=1e-6)


def test_too_many_slices_are_counted(
    tested: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(inference_evaluate, "MOST_SLICES", 1)
    document = evaluate(capsys, tested, by=("source",))
    assert document["slices_not_shown"] == {"source": {"slices": 1, "rows": 32}}
    assert "by source: 1 smaller slices with 32 rows are not shown" in inference_document.render(
        document, "text", ("accuracy",), everything=False
    )


def test_against_the_base_and_against_itself(tested: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = evaluate(capsys, tested, against=("base", str(tested)))
    base, itself = document["against"]
    assert base["differences"]["loss"]["value"] < 0
    assert 0 < base["mcnemar"]["p_value"] <= 1
    assert "the trained head" in base["notes"][0]
    gain = (base["mcnemar"]["only_this"] - base["mcnemar"]["only_other"]) / 96
    assert base["differences"]["accuracy"]["value"] == pytest.approx(gain)
    assert all(difference["value"] == 0 for difference in itself["differences"].values())
    text = inference_document.render(document, "text", ["loss", "accuracy"], everything=False)
    table = text.partition("against the base model")[2]
    loss = next(line.split() for line in table.splitlines() if line.split()[:1] == ["loss"])
    assert all(re.fullmatch(r"[+-]\d\.\d{4}", loss[place]) for place in (2, 3, 5)), "signed, with the digits of values"
    assert re.search(r"accuracy +0\.\d{4} +0\.0000 ", table), "no difference has no sign"
    assert itself["mcnemar"] == {"metric": "accuracy", "only_this": 0, "only_other": 0, "p_value": 1.0}


def test_a_language_model_is_compared_by_answers_and_loss(answering: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ("task.generate_rows=4", "task.answer_pattern='(one|two|three|four|five|six)'", "task.max_new_tokens=2")
    document = evaluate(capsys, answering, *overrides, split="validation", against=("base",))
    assert document["against"][0]["differences"]["loss"]["high"] < 0
    assert document["against"][0]["mcnemar"]["metric"] == "exact_match"
    assert document["metrics"]["generated_tokens"]["value"] <= 2


def test_only_answers_to_the_same_rows_are_compared() -> None:
    for rows, pattern, kept, says in [
        (3, "x", 3, "compared on the 3 rows that both answer"),
        (5, "x", 5, None),
        (0, "x", 0, "answer no row in common"),
        (3, "y", 0, "has another task.answer_pattern"),
    ]:

        def scored(count: int, pattern: str) -> Any:
            answers = [of_means({"exact_match": np.ones(count)})] if count else []
            task: Any = SimpleNamespace(answer_rule=pattern)
            return Scored(task, State(), {}, np.arange(5), np.arange(count), answers)

        *both, told = inference_evaluate._same_answers(scored(5, "x"), scored(rows, pattern), "other")
        assert [len(one.answered) for one in both] == [kept, kept]
        assert [list(one.of_answers()) for one in both] == [["exact_match"] if kept else []] * 2
        assert [says in note for note in told] == [True] if says else told == []


def test_bad_rows_are_named(classifier: Path, tmp_path: Path) -> None:
    for rows, says in [
        ("text,label\na film,positive\nthe plot,splendid\n", r"row 2: column 'label' holds 'splendid', which is none"),
        ("text,label\na film,positive\nthe plot\n", r"data\.csv:3: --data: has 1 field"),
        ("text,lable\na film,positive\n", r"has no column 'label'; it has text, lable; did you mean 'lable'"),
    ]:
        (tmp_path / "data.csv").write_text(rows)
        with pytest.raises(DataError, match=says):
            inference_evaluate.evaluate(str(classifier), files=(str(tmp_path / "data.csv"),))


def test_rows_that_are_cut_are_counted(classifier: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data.csv").write_text(f"text,label\n{'the film ' * 40},positive\na film,negative\n,negative\n")
    kept = ("data.checks.empty_text=warn",)
    inference_evaluate.evaluate(str(classifier), kept, files=(str(tmp_path / "data.csv"),), form="text")
    told = capsys.readouterr()
    assert "2 of 3 rows (1 cut, 1 without text)" in told.out
    assert "are cut to 32 tokens" in told.err or "is cut to 32 tokens" in told.err


def test_mistakes_of_the_command_line(classifier: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"split": "test"}, r"the run has no split 'test'; it has train, validation"),
        ({"split": "train", "files": ("x.csv",)}, "exclude each other"),
        ({"by": ("sauce",)}, r"has no column 'sauce'"),
        ({"files": ("nothing.csv",)}, r"--data: no file matches 'nothing\.csv'"),
        ({"against": ("nowhere",)}, "nowhere: does not exist"),
    ]
    for options, says in cases:
        with pytest.raises((RecipeError, DataError, CheckpointError), match=says):
            inference_evaluate.evaluate(str(classifier), **options)


def test_a_classifier_is_not_compared_with_a_language_model(tested: Path, chatter: Path) -> None:
    with pytest.raises((RecipeError, DataError), match=r"column|does causal_lm"):
        inference_evaluate.evaluate(str(tested), against=(str(chatter),))


def scored(logits: Any, labels: Any, names: tuple[str, ...] = ("a", "b")) -> Scored:
    predictions = {"logits": np.asarray(logits, np.float32), "labels": np.asarray(labels)}
    return Scored(TASK, State(names), predictions, np.arange(len(labels)))


def test_mcnemar_is_the_exact_binomial_test_of_the_rows_that_one_has_right() -> None:
    labels = np.zeros(20)
    this, other = np.tile([1.0, 0.0], (20, 1)), np.tile([1.0, 0.0], (20, 1))
    this[:2], other[2:11] = [0.0, 1.0], [0.0, 1.0]
    test = mcnemar(scored(this, labels), scored(other, labels))
    assert test is not None
    assert (test["only_this"], test["only_other"]) == (9, 2)
    assert test["p_value"] == pytest.approx(stats.binomtest(2, 11).pvalue)


def test_paired_intervals_are_narrower_than_those_of_each() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 2, 300)
    logits = draw.normal(size=(300, 2))
    better = logits.copy()
    better[:30][np.arange(30), labels[:30]] += 9
    this, other = scored(better, labels), scored(logits, labels)
    found = compare(this, other, "other")["differences"]["accuracy"]
    alone = intervals.estimate(this.sums()).bounds["accuracy"]
    assert found["high"] - found["low"] < alone[1] - alone[0]
    assert found["low"] > 0


def tokens(first: int) -> dict[str, Any]:
    rows = np.array([[3.0, first, 1], [2, 2, 2]], np.float32)
    return dict(zip(("nats", "tokens", "right"), rows.T, strict=True))


def test_losses_of_other_tokens_are_not_compared() -> None:
    task = CausalLM(kind="causal_lm", text="text")
    this = Scored(task, State(), tokens(4), np.arange(2))
    other = Scored(task, State(), tokens(5), np.arange(2))
    found = compare(this, other, "other")
    assert found["differences"] == {}
    assert "are not compared" in found["notes"][0]


def test_other_labels_and_rows_that_only_one_has_are_told() -> None:
    labels = np.zeros(4)
    this = scored(np.eye(2)[[0, 1, 0, 1]], labels)
    with pytest.raises(RecipeError, match=r"knows other labels than this run \(b, c\)"):
        compare(this, scored(np.eye(2)[[0, 1, 0, 1]], labels, ("a", "c")), "other")
    assert compare(this, this.only(np.array([0, 1])), "other")["notes"] == ["2 rows are left out: other drops them"]


def test_markdown_is_tables(tested: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    inference_evaluate.evaluate(str(tested), form="markdown", by=("source",), against=("base",))
    told = capsys.readouterr().out
    assert re.search(r"^\| accuracy \| 0\.\d{4} \| 0\.\d{4} \.\. [01]\.\d{4} \|$", told, re.MULTILINE)
    assert "**by source**" in told
    assert "McNemar's exact p" in told


def test_without_lm_eval_the_extra_is_named(chatter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(RecipeError, match=r"pip install 'hf-finetune\[harness\]'"):
        inference_evaluate.run_lm_eval(str(chatter), (), ("arc_easy",))


LOCAL_TASK = """\
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["one .", "two ."]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_lm_eval_runs_a_task_of_a_folder(chatter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval", reason="the extra harness is not installed")
    (tmp_path / "sums.yaml").write_text(LOCAL_TASK.format(file=chatter.parent / "sums.jsonl"))
    inference_evaluate.run_lm_eval(str(chatter), (), ("sums",), folder=str(tmp_path), limit=5, form="json")
    told = capsys.readouterr().out
    found = json.JSONDecoder().raw_decode(told[told.index("{") :])[0]
    assert 0 <= found["results"]["sums"]["acc,none"] <= 1
    assert list((chatter / "evaluations").glob("lm-eval-sums-*.json"))
    with pytest.raises(RecipeError, match="knows no task 'nonsense'"):
        inference_evaluate.run_lm_eval(str(chatter), (), ("nonsense",))
