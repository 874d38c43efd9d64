from __future__ import annotations

import csv
import io
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from forked import Server
from scipy import special
from test_finished import last_predictions

from hf_finetune.errors import DataError, RecipeError
from hf_finetune.inference import predict as inference_predict
from hf_finetune.inference import rows as inference_rows
from hf_finetune.inference.predict import Options
from hf_finetune.inference.sinks import Sink, prefix_for

Predict = Callable[..., str]


@pytest.fixture
def predict(classifier: Path, tmp_path: Path) -> Predict:
    """Predicts a text in this process; returns what is written."""

    def start(text: str, suffix: str = ".csv", to: str | None = None, **options: Any) -> str:
        source, target = tmp_path / f"in{suffix}", tmp_path / f"out{to or suffix}"
        source.write_text(text, encoding="utf-8")
        inference_predict.run(Options(str(classifier), input=str(source), output=str(target), **options))
        return target.read_text(encoding="utf-8") if target.suffix != ".parquet" else str(target)

    return start


def objects(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_predictions_are_those_of_the_training(classifier: Path, tmp_path: Path) -> None:
    from hf_finetune.data import prepare
    from hf_finetune.inference.load import open_run

    run = open_run(str(classifier))
    raw: Any = prepare.prepare(run.recipe, run.tokenizer, run.machine).raw_validation
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in raw["text"]))
    inference_predict.run(
        Options(str(classifier), input=str(tmp_path / "in.jsonl"), output=str(tmp_path / "out.jsonl"))
    )
    found = objects((tmp_path / "out.jsonl").read_text())
    record = last_predictions(classifier)
    logits = record.arrays["rows"][:, :2]
    expected = special.softmax(logits.astype(np.float64), axis=1)
    names = run.targets.names
    assert [row["label"] for row in found] == [names[best] for best in logits.argmax(axis=1)]
    probabilities = [[row[f"probability.{name}"] for name in names] for row in found]
    np.testing.assert_allclose(probabilities, expected, atol=1e-6)
    assert [row["score"] for row in found] == [max(row) for row in probabilities]


def test_a_table_keeps_its_cells_and_its_order_whatever_their_length(predict: Predict) -> None:
    texts = ["the film is good", "bad, " * 30, 'a "quoted"\nstory', "it"]
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows([["id", "text"], *([f"0{n}", text] for n, text in enumerate(texts))])
    rows = list(csv.DictReader(io.StringIO(predict(stream.getvalue()), newline="")))
    assert [row["text"] for row in rows] == texts
    assert [row["id"] for row in rows] == ["00", "01", "02", "03"]
    assert list(rows[0]) == ["id", "text", "label", "score", "probability.negative", "probability.positive"]


def test_the_likeliest_labels_stand_in_for_all(predict: Predict, capfd: pytest.CaptureFixture[str]) -> None:
    text = "text\nthe film is good\nthe film is bad\n"
    every = list(csv.DictReader(io.StringIO(predict(text), newline="")))
    (few,) = [objects(predict(text, to=".jsonl", top=1, restart=True))]
    for row, shown in zip(every, few, strict=True):
        assert list(shown) == ["text", "label", "score", "top_labels", "top_scores"]
        assert (shown["top_labels"], shown["top_scores"]) == ([row["label"]], [float(row["score"])])
    assert "probability.negative" in predict(text, top=2, restart=True), "no label is left out"


def test_columns_of_the_input_are_never_overwritten(predict: Predict) -> None:
    found = objects(predict('{"text": "a film", "label": "mine", "score": 3}\n', ".jsonl"))
    assert found[0]["label"] == "mine"
    assert found[0]["score"] == 3
    assert found[0]["predicted_label"] in ("negative", "positive")
    assert "predicted_probability.positive" in found[0]
    assert prefix_for(["label", "predicted_label"], ["label", "score"]) == "predicted_2_"
    with pytest.raises(RecipeError, match=r"has a column 'label' already"):
        predict("text,label\na film,x\n", prefix="", restart=True)
    assert "mylabel" in predict("text,label\na film,x\n", prefix="my", restart=True)


@pytest.mark.parametrize(
    ("text", "suffix", "says"),
    [
        ('{"text": "a film"}\n{"text": 5}\n', ".jsonl", r"in\.jsonl:2: column 'text' holds a number, not text"),
        ("text,id\na film,1\nthe plot\n", ".csv", r"in\.csv:3: has 1 field, the header 2"),
        ("a film\n\n", ".txt", r"in\.txt:2: is blank; remove the line"),
    ],
)
def test_a_bad_row_is_named_left_out_or_left_empty(text: str, suffix: str, says: str, predict: Predict) -> None:
    with pytest.raises(DataError, match=says):
        predict(text, suffix, ".jsonl")
    kept = objects(predict(text, suffix, ".jsonl", on_bad_row="skip", restart=True))
    assert [row["text"] for row in kept] == ["a film"]
    both = objects(predict(text, suffix, ".jsonl", on_bad_row="null", restart=True))
    assert len(both) == 2
    assert both[0] == kept[0]
    assert both[1].get("score") is None


def test_a_key_that_comes_late_and_is_taken_is_a_fault_of_its_row(predict: Predict) -> None:
    text = '{"text": "a film"}\n' * 1024 + '{"text": "the plot", "label": "mine"}\n'
    with pytest.raises(DataError, match=r"in\.jsonl:1025: has the key 'label', a name of the output; give --prefix"):
        predict(text, ".jsonl")


def test_bad_rows_are_counted(predict: Predict, capsys: pytest.CaptureFixture[str]) -> None:
    predict("text\n" + "a film\n,\n" * 3, on_bad_row="skip")
    told = capsys.readouterr().err
    assert "3 of 6 rows are bad, and left out" in told
    assert "has 2 fields, the header 1; put texts with commas in quotes (line 3, 5, 7)" in told


@pytest.mark.parametrize("to", [".csv", ".parquet"])
def test_any_format_goes_out(to: str, predict: Predict, tmp_path: Path) -> None:
    predict("text,id\na film,1\nthe plot,2\n", ".csv", to)
    target = tmp_path / f"out{to}"
    if to == ".parquet":
        rows = pq.read_table(target).to_pylist()
    elif to == ".jsonl":
        rows = objects(target.read_text())
    else:
        rows = list(csv.DictReader(target.open(), delimiter="\t" if to == ".tsv" else ","))
    assert [row["text"] for row in rows] == ["a film", "the plot"]
    assert all(row["label"] in ("negative", "positive") for row in rows)
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(["in.csv", target.name])


def test_parquet_keeps_its_types(classifier: Path, tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"text": ["a film", "the plot"], "n": pa.array([1, None], pa.int8()), "l": [[1], []]})
    pq.write_table(table, tmp_path / "in.parquet")
    inference_predict.run(
        Options(str(classifier), input=str(tmp_path / "in.parquet"), output=str(tmp_path / "out.parquet"))
    )
    found = pq.read_table(tmp_path / "out.parquet")
    assert found.select(["text", "n", "l"]).equals(table)
    assert found.schema.field("score").type == pa.float64()


def test_parquet_drops_nothing_and_says_what_it_can_not_hold() -> None:
    cases: list[tuple[list[dict[str, Any]], list[dict[str, Any]], str]] = [
        ([{"a": 1}], [{"a": 1}, {"a": 2, "b": 1}], "x:12: has the key 'b', which its first rows lack"),
        ([{"a": {"b": 1}}], [{"a": None}, {"a": {"b": 2, "c": 1}}], r"x:12: has the key 'a\.c', which"),
        ([{"a": [{"b": 1}]}], [{"a": [{"b": 2}, {"c": 1}]}], r"x:11: has the key 'a\.c', which"),
        ([{"a": 1}, {"a": None}, {"a": "z"}, {"a": 3}], [], "x:3: column 'a' holds what .* give --format jsonl"),
        ([{"a": 1}, {"a": 2**70}], [], "x:2: column 'a' holds what"),
        ([{"a": 1}], [{"a": 2}, {"a": "z"}], "x:12: column 'a' holds what"),
        ([{"a": {}}], [], "x: column 'a' holds what"),
    ]
    for early, late, says in cases:
        sink = Sink("parquet", ["a"], {"score": "number"})
        windows = [
            {first + n: {"a": None, "score": 0.5, **cells} for n, cells in enumerate(window)}
            for first, window in ((1, early), (11, late))
        ]
        with pytest.raises(DataError, match=says):
            [sink.body(window, "x") for window in windows]


def test_parquet_holds_categories_as_what_they_name(tmp_path: Path) -> None:
    import pyarrow as pa

    schema = pa.schema([("a", pa.dictionary(pa.int8(), pa.string()))])
    sink = Sink("parquet", ["a"], {"score": "number"}, schema)
    rows: list[Any] = [{"a": "x", "score": 0.5}, {"a": None, "score": 1.0}]
    (tmp_path / "partial").write_bytes(sink.body(dict(enumerate(rows)), "x"))
    sink.finish(tmp_path / "partial", tmp_path / "final")
    assert pq.read_table(tmp_path / "final").to_pylist() == rows


def test_a_finished_output_is_not_replaced_unless_asked(predict: Predict) -> None:
    first = predict("text\na film\n")
    with pytest.raises(RecipeError, match="exists already"):
        predict("text\na film\n")
    assert predict("text\na film\n", restart=True) == first


@pytest.mark.parametrize("to", ["csv", pytest.param("parquet", marks=pytest.mark.slow)])
def test_a_killed_call_goes_on_and_gives_what_one_piece_gives(
    server: Server, classifier: Path, tmp_path: Path, to: str
) -> None:
    source = tmp_path / "in.csv"
    source.write_text("n,text\n" + "".join(f"{n},the film is{' very' * (n % 7)} good\n" for n in range(8_000)))
    inference_predict.run(Options(str(classifier), input=str(source), output=str(tmp_path / f"whole.{to}")))
    target = tmp_path / f"out.{to}"
    arguments = (str(classifier), "--input", str(source), "--output", str(target))
    state = tmp_path / f"out.{to}.partial.json"
    child = server.start("predict", *arguments)
    deadline = time.monotonic() + 120
    while not state.exists() and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send(signal.SIGKILL)
    assert child.wait() == -9
    rows = json.loads(state.read_text())["progress"]["rows"]
    assert 0 < rows < 8_000
    with (tmp_path / f"out.{to}.partial").open("ab") as torn:
        torn.write(b"7999,half a li")
    changed = source.read_text()
    source.write_text(changed + "8000,more\n")
    with pytest.raises(RecipeError, match="was begun with another input"):
        inference_predict.run(Options(str(classifier), input=str(source), output=str(target)))
    source.write_text(changed)
    with pytest.raises(RecipeError, match="another settings"):
        inference_predict.run(Options(str(classifier), input=str(source), output=str(target), on_bad_row="skip"))
    inference_predict.run(Options(str(classifier), input=str(source), output=str(target)))
    assert target.read_bytes() == (tmp_path / f"whole.{to}").read_bytes()
    assert not list(tmp_path.glob("*.partial*"))


def test_lines_go_through_a_pipe(server: Server, classifier: Path) -> None:
    done = server.run("predict", str(classifier), read="the film is good\nthe plot is bad\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert [row["text"] for row in objects(done.stdout)] == ["the film is good", "the plot is bad"]


def test_a_reader_that_leaves_ends_it_quietly(server: Server, classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "in").write_text("a film\n")
    reading, writing = os.pipe()
    os.close(reading)
    with (tmp_path / "in").open() as rows:
        done = server.run("predict", str(classifier), streams=(rows, writing, None))
    os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


def test_a_pipe_with_a_name_is_read_once(classifier: Path, tmp_path: Path) -> None:
    import threading

    os.mkfifo(tmp_path / "in")
    writing = threading.Thread(target=lambda: (tmp_path / "in").write_text("text\na film\n"))
    writing.start()
    options = Options(str(classifier), input=str(tmp_path / "in"), output=str(tmp_path / "out.csv"), input_format="csv")
    inference_predict.run(options)
    writing.join()
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 2


def test_a_language_model_answers_rows_that_hold_no_answer(chatter: Path, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"question": "what is one plus two ?", "id": 7}\n{"question": "what is ten plus one ?"}\n')
    inference_predict.run(Options(str(chatter), input=str(source), output=str(target), max_new_tokens=3))
    found = objects(target.read_text())
    assert [set(row) for row in found] == [{"question", "id", "generated", "ended"}, {"question", "generated", "ended"}]
    from hf_finetune.inference.load import open_run
    from hf_finetune.tasks._generation import generate

    run = open_run(str(chatter))
    task: Any = run.recipe.task
    rows = {"question": ["what is one plus two ?"], "answer": ["three"]}
    prompts = task.prompts(rows, run.tokenizer, 1)
    answer = generate(run.model(), run.tokenizer, prompts, max_new_tokens=3, batch_size=1)[0]
    assert found[0]["generated"] == answer.text
    with pytest.raises(RecipeError, match="tsv can't"):
        inference_predict.run(Options(str(chatter), input=str(source), output=str(tmp_path / "out.tsv")))


def test_mistakes_of_the_command_line(classifier: Path) -> None:
    cases: list[tuple[dict[str, Any], Any, str]] = [
        ({"input": "none.csv"}, DataError, "does not exist"),
        ({"input": "README"}, DataError, "does not exist"),
        ({"input_format": "parquet"}, RecipeError, "can't be read from a pipe"),
        ({"form": "parquet"}, RecipeError, "can't be written to a pipe"),
        ({"max_new_tokens": 3}, RecipeError, "for language models"),
    ]
    for options, kind, says in cases:
        with pytest.raises(kind, match=says):
            inference_predict.run(Options(str(classifier), **options))


def test_paths_outside_the_root_are_refused(classifier: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_finetune.inference import evaluate
    from hf_finetune.inference.load import open_run

    monkeypatch.setenv("HF_FINETUNE_ROOT", str(classifier))
    with pytest.raises(RecipeError, match=r"--input /etc/hosts: lies outside[^$]*--output /x: lies outside"):
        inference_predict.run(Options(str(classifier), input="/etc/hosts", output="/x"))
    with pytest.raises(RecipeError, match="--data /x: lies outside"):
        evaluate.evaluate(str(classifier), files=("/x",))
    with pytest.raises(RecipeError, match="--lm-eval-tasks /x: lies outside"):
        evaluate.run_lm_eval(str(classifier), (), ("a",), folder="/x")
    with pytest.raises(RecipeError, match="lies outside"):
        open_run(str(classifier.parent))


def test_an_input_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    locked = inference_rows.Input(str(tmp_path / "locked.csv"), "csv")
    (tmp_path / "in.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"in\.parquet: is no(t a)? parquet file"):
        inference_rows.Input(str(tmp_path / "in.parquet"), "parquet").count()
    if os.geteuid():  # root reads anything
        (tmp_path / "locked.csv").touch(mode=0)
        with pytest.raises(DataError, match="can't be read: Permission denied"):
            locked.identity()


def test_a_file_that_is_no_text_is_refused(classifier: Path, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_bytes(b"text\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"in\.csv:2: is not UTF-8 at byte 5"):
        inference_predict.run(
            Options(str(classifier), input=str(tmp_path / "in.csv"), output=str(tmp_path / "out.csv"))
        )
